"""Classification by the nearest class mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _full(features: Tensor) -> Tensor:
    """In float32 or better: many features add up."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Unit-norm mean of each class's unit-norm features (Rebuffi et al. 2017, Alg. 1).

    mu_y = normalise( 1/|P_y| sum over p in P_y of phi(p) / ‖phi(p)‖ )

    Args:
        features: Float [N, D].
        labels: int64 [N].
        classes: Number of rows K of the result.

    Returns:
        float32 or better [K, D]; the row of a class without features is zero.

    Example:
        >>> import torch
        >>> class_means(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]), 2)
        tensor([[0.7071, 0.7071],
                [0.0000, 0.0000]])
    """
    unit = F.normalize(_full(features), dim=1)  # [N, D]
    # A product with one-hot labels: unlike index_add_, the same bits on every run on CUDA.
    member = F.one_hot(labels.to(unit.device), classes).to(unit.dtype)  # [N, K]
    return F.normalize(member.T @ unit, dim=1)  # [K, D]


def nearest_mean_scores(features: Tensor, means: Tensor) -> Tensor:
    """Minus the squared distance to each class mean (Rebuffi et al. 2017, Eq. 2).

    s_y(x) = -‖ phi(x)/‖phi(x)‖ - mu_y ‖², which for unit vectors is 2 (cos - 1)

    Args:
        features: Float [B, D].
        means: float32 [K, D] as `class_means` makes them.

    Returns:
        float32 or better [B, K]; -inf for a class without a mean.

    Example:
        >>> import torch
        >>> means = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> nearest_mean_scores(torch.tensor([[0.0, 5.0]]), means)
        tensor([[-2., -inf]])
    """
    unit = F.normalize(_full(features), dim=1)  # [B, D]
    scores = 2.0 * (unit @ means.T) - 2.0  # [B, K]
    missing = means.square().sum(dim=1) == 0  # [K]
    return scores.masked_fill(missing, float("-inf"))
