"""Stretches of a buffer, brought together in another one."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_bytes(
    buffer: Tensor,
    starts: Tensor,
    lengths: Tensor,
    device: torch.device | None = None,
) -> Tensor:
    """Stretches of a buffer, one after the other in a new one.

    Args:
        buffer: uint8 [P].
        starts: int64 [N], first byte of each stretch.
        lengths: int64 [N], their bytes.
        device: Where the new buffer is to be; None for where the old one is. Nothing but the
            stretches is moved there.

    Example:
        >>> gather_bytes(torch.arange(9, dtype=torch.uint8), torch.tensor([7, 0]),
        ...              torch.tensor([2, 3])).tolist()
        [7, 8, 0, 1, 2]
    """
    targets = lengths.cumsum(0) - lengths
    # Stretches that lie together already move together, one slice for each run of them: an index
    # for every byte would take eight times the memory.
    leads = torch.ones_like(starts, dtype=torch.bool)
    leads[1:] = starts[1:] != (starts + lengths)[:-1]
    runs = torch.stack([starts[leads], targets[leads]], 1).tolist()
    gathered = torch.empty(int(lengths.sum()), dtype=buffer.dtype, device=device or buffer.device)
    stops = [target for _, target in runs[1:]] + [len(gathered)]
    for (source, target), stop in zip(runs, stops, strict=False):
        gathered[target:stop] = buffer[source : source + stop - target]
    return gathered
