from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastcil import ops
from fastcil.nn import fit_rational

GRID = torch.linspace(-3, 3, 601, dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "degrees", "version", "error"),
    [
        (torch.tanh, (3, 3), "A", 2e-3),
        (functional.silu, (5, 4), "A", 1e-5),
        (functional.gelu, (5, 4), "B", 2e-3),
        (functional.gelu, (5, 4), "C", 2e-3),
        (torch.sin, (5, 4), "nonsafe", 1e-4),
        (lambda x: x.relu(), (0, 1), "A", 3.0),
    ],
)
def test_errors_are_those_of_the_op(function, degrees, version, error):
    fit = fit_rational(function, degrees, version)
    assert (len(fit.numerator) - 1, len(fit.denominator)) == degrees
    residual = (ops.pade(GRID, fit.numerator, fit.denominator, version) - function(GRID)).abs()
    assert residual.max() < error
    assert float(residual.max()) == pytest.approx(fit.max_error, rel=1e-6, abs=1e-12)
    assert float(residual.square().mean().sqrt()) == pytest.approx(fit.rms_error, rel=1e-6)


@pytest.mark.parametrize("version", ["A", "B", "C", "nonsafe"])
def test_a_rational_function_is_found_again(version):
    a = torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64)
    b = torch.tensor([0.3, 0.7], dtype=torch.float64)
    fit = fit_rational(lambda x: ops.pade(x, a, b, version), (2, 2), version, (-2.0, 4.0))
    assert fit.max_error < 1e-9


@pytest.mark.parametrize("version", ["A", "B"])
def test_no_small_change_fits_better(version):
    fit = fit_rational(torch.relu, (5, 4), version)

    def cost(a, b):
        return float((ops.pade(GRID, a, b, version) - GRID.relu()).square().sum())

    best = cost(fit.numerator, fit.denominator)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        a = fit.numerator * (1 + 1e-3 * torch.randn(6, generator=generator, dtype=torch.float64))
        b = fit.denominator * (1 + 1e-3 * torch.randn(4, generator=generator, dtype=torch.float64))
        assert cost(a, b) >= best


def test_the_same_input_gives_the_same_coefficients():
    first = fit_rational(torch.tanh, (3, 3), "B")
    for size in (1, 100, 10_001):
        # Other addresses for what the fit allocates.
        held = torch.zeros(size)
        again = fit_rational(torch.tanh, (3, 3), "B")
        assert torch.equal(first.numerator, again.numerator)
        assert torch.equal(first.denominator, again.denominator)
        del held


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.relu, (-1, 4)), "degrees is"),
        ((torch.relu, (5, 0)), "degrees is"),
        ((torch.relu, (5, 4), "D"), "version is 'D'"),
        ((torch.relu, (5, 4), "A", (3.0, 3.0)), "interval is"),
        ((torch.log, (5, 4)), "function is not finite on the interval"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_rational(*arguments)
