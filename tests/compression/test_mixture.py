"""The mixture's walk: waves that see what they may, and tables kept beside the weights."""

from __future__ import annotations

import pytest
import torch

from fastcil.compression.fixed import fixed_mode
from fastcil.compression.gaussian import SigmaTable
from fastcil.compression.mixture import MaskedConv2d, _waves
from fastcil.errors import FastcilError


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (6, 1), (5, 4), (4, 9)])
def test_waves_cover_the_map_after_what_they_need(height: int, width: int) -> None:
    wave = torch.full((height, width), -1)
    for number, (rows, columns) in enumerate(_waves(height, width)):
        assert (wave[rows, columns] == -1).all()
        wave[rows, columns] = number
    assert (wave >= 0).all()
    for r in range(height):
        for c in range(width):
            above = wave[max(r - 2, 0) : r, max(c - 2, 0) : c + 3]
            assert (above < wave[r, c]).all() and (wave[r, max(c - 2, 0) : c] < wave[r, c]).all()


def test_the_context_at_positions_is_the_convolution_s() -> None:
    convolution = MaskedConv2d(3, 5).double()
    x = torch.randn(1, 3, 6, 7, dtype=torch.float64)
    framed = torch.nn.functional.pad(x[0], (2, 2, 2, 2))
    rows, columns = torch.tensor([0, 2, 5, 5]), torch.tensor([0, 3, 0, 6])
    found = convolution.at(framed, rows, columns)
    torch.testing.assert_close(found, convolution(x)[0][:, rows, columns])
    framed[:, rows + 2, columns + 2] = torch.nan
    assert convolution.at(framed, rows[1:2], columns[1:2]).isfinite().all()


def test_the_integers_are_what_the_network_says(lively, images) -> None:
    model, x = lively("gma-vr"), images(1, 128, 192)
    phases = model.begin(128, 192, 100.0)
    features = model.features(x, 100.0)
    z = phases.quantise(0, features)
    phases.feed(0, z)
    phases.prior(1)
    prior = phases._coding(0)
    y = phases.quantise(1, features)[0]
    framed = torch.nn.functional.pad(y.double(), (2, 2, 2, 2))
    rows, columns = torch.tensor([0, 3, 7]), torch.tensor([5, 0, 11])
    with fixed_mode():
        mixture = prior._mixture(framed, rows, columns)
        said = prior.entropy.parameters_of(y[None].double(), prior.state, prior.embedding)
    weights, means, raw = (part[0][..., rows, columns].flatten(1) for part in said)
    shares = torch.from_numpy(mixture.weights).double() / 4096
    torch.testing.assert_close(shares, weights.softmax(0), atol=2 / 4096, rtol=0)
    assert (mixture.weights.sum(0) == 4096).all() and mixture.weights.min() >= 0
    torch.testing.assert_close(
        torch.from_numpy(mixture.means).double() / 64, means, atol=1 / 128, rtol=0
    )
    sigmas = SigmaTable(0.11, 256.0, 256).sigmas().log()[torch.from_numpy(mixture.levels)]
    wanted = torch.nn.functional.softplus(raw + 2.3) - 2.3
    torch.testing.assert_close(sigmas, wanted.clamp_min(sigmas.min()), atol=0.02, rtol=0)


def test_y_has_no_tables(lively) -> None:
    phases = lively("gma").begin(64, 64, 100.0)
    assert len(phases.tables(0)) == 4 and len(set(phases.digests)) == 3
    with pytest.raises(FastcilError, match="y has no tables"):
        phases.tables(1)


def test_a_large_map_comes_back_in_any_batch(lively, images) -> None:
    """Weights at which contexts matter: what is wrong before spoils what comes after."""
    from fastcil.compression.coder import SymbolDecoder, SymbolEncoder

    model = lively("gma-vr")
    with torch.no_grad():
        model.entropy.context.weight.mul_(20)
    generator = torch.Generator().manual_seed(0)
    rates, symbols = torch.tensor([50.0, 900.0]), []
    walk = model.begin(100, 180, rates, 2)
    encoders = [SymbolEncoder(), SymbolEncoder()]
    for i, shape in enumerate(walk.shapes):
        walk.prior(i)
        noise = torch.randn(2, *shape, generator=generator)
        symbols.append((noise * (3, 30)[i]).round().int())
        for b, encoder in enumerate(encoders):
            walk.write(i, b, symbols[i][b].flatten().numpy(), encoder)
        walk.feed(i, symbols[i])
    for b in (1, 0):
        alone, decoder = model.begin(100, 180, float(rates[b])), SymbolDecoder(encoders[b].finish())
        for i, shape in enumerate(alone.shapes):
            found = torch.from_numpy(alone.read(i, 0, decoder)).view(1, *shape)
            assert torch.equal(found[0], symbols[i][b])
            alone.feed(i, found)
