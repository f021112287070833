"""Gaussian mixtures for the range coder: all that decides a probability is integers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from decimal import Context, Decimal
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fastcil.compression.coder import SymbolDecoder, SymbolEncoder
from fastcil.compression.gaussian_tables import upper_tail
from fastcil.compression.tables import PRECISION, TOTAL

MEAN_STEPS = 64
"""A mean is kept in steps of 1/64."""
WEIGHT_BITS = 12
"""Weights sum up to 2^12."""
# Knots of the normal distribution: so many for each sigma, out to so many sigmas.
_KNOTS, _REACH = 128, 6.5
_FRACTION = 20
_SPAN = int(_KNOTS * _REACH)
# Symbols next to the mixture's heaviest component, found in three steps of sixteen.
_WIDTHS = (256, 16, 1)
_SIXTEEN = 16
_HALF = 2048
# Further out than the coded window, and less than what overflows.
_FAR = 1 << 20
_FARTHEST_MEAN = 1 << 24
_EXACT = Context(prec=34)


@dataclass(frozen=True)
class IntegerMixture:
    r"""A mixture of K Gaussians for each of N symbols, in integers.

    .. math:: C(s) = \sum_k W_k \, \Phi_{24}\Big(\frac{64 s - 32 - M_k}{64} \, R_k\Big), \qquad
        \sum_k W_k = 2^{12}

    is 2^36 times the probability of what lies below s - 1/2 (Cheng et al. 2020, Eq. 9, with
    weights, means and scales on a grid). Φ24 interpolates between knots of 2^24 Φ that are computed
    to 34 digits, linearly and in integers, 128 of them for each σ; R is 1/σ as a fraction of
    integers. So every processor gets the same C.

    Args:
        weights: W, int64 [K, N].
        means: M, int64 [K, N]: means in 1/64.
        levels: int64 [K, N]: row of `reciprocals`.

    Example:
        >>> weights, means = np.array([[4096]]), np.array([[64]])
        >>> mixture = IntegerMixture(weights, means, np.array([[255]]))  # sigma is 256
        >>> (mixture.below(np.array([[-255, 1, 257]])) / 2**36).round(2).tolist()
        [[0.16, 0.5, 0.84]]
    """

    weights: NDArray[np.int64]
    means: NDArray[np.int64]
    levels: NDArray[np.int64]

    @property
    def start(self) -> NDArray[np.int64]:
        """The first of the 4096 symbols, int64 [N], around the mean of greatest weight."""
        heaviest = self.weights.argmax(0)[None]
        centre: NDArray[np.int64] = np.take_along_axis(self.means, heaviest, 0)[0] >> 6
        return centre - _HALF

    def below(self, symbols: NDArray[np.int64]) -> NDArray[np.int64]:
        """C at integers: int64 [N, E] of int64 [N, E]."""
        knots, scales = _knots(), reciprocals()[self.levels]
        edges = MEAN_STEPS * symbols - MEAN_STEPS // 2
        total = np.zeros_like(edges)
        limit = _SPAN << _FRACTION
        for weight, mean, scale in zip(self.weights, self.means, scales, strict=True):
            # Within 2^20 steps, and a scale of at most 2^25, there is no overflow.
            distance = (edges - mean[:, None]).clip(-_FAR, _FAR)
            place = (distance * scale[:, None]).clip(-limit, limit - 1)
            knot = (place >> _FRACTION) + _SPAN
            part = place & ((1 << _FRACTION) - 1)
            value = knots[knot]
            value += ((knots[knot + 1] - value) * part) >> _FRACTION
            total += value * weight[:, None]
        return total

    def select(self, chosen: NDArray[np.bool_]) -> IntegerMixture:
        """The mixtures of some symbols."""
        return IntegerMixture(
            self.weights[:, chosen], self.means[:, chosen], self.levels[:, chosen]
        )


def encode_mixture(
    encoder: SymbolEncoder, symbols: NDArray[np.int32], mixture: IntegerMixture
) -> None:
    """Appends symbols, each with probabilities of its own.

    Which sixteenth of 4096 integers around the mean a symbol lies in, which sixteenth of that, and
    which of the sixteen integers left, all symbols at once; by the chain rule that costs what the
    mixture says. What lies outside is an escape of the first step, as it is of a table.

    Args:
        encoder: Where to.
        symbols: int32 [N].
        mixture: Of these N.

    Example:
        >>> ones = np.ones((1, 3), np.int64)
        >>> mixture = IntegerMixture(4096 * ones, 64 * ones, 20 * ones)
        >>> encoder = SymbolEncoder()
        >>> encode_mixture(encoder, np.array([1, -3, 9000], np.int32), mixture)
        >>> decode_mixture(SymbolDecoder(encoder.finish()), mixture).tolist()
        [1, -3, 9000]
    """
    start = mixture.start
    offset = symbols.astype(np.int64) - start
    inside = (offset >= 0) & (offset < 2 * _HALF)
    first = np.where(inside, offset // _WIDTHS[0], _SIXTEEN)
    _put(encoder, first, _frequencies(mixture, start, _WIDTHS[0], escape=True))
    kept, place, low = mixture.select(inside), offset[inside], start[inside]
    for wide, width in pairwise(_WIDTHS):
        low = low + place // wide * wide
        place = place % wide
        _put(encoder, place // width, _frequencies(kept, low, width))
    if not inside.all():
        edges = [(x[~inside]).astype(np.int32) for x in (start, start + 2 * _HALF - 1)]
        encoder.encode_outside(symbols[~inside], *edges)


def decode_mixture(decoder: SymbolDecoder, mixture: IntegerMixture) -> NDArray[np.int32]:
    """The symbols, int32 [N], that `encode_mixture` appended.

    Raises:
        BitstreamError: Bytes that no encoder wrote with this mixture.
    """
    start = mixture.start
    slots = _take(decoder, _frequencies(mixture, start, _WIDTHS[0], escape=True))
    inside = slots < _SIXTEEN
    kept, low = mixture.select(inside), start[inside] + slots[inside] * _WIDTHS[0]
    for width in _WIDTHS[1:]:
        low = low + _take(decoder, _frequencies(kept, low, width)) * width
    symbols = np.empty(start.shape, np.int32)
    symbols[inside] = low
    if not inside.all():
        edges = [(x[~inside]).astype(np.int32) for x in (start, start + 2 * _HALF - 1)]
        symbols[~inside] = decoder.decode_outside(*edges)
    return symbols


def _frequencies(
    mixture: IntegerMixture, low: NDArray[np.int64], width: int, escape: bool = False
) -> NDArray[np.int64]:
    """Of sixteen ranges of a width from ``low`` on, and of what lies outside: [N, 16 or 17]."""
    edges = mixture.below(low[:, None] + width * np.arange(_SIXTEEN + 1))
    mass = np.diff(edges, axis=1)
    if escape:
        outside = (1 << (PRECISION + WEIGHT_BITS)) - (edges[:, -1:] - edges[:, :1])
        mass = np.concatenate([mass, outside], axis=1)
    total = mass.sum(1, keepdims=True)
    # Where a tail has no mass left, any range is as good as another.
    mass += total == 0
    rows = 1 + mass * (TOTAL - mass.shape[1]) // np.maximum(total, mass.shape[1] * (total == 0))
    rows[np.arange(len(rows)), rows.argmax(1)] += TOTAL - rows.sum(1)
    return rows


def _put(encoder: SymbolEncoder, slots: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
    if len(slots):
        encoder.encode_rows(slots.astype(np.int32), rows)


def _take(decoder: SymbolDecoder, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    slots = decoder.decode_rows(rows) if len(rows) else np.zeros(0, np.int32)
    return slots.astype(np.int64)


LOW, HIGH, LEVELS = 0.11, 256.0, 256
"""Scales of the components: so many at equal steps of their logarithm."""


@lru_cache(maxsize=1)
def reciprocals() -> NDArray[np.int64]:
    """R of each scale: knots per 1/64, in 2^-20; int64 [256]."""
    low, high = Decimal(repr(LOW)), Decimal(repr(HIGH))
    step = _EXACT.divide(_EXACT.ln(_EXACT.divide(high, low)), LEVELS - 1)
    scale = Decimal((_KNOTS << _FRACTION) // MEAN_STEPS)
    sigmas = [
        _EXACT.multiply(low, _EXACT.exp(_EXACT.multiply(step, level))) for level in range(LEVELS)
    ]
    return np.array([round(_EXACT.divide(scale, sigma)) for sigma in sigmas], np.int64)


@lru_cache(maxsize=1)
def _knots() -> NDArray[np.int64]:
    """2^24 Φ(j / 128) for j from -832 to 832; int64 [1665]."""
    half = [
        round(_EXACT.multiply(TOTAL, upper_tail(_EXACT.divide(j, _KNOTS))))
        for j in range(1, _SPAN + 1)
    ]
    upper = np.array(half, np.int64)
    return np.concatenate([upper[::-1], [TOTAL // 2], TOTAL - upper])


@lru_cache(maxsize=1)
def coding_digest() -> bytes:
    """SHA-256 of all integers that mixtures are coded by, the same on every machine."""
    constants = [_KNOTS, _FRACTION, MEAN_STEPS, WEIGHT_BITS, *_WIDTHS]
    parts = [np.array(constants), reciprocals(), _knots()]
    return hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in parts)).digest()
