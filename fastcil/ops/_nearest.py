"""Which sample of a line each sample shows after nearest-neighbour resizing."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fastcil.errors import FastcilError

Nearest = Literal["opencv", "pillow"]


def check_nearest(nearest: str) -> None:
    """Refuse a library that is not known."""
    if nearest not in get_args(Nearest):
        raise FastcilError(f"nearest is {nearest!r}; it must be 'opencv' or 'pillow'")


def shown(index: Tensor, source: Tensor, target: Tensor, nearest: Nearest) -> Tensor:
    r"""The samples that samples ``index`` of lines show, resized from ``source`` to ``target``.

    OpenCV's ``INTER_NEAREST`` takes sample floor(i*source/target), here without its rounding of
    source/target, which changes nothing between a side and its half, rounded down. Pillow's
    ``NEAREST`` takes floor((i + 1/2)*source/target), but adds up the step source/target, rounded to
    float64, from sample to sample: where the exact place is a whole number, rounding decides.

    Args:
        index: int64 [K] or [N, K], at least 0 and, for Pillow, below the largest target.
        source: int64 [N].
        target: int64 [N], at least 1.
        nearest: whose.

    Returns:
        int64 [N, K].
    """
    source, target = source[:, None], target[:, None]
    if nearest == "opencv":
        return index * source // target
    index = index.expand(len(source), -1)
    # Where sums are added one after the other: a GPU adds them in a tree.
    step = (source.double() / target.double()).cpu()
    length = int(index.max()) + 1 if index.numel() else 0
    places = torch.cat([step / 2, step.expand(-1, max(length - 1, 0))], 1).cumsum(1).long()
    return places.to(index.device).gather(1, index)
