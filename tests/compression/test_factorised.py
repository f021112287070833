"""GDN and the factorised density against their equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil.compression.factorised import Factorised, FactorisedDensity
from fastcil.compression.gdn import GDN
from fastcil.errors import FastcilError


@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_is_its_equation(inverse):
    torch.manual_seed(0)
    gdn = GDN(3, inverse).double()
    gdn.beta_root.data.uniform_(0.5, 1.5)
    gdn.gamma_root.data.uniform_(0.0, 1.0)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    found = gdn(x)
    beta = gdn.beta_root.detach() ** 2 - 2.0**-36
    gamma = gdn.gamma_root.detach() ** 2 - 2.0**-36
    norm = torch.empty_like(x)
    for b, i, u, v in np.ndindex(2, 3, 2, 2):
        norm[b, i, u, v] = (
            beta[i] + sum(gamma[i, j] * x[b, j, u, v] ** 2 for j in range(3))
        ).sqrt()
    torch.testing.assert_close(found, x * norm if inverse else x / norm)


def test_gdn_starts_diagonal_and_every_entry_can_learn():
    gdn = GDN(4)
    gdn(torch.randn(2, 4, 3, 3)).square().sum().backward()
    assert (gdn.gamma_root.grad != 0).sum() > 4
    with torch.no_grad():
        gdn.beta_root.fill_(-1.0)
        gdn.gamma_root.fill_(-1.0)
    assert gdn(torch.randn(2, 4, 3, 3)).isfinite().all()


def spread(channels: int) -> FactorisedDensity:
    torch.manual_seed(0)
    density = FactorisedDensity(channels).double()
    for parameter in density.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return density


def test_density_is_its_equation():
    density = spread(2)
    x = torch.linspace(-30, 30, 41, dtype=torch.float64)
    found = density.logits(x.expand(2, -1)).detach().numpy()
    for c in range(2):
        for n, value in enumerate(x.tolist()):
            y = np.array([value])
            for k in range(4):
                matrix = density.matrices[k][c].detach().numpy()
                y = np.logaddexp(0, matrix) @ y + density.biases[k][c, :, 0].detach().numpy()
                if k < 3:
                    gate = density.gates[k][c, :, 0].detach().numpy()
                    y = y + np.tanh(gate) * np.tanh(y)
            assert found[c, n] == pytest.approx(y[0], abs=1e-10)


def test_density_is_a_distribution_on_integers():
    density = spread(3)
    z = torch.arange(-4000, 4001, dtype=torch.float64).view(1, 1, -1, 1).expand(1, 3, -1, -1)
    mass = density.log_likelihood(z).exp().detach()
    # The floor of 1e-9 adds a little to each of the 8001 integers.
    torch.testing.assert_close(mass.sum((0, 2, 3)), torch.ones(3).double(), atol=1e-5, rtol=0)
    assert float(mass.min()) >= 1e-9 * (1 - 1e-6)


def test_tables_hold_the_densities():
    density = spread(3)
    with pytest.raises(FastcilError, match="no tables yet"):
        density.tables()
    assert density.make_tables() and not density.make_tables()
    tables = density.tables()
    assert len(tables) == 3
    for c in range(3):
        start = int(tables.starts[c])
        symbols = int(tables.low[c]) + torch.arange(int(tables.slots[c]) - 1).double()
        z = symbols.view(1, 1, -1, 1).expand(1, 3, -1, -1)
        mass = density.log_likelihood(z).exp()[0, c, :, 0].detach().numpy()
        held = tables.frequencies[start : start + len(symbols)] / 2**24
        np.testing.assert_allclose(held, mass, atol=2.0**-22 + 3e-9 + len(symbols) * 2.0**-24)
        assert mass.sum() > 1 - 3e-9 * len(symbols)
        beyond = density.log_likelihood(
            torch.tensor([symbols[0] - 2, symbols[-1] + 2])
            .double()
            .view(1, 1, -1, 1)
            .expand(1, 3, -1, -1)
        ).exp()[0, c]
        assert float(beyond.detach().max()) < 2e-9


def test_tables_of_very_narrow_and_very_wide_densities():
    narrow, wide = FactorisedDensity(1), FactorisedDensity(1)
    with torch.no_grad():
        for matrix in narrow.matrices:
            matrix.fill_(20.0)
        for bias in narrow.biases:
            bias.zero_()
        wide.matrices[0].fill_(-25.0)
    assert int(narrow.computed_tables().slots[0]) <= 4
    assert int(wide.computed_tables().slots[0]) > 10_000


def test_index_is_the_channel():
    prior = Factorised(FactorisedDensity(5), torch.zeros(2, 5, 3, 4))
    index = prior.index()
    assert index.dtype == torch.uint8 and index.shape == (2, 5, 3, 4)
    assert all((index[:, c] == c).all() for c in range(5))
    with pytest.raises(FastcilError, match="256"):
        FactorisedDensity(257)


def test_gradients_are_finite_far_away():
    density = FactorisedDensity(2)
    z = torch.tensor([-1e4, 0.0, 1e4]).view(1, 1, 3, 1).expand(1, 2, 3, 1).clone().requires_grad_()
    density.log_likelihood(z).sum().backward()
    assert z.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in density.parameters())
