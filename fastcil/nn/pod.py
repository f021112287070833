"""The losses of PODNet (Douillard et al. 2020): what is distilled, and the classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.nn.unit import unit_vectors, vector_norms


def nca(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Neighbourhood components analysis over proxies, as PODNet's released code computes it.

    .. math:: L = \frac{1}{B} \sum_i \Big( -z_y
        + \log \big( e^{\max_j z_j} + \sum_{j \ne y} e^{z_j} \big) \Big)

    with z = z_i, y = y_i (after Goldberger et al. 2005; Movshovitz-Attias et al. 2017). The margin
    of Douillard et al. 2020, Sec. 3.2, is subtracted from every class there, which has no effect,
    and where the paper leaves the own class out of the sum its slot holds the largest of all
    logits, e^0 once that is subtracted. `margin_nca` is the paper's.

    Args:
        logits: z, the scale eta included.  # [B, K]
        labels: y.  # int64 [B]

    Returns:
        The mean over the batch, float32 or better; at least 0.  # []

    Example:
        >>> nca(torch.zeros(1, 3), torch.tensor([1]))  # log 3
        tensor(1.0986)
    """
    logits, own = _full(logits), labels[:, None]
    slots = logits.scatter(1, own, logits.max(1, keepdim=True).values)  # [B, K]
    return (slots.logsumexp(1) - logits.gather(1, own)[:, 0]).mean()


def margin_nca(logits: Tensor, labels: Tensor, margin: float | Tensor) -> Tensor:
    r"""Neighbourhood components analysis over proxies with a margin and a hinge.

    .. math:: L = \frac{1}{B} \sum_i \Big[ -\log
        \frac{e^{z_y - m}}{\sum_{j \ne y} e^{z_j}} \Big]_+ , \qquad m = \eta \delta

    (Douillard et al. 2020, Sec. 3.2).

    Args:
        logits: z, the scale eta included.  # [B, K]
        labels: y.  # int64 [B]
        margin: m, the scale eta included.

    Returns:
        The mean over the batch, float32 or better; 0 where there is only one class.  # []

    Example:
        >>> margin_nca(torch.zeros(1, 3), torch.tensor([1]), margin=0.5)  # 0.5 + log 2
        tensor(1.1931)
    """
    logits, own = _full(logits), labels[:, None]
    # Not infinity: without other classes its derivatives would be NaN.
    others = logits.scatter(1, own, torch.finfo(logits.dtype).min)  # [B, K]
    return (others.logsumexp(1) - logits.gather(1, own)[:, 0] + margin).relu().mean()


def pod_flat(features: Tensor, teacher_features: Tensor) -> Tensor:
    r"""Distance of features from a teacher's: the mean of 1 - cos(f, f_old).

    (Douillard et al. 2020, Sec. 3.1, POD-flat, as it was released.) A vector of 0 has the cosine
    0 with every other.

    Args:
        features: f.  # [B, D]
        teacher_features: f_old.  # [B, D]

    Returns:
        float32 or better.  # []

    Raises:
        FastcilError: If the shapes differ.

    Example:
        >>> pod_flat(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 3.0]]))  # 1 - sqrt(1/2)
        tensor(0.2929)
    """
    _check(features, teacher_features, "features")
    return 1 - (unit_vectors(features) * unit_vectors(teacher_features)).sum(1).mean()


def pod_spatial(maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    r"""Distance of intermediate maps from a teacher's, pooled over their width and their height.

    .. math:: L = \frac{1}{L B} \sum_{l, i} \| u(h_{l,i}) - u(h^{old}_{l,i}) \| , \qquad
        u(h) = \frac{v}{\|v\|} , \quad
        v = \Big[ \sum_w h^2_{c,y,w} \Big]_{c,y} \oplus \Big[ \sum_y h^2_{c,y,w} \Big]_{c,w}

    (Douillard et al. 2020, Sec. 3.1, POD-spatial, as it was released: squares are pooled, both
    pools normalised as one vector, and the distance isn't squared; the last map counts too.)

    Args:
        maps: One per stage of the network.  # each [B, C, h, w]
        teacher_maps: The teacher's.

    Returns:
        float32 or better.  # []

    Raises:
        FastcilError: If the numbers of maps or their shapes differ, or there is none.

    Example:
        >>> pod_spatial([torch.ones(2, 3, 4, 4)], [5 * torch.ones(2, 3, 4, 4)])
        tensor(0.)
    """
    if not maps or len(maps) != len(teacher_maps):
        raise FastcilError(
            f"maps holds {len(maps)} and teacher_maps {len(teacher_maps)}; there must be as many, "
            f"and at least one."
        )
    distances = []
    for own, old in zip(maps, teacher_maps, strict=True):
        _check(own, old, "maps")
        distances.append(vector_norms(_pooled(own) - _pooled(old)).mean())
    return torch.stack(distances).mean()


def _pooled(maps: Tensor) -> Tensor:
    """Direction of the squares summed over width and over height: [B, C, h, w] -> [B, C (h+w)]."""
    squares = _full(maps).square()
    return unit_vectors(torch.cat([squares.sum(3), squares.sum(2)], 2).flatten(1))


def _check(own: Tensor, teacher: Tensor, name: str) -> None:
    """Raises unless two tensors have the same shape."""
    if own.shape != teacher.shape:
        raise FastcilError(
            f"{name} is {tuple(own.shape)} and the teacher's {tuple(teacher.shape)}; both must be "
            f"the same."
        )


def _full(values: Tensor) -> Tensor:
    """In float32 or better: many squares, or exponentials, add up."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
