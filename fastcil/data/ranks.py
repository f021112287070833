"""Where each image stands among those of its class."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_in_class(labels: Tensor) -> Tensor:
    """How many images of the same class come before each one.

    Args:
        labels: int64 [N], not negative, on the CPU.

    Returns:
        int64 [N].

    Example:
        >>> rank_in_class(torch.tensor([4, 0, 4, 4, 0]))
        tensor([0, 0, 1, 2, 1])
    """
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    first = counts.cumsum(0) - counts  # [K]
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return rank
