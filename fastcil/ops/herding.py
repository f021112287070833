"""Herding of many classes at once: in what order each one's images become its exemplars."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.ops._library import define

# Unit vectors' squared distances that differ by less are the same but for rounding; features
# themselves are float32, good to 1e-7.
TIE = 1e-10


def _herding(features: Tensor, starts: Tensor, limit: int) -> Tensor:
    """Reference of the op: one pick of every class at a time."""
    sizes = starts.diff()  # [K]
    longest = int(sizes.max()) if len(sizes) else 0
    order = torch.full((len(sizes), limit), -1, dtype=torch.int64, device=features.device)
    if longest == 0:
        return order
    place = torch.arange(longest, device=features.device)
    there = place < sizes[:, None]  # [K, M]
    rows = torch.where(there, starts[:-1, None] + place, 0)
    unit = functional.normalize(features.double(), dim=1)  # [N, D]
    unit = unit[rows] * there[..., None]  # [K, M, D]
    mean = unit.sum(1) / sizes.clamp(min=1)[:, None]  # [K, D]
    own = unit.square().sum(2).masked_fill(~there, torch.inf)  # [K, M], infinite once picked
    residual = mean.clone()  # [K, D], k mu - sum of the picks
    for k in range(min(limit, longest)):
        score = torch.baddbmm(own[..., None], unit, residual[..., None], alpha=-2)[..., 0]
        least = score.amin(1, keepdim=True)  # [K, 1]
        pick = (score <= least + TIE).to(torch.uint8).argmax(1, keepdim=True)  # [K, 1]
        order[:, k : k + 1] = torch.where(least.isinf(), -1, pick)
        own.scatter_(1, pick, torch.inf)
        residual += mean - unit.gather(1, pick[..., None].expand(-1, -1, unit.shape[2]))[:, 0]
    return order


def _fake(features: Tensor, starts: Tensor, limit: int) -> Tensor:
    return starts.new_empty((starts.shape[0] - 1, limit))


define(
    "herding(Tensor features, Tensor starts, int limit) -> Tensor",
    _herding,
    _fake,
    kernel="fastcil.kernels.herding:herding",
)


def herding(features: Tensor, starts: Tensor, limit: int) -> Tensor:
    r"""The order in which herding picks the images of each class.

    With :math:`v_i` the features of a class at unit norm and :math:`\mu` their mean, step k picks
    the image not yet picked that brings the mean of the picks nearest to :math:`\mu`:

    .. math:: p_k = \arg\min_i \Big\| \mu - \tfrac1k \Big(v_i + \sum_{j<k} v_{p_j}\Big) \Big\|

    (Rebuffi et al. 2017, Alg. 4; Welling 2009). Since only comparison counts, the squared norm
    times k^2 is minimised, less what all candidates share: ``|v_i|^2 - 2 <v_i, k mu - sum of the
    picks>``. Everything accumulates in float64; of candidates equal but for rounding the first is
    picked. Not differentiable.

    Args:
        features: Of all images, those of a class one after the other, of any floating dtype; a
            zero row stays zero.  # [N, D]
        starts: The first row of each class, and N.  # int64 [K + 1]
        limit: Number of picks of each class.

    Returns:
        Positions within the class, -1 where it has no more images; a shorter order is a prefix of
        a longer.  # int64 [K, limit]

    Raises:
        FastcilError: Features that are not a floating matrix, starts that are not int64 on the
            same device, or a negative limit.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
        >>> herding(features, torch.tensor([0, 3, 4]), 2)
        tensor([[ 2,  0],
                [ 0, -1]])
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise FastcilError(
            f"features is {features.dtype} {list(features.shape)}; pass a floating [N, D]."
        )
    if starts.ndim != 1 or len(starts) == 0 or starts.dtype != torch.int64:
        raise FastcilError(
            f"starts is {starts.dtype} {list(starts.shape)}; pass int64 [K + 1], the first row of "
            f"each class and their number."
        )
    if starts.device != features.device:
        raise FastcilError(f"starts is on {starts.device}; it must be on {features.device}.")
    if limit < 0:
        raise FastcilError(f"limit is {limit}; it must be at least 0.")
    order: Tensor = torch.ops.fastcil.herding(features, starts, limit)
    return order
