"""Mixtures in integers: the probabilities they stand for, and every symbol back."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("constriction")

from fastcil.compression import mixture_coding as coding
from fastcil.compression.coder import SymbolDecoder, SymbolEncoder
from fastcil.compression.errors import BitstreamError
from fastcil.compression.mixture_coding import IntegerMixture, decode_mixture, encode_mixture

DIGEST = "4dedb0bc74cddc0d"
SIGMAS = coding.LOW * (coding.HIGH / coding.LOW) ** (np.arange(256) / 255)


def draw(count: int, components: int = 3, spread: float = 20.0, seed: int = 0) -> IntegerMixture:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(components, 0.7), count).T
    weights = np.round(shares * 4096).astype(np.int64)
    weights[0] += 4096 - weights.sum(0)
    means = np.round(rng.normal(0, spread, (components, count)) * 64).astype(np.int64)
    return IntegerMixture(weights, means, rng.integers(0, 256, (components, count)))


def mass(mixture: IntegerMixture, symbols: np.ndarray) -> np.ndarray:
    """Probability of each symbol, in float64 and by erfc."""
    phi = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))
    sigma, mean = SIGMAS[mixture.levels], mixture.means / 64
    away = -np.abs(symbols - mean)
    each = phi((away + 0.5) / sigma) - phi((away - 0.5) / sigma)
    return (mixture.weights / 4096 * each).sum(0)


def drawn_from(mixture: IntegerMixture, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    count = mixture.weights.shape[1]
    which = (rng.random(count) > (mixture.weights / 4096).cumsum(0)).sum(0).clip(max=2)
    at = which, np.arange(count)
    values = rng.normal(mixture.means[at] / 64, SIGMAS[mixture.levels[at]])
    return values.round().astype(np.int32)


def coded(mixture: IntegerMixture, symbols: np.ndarray) -> bytes:
    encoder = SymbolEncoder()
    encode_mixture(encoder, symbols, mixture)
    return encoder.finish()


def test_the_integers_are_those_of_ever() -> None:
    """A change here is a change of the format."""
    assert coding.coding_digest().hex()[:16] == DIGEST
    assert coding.reciprocals()[[0, 255]].tolist() == [19065018, 8192]
    knots = coding._knots()
    assert knots[[0, 832, 832 + 128, 1664]].tolist() == [0, 1 << 23, 14115423, 1 << 24]


def test_masses_are_the_mixtures() -> None:
    mixture = draw(300)
    symbols = drawn_from(mixture).astype(np.int64)
    edges = mixture.below(np.stack([symbols, symbols + 1], axis=1)) / 2**36
    wanted = mass(mixture, symbols)
    np.testing.assert_allclose(edges[:, 1] - edges[:, 0], wanted, rtol=2e-3, atol=3e-6)
    assert (np.diff(mixture.below(np.arange(-3000, 3000, 7)[None].repeat(300, 0))) >= 0).all()


@pytest.mark.parametrize("components", [1, 3])
def test_every_symbol_comes_back_at_its_price(components: int) -> None:
    mixture = draw(4000, components)
    symbols = drawn_from(mixture)
    data = coded(mixture, symbols)
    assert np.array_equal(decode_mixture(SymbolDecoder(data), mixture), symbols)
    bits = -np.log2(mass(mixture, symbols)).sum()
    assert len(data) == pytest.approx(bits / 8, rel=0.002, abs=2)


def test_what_no_mixture_expects_comes_back_too() -> None:
    mixture = draw(8, spread=3e4)
    limits = np.iinfo(np.int32)
    start = mixture.start[:4].astype(np.int32)
    edges = [start[0] - 1, start[1], start[2] + 4095, start[3] + 4096]
    symbols = np.array([*edges, limits.min, limits.max, 0, -70_000], np.int32)
    assert np.array_equal(decode_mixture(SymbolDecoder(coded(mixture, symbols)), mixture), symbols)
    none = draw(0)
    assert coded(none, symbols[:0]) == b"" and not len(decode_mixture(SymbolDecoder(b""), none))


def test_a_component_without_weight_is_none() -> None:
    mixture = draw(50)
    weights = np.zeros_like(mixture.weights)
    weights[1] = 4096
    alone = IntegerMixture(weights[1:2], mixture.means[1:2], mixture.levels[1:2])
    symbols = drawn_from(alone)
    assert coded(IntegerMixture(weights, mixture.means, mixture.levels), symbols) == coded(
        alone, symbols
    )


def test_any_bytes_decode_or_are_refused() -> None:
    mixture, rng = draw(200), np.random.default_rng(3)
    for _ in range(50):
        try:
            found = decode_mixture(SymbolDecoder(rng.bytes(int(rng.integers(0, 300)))), mixture)
        except BitstreamError:
            continue
        assert found.shape == (200,) and found.dtype == np.int32
