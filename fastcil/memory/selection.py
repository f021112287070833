"""Which images of a class become its exemplars: an order, of which memory keeps a prefix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastcil import ops
from fastcil.errors import FastcilError


def herding(features: Tensor, limit: int) -> Tensor:
    """The order in which herding picks the images of one class (`fastcil.ops.herding`).

    Memory asks class by class, so that never more than one class lies there encoded.

    Args:
        features: [N, D] of any floating dtype; a zero row stays zero.
        limit: Number of picks; more than N means N.

    Returns:
        int64 [min(limit, N)], on the features' device; a shorter order is a prefix of a longer.

    Raises:
        FastcilError: Features that are not a floating matrix or not finite; a negative limit.

    Example:
        >>> herding(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), 2)
        tensor([2, 0])
    """
    starts = torch.tensor([0, len(features)], device=features.device)
    order = ops.herding(features, starts, min(limit, len(features)))[0]
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).any(dim=1).sum())
        raise FastcilError(
            f"features has {bad} of {len(features)} rows with NaN or infinity; training has "
            f"diverged: lower the learning rate or clip gradients."
        )
    return order


def random_order(count: int, generator: torch.Generator) -> Tensor:
    """A random order of ``count`` images, int64 [count], on the CPU.

    Example:
        >>> sorted(random_order(3, torch.Generator().manual_seed(0)).tolist())
        [0, 1, 2]
    """
    return torch.randperm(count, generator=generator)


def _herding(
    count: int, features: Callable[[], Tensor], limit: int, generator: torch.Generator
) -> Tensor:
    """Herding on the features."""
    return herding(features(), limit)


def _random(
    count: int, features: Callable[[], Tensor], limit: int, generator: torch.Generator
) -> Tensor:
    """Without looking at the features, which are then never computed."""
    return random_order(count, generator)[:limit]


SELECTIONS: dict[str, Callable[[int, Callable[[], Tensor], int, torch.Generator], Tensor]] = {
    "herding": _herding,
    "random": _random,
}
"""Name -> function of (images N, their features [N, D] when asked for, picks, generator)."""
