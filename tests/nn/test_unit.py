"""Norms and directions: values, and derivatives to second order, at zero too."""

from __future__ import annotations

import pytest
import torch

from fastcil.nn.unit import unit_vectors, vector_norms


def vectors(with_zero: bool) -> torch.Tensor:
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if with_zero:
        x[1] = 0.0
    return x.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values(dtype):
    x = vectors(with_zero=True).detach().to(dtype)
    norms, units = vector_norms(x), unit_vectors(x)
    wide = torch.promote_types(dtype, torch.float32)
    assert norms.dtype == units.dtype == wide
    for row, norm, unit in zip(x.to(wide), norms, units, strict=True):
        length = sum(float(v) ** 2 for v in row) ** 0.5
        assert float(norm) == pytest.approx(length, rel=1e-6)
        assert unit.tolist() == pytest.approx([float(v) / (length or 1) for v in row], rel=1e-6)


@pytest.mark.parametrize("function", [vector_norms, unit_vectors])
def test_derivatives(function):
    x = vectors(with_zero=False)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("function", [vector_norms, unit_vectors])
def test_derivatives_are_finite_at_zero(function):
    """Those of torch's own norms are NaN from the second on."""
    x = vectors(with_zero=True)
    weights = torch.arange(1.0, 1 + function(x).numel(), dtype=torch.float64)
    (first,) = torch.autograd.grad((function(x).flatten() * weights).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert first.isfinite().all() and second.isfinite().all()
    assert not second[1].any() and second[0].any()
    if function is vector_norms:
        assert not first[1].any()
