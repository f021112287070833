"""The discretised Gaussian against SciPy, and the table of scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fastcil.compression.gaussian import (
    SIGMAS,
    Gaussian,
    SigmaTable,
    bounded_log_sigma,
    log_likelihood,
)


def grid() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = torch.linspace(-40, 40, 161, dtype=torch.float64)
    sigma = torch.tensor([0.1003, 0.11, 0.5, 1.0, 3.0, 20.0, 150.0], dtype=torch.float64)
    return z[:, None], torch.tensor(0.3, dtype=torch.float64), sigma


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=["f64", "f32"]
)
def test_likelihood_is_a_difference_of_cdfs_or_the_density_below(dtype, tolerance):
    z, mean, sigma = grid()
    centre = (z - mean).numpy()
    mass = norm.sf(np.abs(centre) - 0.5, scale=sigma) - norm.sf(np.abs(centre) + 0.5, scale=sigma)
    density = norm.logpdf(centre, scale=sigma)
    expected = np.where(mass < 1e-6, density, np.log(np.maximum(mass, 1e-300)))
    found = log_likelihood(z.to(dtype), mean.to(dtype), sigma.to(dtype).log()).double().numpy()
    # Around the threshold either branch will do.
    clear = np.abs(mass / 1e-6 - 1) > 1e-2
    assert (mass < 1e-6).sum() > 100 and (mass >= 1e-6).sum() > 100
    np.testing.assert_allclose(found[clear], expected[clear], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_finite_and_lead_to_the_mean(dtype):
    z = torch.tensor([-1e4, -50.0, -1.0, 0.0, 0.3, 2.0, 50.0, 1e4], dtype=dtype)
    raw = torch.full_like(z, -30.0).requires_grad_()
    mean = torch.zeros_like(z, requires_grad=True)
    log_likelihood(z, mean, bounded_log_sigma(raw)).sum().backward()
    assert mean.grad.isfinite().all() and raw.grad.isfinite().all()
    far = z.abs() > 1
    assert torch.equal(mean.grad[far].sign(), z[far].sign())


def test_gradients_are_those_of_the_value():
    z, mean, sigma = grid()
    z = z[::7].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: log_likelihood(v, mean, sigma.log()), (z,))


def test_scales_stay_above_a_tenth():
    raw = torch.linspace(-60, 60, 500, dtype=torch.float64)
    sigma = bounded_log_sigma(raw).exp()
    assert float(sigma.min()) > 0.1
    np.testing.assert_allclose(
        bounded_log_sigma(raw), np.logaddexp(0, raw.numpy() + 2.3) - 2.3, atol=1e-8
    )


@pytest.mark.parametrize("table", [SIGMAS, SigmaTable(high=256.0), SigmaTable(0.5, 2.0, 5)])
def test_index_is_that_of_the_nearest_scale(table):
    log_sigma = torch.linspace(-3, 7, 4001, dtype=torch.float64).view(1, -1)
    grid = np.log(table.low) + np.arange(table.levels) * np.log(table.high / table.low) / (
        table.levels - 1
    )
    distance = np.abs(log_sigma.numpy()[..., None] - grid)
    ties = np.sort(distance, axis=-1)
    clear = ties[..., 1] - ties[..., 0] > 1e-9
    index = table.index(log_sigma)
    assert index.dtype == torch.uint8 and index.shape == log_sigma.shape
    assert (index.numpy() == distance.argmin(-1))[clear].all()
    np.testing.assert_allclose(table.sigmas().log(), grid, atol=1e-12)
    assert table.index(log_sigma.float().mT).shape == (4001, 1)


@pytest.mark.parametrize("table", [SIGMAS, SigmaTable(high=256.0)])
def test_tables_code_at_nearly_the_likelihood(table):
    tables = table.tables()
    assert len(tables) == 64
    for row, sigma in enumerate(table.sigmas().tolist()):
        start, low = int(tables.starts[row]), int(tables.low[row])
        symbols = low + np.arange(int(tables.slots[row]) - 1)
        mass = norm.cdf(symbols + 0.5, scale=sigma) - norm.cdf(symbols - 0.5, scale=sigma)
        held = tables.frequencies[start : start + len(symbols)] / 2**24
        np.testing.assert_allclose(held, mass, atol=len(symbols) * 2.0**-24)
        assert low == -symbols[-1] and 2 * norm.sf(-low + 0.5, scale=sigma) < 1.3e-9


def test_prior_of_a_latent():
    mean, log_sigma = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    prior = Gaussian(mean, log_sigma)
    z = torch.randn(2, 3, 4, 5)
    assert torch.equal(prior.log_likelihood(z), log_likelihood(z, mean, log_sigma))
    assert torch.equal(prior.index(), SIGMAS.index(log_sigma))
