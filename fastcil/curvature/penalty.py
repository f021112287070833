"""Quadratic penalties on the displacement of weights, with their gradient at no further cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.nn.eager import eager

Product = Callable[[Tensor], Tensor]
"""A symmetric linear map of one displacement."""


class _HalfQuadratic(torch.autograd.Function):
    """Value 1/2 sum <D, H D>, of which the gradient H D is there already."""

    @staticmethod
    def forward(ctx: Any, products: Sequence[Product], *displacements: Tensor) -> Tensor:
        gradients = [product(d) for product, d in zip(products, displacements, strict=True)]
        ctx.products = products
        ctx.save_for_backward(*displacements, *gradients)
        terms = [torch.sum(d * g) for d, g in zip(displacements, gradients, strict=True)]
        return 0.5 * torch.stack(terms).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        count = len(ctx.products)
        displacements, gradients = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if torch.is_grad_enabled():
            # Somebody differentiates again.
            gradients = [p(d) for p, d in zip(ctx.products, displacements, strict=True)]
        return (None, *(outer[0] * gradient for gradient in gradients))


@eager
def half_quadratic(displacements: Sequence[Tensor], products: Sequence[Product]) -> Tensor:
    r"""The value of a quadratic form whose gradient costs nothing more.

    .. math:: L = \tfrac12 \sum_l \langle D_l, H_l D_l \rangle, \qquad
        \nabla_{D_l} L = H_l D_l

    Every :math:`H_l D_l` is computed once, for the value, and kept for the backward pass; autograd
    would compute it again from both sides. Differentiable as often as the maps are; autocast does
    not touch it, and torch.compile leaves it as it is.

    Args:
        displacements: D, one tensor for each map.
        products: H, symmetric linear maps.

    Returns:
        L.  # []

    Raises:
        FastcilError: Not as many maps as displacements, or none.

    Example:
        >>> d = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> value = half_quadratic([d], [lambda x: 3 * x])
        >>> value.backward()
        >>> value.detach(), d.grad
        (tensor(7.5000), tensor([3., 6.]))
    """
    if len(displacements) != len(products) or not products:
        raise FastcilError(
            f"displacements has {len(displacements)} tensors for {len(products)} products; pass "
            f"one each, and at least one."
        )
    with torch.autocast(displacements[0].device.type, enabled=False):
        value: Tensor = _HalfQuadratic.apply(tuple(products), *displacements)
    return value


def kronecker_product(terms: Sequence[tuple[Tensor, Tensor]]) -> Product:
    r"""D -> sum of G D A over pairs (A, G): the Kronecker product A ⊗ G on vec(D).

    Args:
        terms: Symmetric A [n, n] and G [m, m], or with leading groups; D is [(groups,) m, n]. G
            None is the identity.
    """

    def product(d: Tensor) -> Tensor:
        parts = [_between(output, d, inner) for inner, output in terms]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    return product


def _between(output: Tensor, d: Tensor, inner: Tensor) -> Tensor:
    """G D A, the smaller product first."""
    if output.shape[-1] <= inner.shape[-1]:
        return (output @ d) @ inner
    return output @ (d @ inner)


def diagonal_product(values: Tensor) -> Product:
    """D -> values * D."""
    return lambda d: values * d


def eigen_product(input_basis: Tensor, output_basis: Tensor, values: Tensor) -> Product:
    r"""D -> U_G (S * (U_Gᵀ D U_A)) U_Aᵀ: a matrix with eigenvectors U_A ⊗ U_G, eigenvalues S.

    Args:
        input_basis: U_A, eigenvectors in columns.  # [(groups,) n, n]
        output_basis: U_G.  # [(groups,) m, m]
        values: S.  # [(groups,) m, n]
    """

    def product(d: Tensor) -> Tensor:
        inside = values * (output_basis.mT @ d @ input_basis)
        return output_basis @ inside @ input_basis.mT

    return product
