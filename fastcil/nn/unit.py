"""Norms and directions of vectors that may be zero, differentiable as often as one likes."""

from __future__ import annotations

import torch
from torch import Tensor


def vector_norms(vectors: Tensor) -> Tensor:
    """Euclidean norms along the last axis; where a vector is 0, all their derivatives are 0.

    Those of `torch.linalg.vector_norm` are NaN there from the second on, and
    `torch.nn.functional.normalize` has them too; a bilevel step needs the second.

    Args:
        vectors: Of any floating dtype.  # [..., D]

    Returns:
        float32 or better.  # [...]

    Example:
        >>> vector_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([5., 0.])
    """
    squares = _full(vectors).square().sum(-1)
    some = squares > 0
    return torch.where(some, torch.where(some, squares, 1.0).sqrt(), 0.0)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors over their norm along the last axis; a vector of 0 stays so.

    Args:
        vectors: Of any floating dtype.  # [..., D]

    Returns:
        float32 or better.  # [..., D]

    Example:
        >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    norms = vector_norms(vectors)[..., None]
    return _full(vectors) / torch.where(norms > 0, norms, 1.0)


def _full(vectors: Tensor) -> Tensor:
    """In float32 or better: many squares add up."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))
