"""Gradients kept from opposing those of earlier tasks, and functions that have a given gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.nn.quadratic import minimize_above

# Columns that are in float64 at a time.
_BLOCK = 2**16


@torch.no_grad()
def project_gradient(
    gradient: Tensor, constraints: Tensor, margin: float = 0.0, ridge: float = 0.0
) -> Tensor:
    r"""The nearest gradient that opposes none of some others (Lopez-Paz and Ranzato 2017).

    .. math:: \tilde g = g \ \text{ if } G g \ge 0, \quad \text{else} \quad g + G^\top v, \qquad
        v = \arg\min_{v \ge m} \tfrac12 v^\top (G G^\top + \epsilon I) v + (G g)^\top v

    (their Sec. 3.) With :math:`m = \epsilon = 0` the quadratic programme is the dual of
    :math:`\min_{\tilde g} \lVert \tilde g - g \rVert^2` subject to :math:`G \tilde g \ge 0`.
    Inner products and the dual (`minimize_above`) are in float64, whatever the gradients are.
    Nothing waits for the device.

    Args:
        gradient: g.  # [P]
        constraints: G, a gradient in each row.  # [n, P]
        margin: m.
        ridge: epsilon.

    Returns:
        The projected gradient, of the dtype of g.  # [P]

    Raises:
        FastcilError: The shapes do not fit.

    Example:
        >>> project_gradient(torch.tensor([1.0, -1.0]), torch.tensor([[0.0, 2.0]]))
        tensor([1., 0.])
    """
    if constraints.ndim != 2 or constraints.shape[1:] != gradient.shape:
        raise FastcilError(
            f"gradient is {tuple(gradient.shape)} and constraints {tuple(constraints.shape)}; "
            f"pass [P] and [n, P]."
        )
    rows = len(constraints)
    if not rows:
        return gradient
    gram, along = _products(constraints, gradient)
    ridged = gram + ridge * torch.eye(rows, dtype=gram.dtype, device=gram.device)
    v = minimize_above(ridged, along, torch.full_like(along, margin))
    # In place autocast lets the dtype be.
    moved = gradient.clone().addmv_(constraints.T, v.to(gradient.dtype))
    return torch.where((along < 0).any(), moved, gradient)


@torch.no_grad()
def remove_opposing(gradient: Tensor, reference: Tensor) -> Tensor:
    r"""The nearest gradient that does not oppose a single one (Chaudhry et al. 2019, Sec. 4).

    .. math:: \tilde g = g - \min\!\Big(\frac{g^\top r}{r^\top r},\, 0\Big)\, r

    In float64; nothing waits for the device.

    Args:
        gradient: g.  # [P]
        reference: r.  # [P]

    Returns:
        The projected gradient, of the dtype of g.  # [P]

    Raises:
        FastcilError: The shapes differ.

    Example:
        >>> remove_opposing(torch.tensor([1.0, -1.0]), torch.tensor([0.0, 2.0]))
        tensor([1., 0.])
    """
    if gradient.ndim != 1 or gradient.shape != reference.shape:
        raise FastcilError(
            f"gradient is {tuple(gradient.shape)} and reference {tuple(reference.shape)}; "
            f"both must be the same [P]."
        )
    g, r = gradient.double(), reference.double()
    along = torch.dot(g, r)
    share = torch.where(along < 0, along / torch.dot(r, r), 0.0)
    return (g - share * r).to(gradient.dtype)


def with_gradient(parameters: Sequence[Tensor], gradient: Tensor) -> Tensor:
    r"""A function of the parameters that has a given gradient: their inner product with it.

    Args:
        parameters: With P entries in all.
        gradient: As `flat_gradient` has it.  # [P]

    Example:
        >>> a = torch.ones(2, requires_grad=True)
        >>> with_gradient([a], torch.tensor([3.0, 4.0])).backward()
        >>> a.grad
        tensor([3., 4.])
    """
    pieces = gradient.split([p.numel() for p in parameters])
    terms = [(p * g.view(p.shape)).sum() for p, g in zip(parameters, pieces, strict=True)]
    return torch.stack(terms).sum()


def _products(constraints: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """G G^T [n, n] and G g [n] in float64, some columns at a time."""
    rows = len(constraints)
    products = gradient.new_zeros(rows + 1, rows + 1, dtype=torch.float64)
    block = products.new_empty(rows + 1, min(_BLOCK, len(gradient)))
    for part, g in zip(constraints.split(_BLOCK, 1), gradient.split(_BLOCK), strict=True):
        both = block[:, : len(g)]
        both[:rows], both[rows] = part, g
        products.addmm_(both, both.T)
    return products[:rows, :rows], products[:rows, rows]
