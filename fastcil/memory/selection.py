"""Which images of a class become its exemplars: an order, of which memory keeps a prefix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastcil.errors import FastcilError

# Unit vectors' squared distances that differ by less are the same but for rounding; features
# themselves are float32, good to 1e-7.
_TIE = 1e-10


def herding(features: Tensor, limit: int) -> Tensor:
    """The order in which herding picks the images of one class.

    With v_i the features at unit norm and mu their mean, step k picks the image not yet picked
    that brings the mean of the picks nearest to mu (Rebuffi et al. 2017, Alg. 4; Welling 2009):

        p_k = argmin_i || mu - (v_i + sum_{j<k} v_{p_j}) / k ||.

    Since only comparison counts, the squared norm times k^2 is minimised, less what all
    candidates share: ``|v_i|^2 - 2 <v_i, k mu - sum_{j<k} v_{p_j}>``. Everything accumulates in
    float64; of candidates equal but for rounding the first is picked. Nothing waits for the
    device between the picks.

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
    if features.ndim != 2 or not features.is_floating_point():
        raise FastcilError(
            f"features is {features.dtype} {list(features.shape)}; pass a floating [N, D]."
        )
    if limit < 0:
        raise FastcilError(f"limit is {limit}; it must be at least 0.")
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).any(dim=1).sum())
        raise FastcilError(
            f"features has {bad} of {len(features)} rows with NaN or infinity; training has "
            f"diverged: lower the learning rate or clip gradients."
        )
    picks = min(limit, len(features))
    if picks == 0:
        return torch.empty(0, dtype=torch.int64, device=features.device)
    unit = functional.normalize(features.double(), dim=1)  # [N, D]
    mean = unit.mean(dim=0)  # [D]
    own = unit.square().sum(dim=1)  # [N], infinite once picked
    residual = mean.clone()  # [D], k mu - sum of the picks
    order = []
    for _ in range(picks):
        score = torch.add(own, unit @ residual, alpha=-2)  # [N]
        nearest = score <= score.amin() + _TIE
        pick = nearest.to(torch.uint8).argmax(dim=0, keepdim=True)  # [1]
        order.append(pick)
        own.index_fill_(0, pick, torch.inf)
        residual += mean - unit.index_select(0, pick).squeeze(0)
    return torch.cat(order)


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
