"""Input factors of convolutions: fastcil.curvature.ConvInputFactor beside K-FAC packages.

One update of a running average with one batch, float32 [N, C, H, W] after a ReLU, on one thread, of
layers of ResNet-18 and some others; `input_factor_ways` tells what each way calls.

A way is timed only after its result, of two batches of which the second is twice the first, has
been compared with float64's, in the way's own scale. Aims for the geometric mean over four layers
of the time of the fastest package, in times of ours: 8 for batches of 32, hoped for 12; 6 for
batches of 8, hoped for 9.

python benchmarks/bench_input_factor.py memory   # -> results/memory/DEVICE.json

tells how many bytes an update needs beyond the input and what is kept; aim: 0.15 of the packages'.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path

import torch
from input_factor_ways import LAGS, OWN, PEERS, Layer, Running, build
from op_case import OURS, Group, OpCase, Step
from torch import Tensor

from fastcil.curvature import ConvInputFactor

ROOT = Path(__file__).parents[1]
# Relative error in the Frobenius norm; a GPU may add up 800,000 products of one sign in a row.
ALLOWED = {"cpu": 5e-6, "cuda": 3e-5}


@lru_cache(1)
def truth(layer: Layer) -> Tensor:
    patches = layer.patches(layer.batch().double())
    return (patches.T @ patches / len(patches)).cpu()


@torch.no_grad()
def check(name: str, layer: Layer, running: Running) -> None:
    x = layer.batch()
    running.update(x)
    running.update(2 * x)
    wanted = truth(layer) * ((running.decay + 4) / (running.decay + 1))
    error = float((running.mean(2).cpu().double() - wanted).norm() / wanted.norm())
    assert error < ALLOWED[layer.device], f"{name} computes something else: relative error {error}"


def make(layer: Layer, name: str, full: bool) -> Step | None:
    """One update of a factor like one that was checked."""
    layer = layer if full else layer.small()
    checked, timed = build(name, layer), build(name, layer)
    if checked is None or timed is None:
        return None
    check(name, layer, checked)
    return torch.no_grad()(partial(timed.update, layer.batch()))


def route(layer: Layer) -> str:
    """Which route ours takes."""
    factor = ConvInputFactor(layer.channels, layer.kernel, layer.stride, layer.padding)
    factor.update(torch.zeros(1, layer.channels, layer.side, layer.side))
    return str(factor.route)


# What the layers of ResNet-18 see of CIFAR and of ImageNet, and the same work of other kinds.
SMALL_IMAGES = [Layer(32, c, s) for c, s in ((64, 32), (128, 16), (256, 8), (512, 4))]
LARGE_IMAGES = [Layer(8, c, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))]
OTHERS = [
    Layer(32, 64, 32, stride=2),
    Layer(8, 128, 28, stride=2),
    Layer(8, 3, 224, 7, 2, 3),
    Layer(32, 64, 32, 1, 2, 0),
    Layer(32, 512, 4, 1, 1, 0),
    Layer(256, 512, 1, 1, 1, 0, linear=True),
]


def case(layer: Layer, group: Group | None = None) -> OpCase:
    lags = (LAGS,) if layer.stride == 1 and not layer.linear else ()
    return OpCase(
        "conv_input_factor",
        str(layer),
        (OURS, *lags, "naive", *PEERS),
        partial(make, layer),
        threads=1,
        aims={"naive": 1.0, **dict.fromkeys(PEERS if group else (), 4.0)},
        note=partial(route, layer),
        group=group,
    )


CASES = [case(layer, Group("batch 32", tuple(PEERS), 8)) for layer in SMALL_IMAGES]
CASES += [case(layer, Group("batch 8", tuple(PEERS), 6)) for layer in LARGE_IMAGES]
CASES += [case(layer) for layer in OTHERS]

MEASURED = SMALL_IMAGES + LARGE_IMAGES
MEMORY_AIM = 0.15
REPETITIONS = 3
# Large blocks go back when they are freed, so that the next one shows in what is resident.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "THP_MEM_ALLOC_ENABLE": "0", "OMP_NUM_THREADS": "1"}


def high_water() -> int:
    """The most bytes that were resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@torch.no_grad()
def extra(name: str, layer: Layer) -> tuple[int, int] | None:
    """Bytes that one update needs and those that it makes, in a process that has done no other.

    What it needs in any case, code that is read in above all, a small one has brought before.
    """
    small, running = build(name, layer.small()), build(name, layer)
    if small is None or running is None:
        return None
    small.update(layer.small().batch())
    x = layer.batch()
    ballast = b"\1" * max(high_water() - resident(), 0)
    before = resident()
    running.update(x)
    made = running.made()
    del ballast
    return high_water() - before - made, made


def extra_apart(name: str, number: int) -> tuple[int, int] | None:
    """The same in a process of its own, the median of some."""
    command = [sys.executable, __file__, "one", name, str(number)]
    env = os.environ | MALLOC
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    found = []
    for _ in range(REPETITIONS):
        told = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found.append(json.loads(told.stdout.splitlines()[-1]))
        if found[-1] is None:
            return None
    return int(statistics.median(need for need, _ in found)), found[0][1]


def memory() -> None:
    """Measures all ways, prints a table in MB and keeps the bytes."""
    from run import FACTS, RESULTS, file_of, versions

    from fastcil.engine.environment import environment
    from fastcil.engine.state import write_atomically

    facts = {name: value for name, value in environment("cpu").items() if name in FACTS}
    facts |= {"peers": versions(), "repetitions": REPETITIONS, "threads": 1}
    rows = []
    for number, layer in enumerate(MEASURED):
        found = {name: extra_apart(name, number) for name in (*OWN, *PEERS)}
        needs = {name: both[0] for name, both in found.items() if both}
        kept = {name: both[1] for name, both in found.items() if both and name in (OURS, LAGS)}
        rows.append({"name": str(layer), "route": route(layer), "extra": needs, "kept": kept})
        print(
            f"{layer}, MB:", *(f"{name} {need / 1e6:.1f}" for name, need in needs.items()), end=""
        )
        print("; kept:", *(f"{name} {size / 1e6:.1f}" for name, size in kept.items()))
        least = min((needs[name] for name in PEERS if name in needs), default=None)
        if least is not None:
            ratio = needs[OURS] / least
            print(f"  {ratio:.2f} of the least of the packages'", end="")
            print(f", aim {MEMORY_AIM}: MISSED" if ratio > MEMORY_AIM else "")
    content = {
        "command": "python benchmarks/bench_input_factor.py memory",
        "environment": facts,
        "layers": rows,
    }
    path = RESULTS / "memory" / file_of(facts).name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of an update.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("memory", help="measure all ways, and keep the figures")
    one = commands.add_parser("one", help="measure one, in this process")
    one.add_argument("name", choices=(*OWN, *PEERS))
    one.add_argument("number", type=int, choices=range(len(MEASURED)))
    arguments = parser.parse_args()
    if arguments.command == "memory":
        memory()
    else:
        torch.set_num_threads(1)
        print(json.dumps(extra(arguments.name, MEASURED[arguments.number])))


if __name__ == "__main__":
    main()
