"""Two clocks for steps that are timed in turn, round after round: the host's and a GPU's own.

Each round begins with another step, for one that comes after a step which uses much memory finds
the machine in a worse state.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping

import torch
from op_case import Step

_L2_BYTES = 256 << 20  # more than any GPU's second-level cache holds
_AHEAD = 20_000_000  # cycles, some 10 ms: longer than a step takes to launch


def in_turn(steps: Mapping[str, Step], rounds: int) -> Iterator[tuple[str, Step]]:
    """All steps so many times, each round beginning with another."""
    ways = list(steps.items())
    for number in range(rounds):
        start = number % len(ways)
        yield from ways[start:] + ways[:start]


def on_host(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step in each round."""
    taken: dict[str, list[float]] = {way: [] for way in steps}
    for step in steps.values():
        step()
    gc.collect()
    gc.disable()
    for way, step in in_turn(steps, rounds):
        start = time.perf_counter()
        step()
        taken[way].append((time.perf_counter() - start) * 1e3)
    gc.enable()
    return taken


def on_cuda(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """The same between events on the GPU, which finds nothing in its cache.

    It is kept waiting while the host launches a step, so that no gap between two kernels counts
    but where a step itself waits for the GPU.
    """
    taken: dict[str, list[float]] = {way: [] for way in steps}
    other = torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda")
    for step in steps.values():
        for _ in range(3):
            step()
    for way, step in in_turn(steps, rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.fill_(1)
        torch.cuda._sleep(_AHEAD)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        taken[way].append(start.elapsed_time(end))
    return taken


def in_graph(step: Step) -> Step:
    """The step as the replay of a CUDA graph: one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
