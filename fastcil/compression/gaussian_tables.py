"""The 64 tables of the Gaussian entropy models, computed exactly and kept in a file."""

from __future__ import annotations

from decimal import Context, Decimal
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastcil.compression.tables import TOTAL, Tables
from fastcil.errors import FastcilError

LOW, HIGH, LEVELS = 0.11, 20.0, 64
WIDE = 256.0
_TAIL_MASS = Decimal("1e-9")
# Of the largest scale: names of arrays in the file start so, and the tables' digest.
_SHIPPED = {
    HIGH: ("", "112f2b7d0fc88244d006bf285a0f54bbb498b897798bf77050f08c2e57e7fea1"),
    WIDE: ("wide_", "6e06a05ab1f6500e7d6b01e5cfdfc76d27eb48038b99c49e0777ac8a1f72f697"),
}
_FILE = Path(__file__).with_suffix(".npz")
# The context rounds every operation, exp and ln too, correctly: the same digits everywhere.
_EXACT = Context(prec=34)
_NEGLIGIBLE = Decimal("1e-30")
_PI = Decimal("3.1415926535897932384626433832795028842")


@lru_cache(maxsize=8)
def gaussian_tables(low: float = LOW, high: float = HIGH, levels: int = LEVELS) -> Tables:
    """The tables of N(0, sigma^2) on the integers, sigma at equal steps of its logarithm.

    Table k has ``sigma_k = low (high / low)^(k / (levels - 1))`` and gives the integer s the mass
    ``Phi((s + 1/2) / sigma_k) - Phi((s - 1/2) / sigma_k)`` in units of 2^-24, and at least one. It
    spans the fewest integers around 0 that hold 1 - 1e-9 of the mass. The default levels, and the
    tail mass, are those of the entropy model of Duan et al. (2024).

    Args:
        low: Smallest sigma.
        high: Largest sigma.
        levels: Tables, 2 to 256.

    Returns:
        The tables, of 64 scales from 0.11 to 20 or 256 read from the package, of others computed;
        the same object when asked again.

    Raises:
        FastcilError: Levels that make no sense, or a file with other tables than were shipped.

    Example:
        >>> tables = gaussian_tables()
        >>> len(tables), tables.low[[0, 31, 63]].tolist()
        (64, [-1, -9, -122])
    """
    if not (0 < low < high <= 4096 and 2 <= levels <= 256):
        raise FastcilError(
            f"low, high and levels are {low}, {high} and {levels}; they must be two numbers with "
            f"0 < low < high <= 4096, and 2 to 256."
        )
    if (low, levels) != (LOW, LEVELS) or high not in _SHIPPED:
        return compute_gaussian_tables(low, high, levels)
    prefix, digest = _SHIPPED[high]
    with np.load(_FILE, allow_pickle=False) as archive:
        reach, half = archive[f"{prefix}reach"], archive[f"{prefix}half"]
        tables = _unfolded(reach.astype(np.int32), half)
    if tables.digest.hex() != digest:
        raise FastcilError(
            f"{_FILE.name} in the package fastcil.compression is not the file that was shipped; "
            f"install fastcil again."
        )
    return tables


def compute_gaussian_tables(low: float = LOW, high: float = HIGH, levels: int = LEVELS) -> Tables:
    """What `gaussian_tables` gives, computed anew.

    All of it is decimal arithmetic to 34 digits, which no machine's libm has a part in.

    Args:
        low: Smallest sigma, at its shortest decimal spelling.
        high: Largest sigma.
        levels: Tables.
    """
    ends = Decimal(repr(float(low))), Decimal(repr(float(high)))
    step = _EXACT.divide(_EXACT.ln(_EXACT.divide(*ends[::-1])), levels - 1)
    sigmas = [
        _EXACT.multiply(ends[0], _EXACT.exp(_EXACT.multiply(step, level)))
        for level in range(levels)
    ]
    rows = [_half_row(sigma) for sigma in sigmas]
    reach = np.array([len(row) - 1 for row in rows], np.int32)
    return _unfolded(reach, np.concatenate(rows))


def _unfolded(reach: NDArray[np.int32], half: NDArray[np.int32]) -> Tables:
    """Tables from the frequencies of 0 to reach, those of the negative symbols being the same."""
    rows = []
    for row in np.split(half, np.cumsum(reach + 1)[:-1]):
        rows.append(np.concatenate([row[:0:-1], row, [1]]))
    slots = (2 * reach + 2).astype(np.int32)
    return Tables(-reach.astype(np.int32), slots, np.concatenate(rows).astype(np.int32))


def _half_row(sigma: Decimal) -> NDArray[np.int32]:
    """Frequencies of 0, 1, ... up to the last symbol of the table."""
    edges = [_EXACT.multiply(2, upper_tail(_EXACT.divide(Decimal("0.5"), sigma)))]
    while edges[-1] > _TAIL_MASS:
        edge = _EXACT.divide(2 * len(edges) + 1, _EXACT.multiply(2, sigma))
        edges.append(_EXACT.multiply(2, upper_tail(edge)))
    # Mass of -s and s together, outwards.
    masses = [_EXACT.subtract(a, b) for a, b in pairwise(edges)]
    outer = [max(round(_EXACT.multiply(mass, TOTAL // 2)), 1) for mass in masses]
    return np.array([TOTAL - 1 - 2 * sum(outer), *outer], np.int32)


def upper_tail(x: Decimal) -> Decimal:
    """1 - Phi(x), by Phi(x) = 1/2 + phi(x) (x + x^3/3 + x^5/(3 5) + ...) (Marsaglia 2004).

    Args:
        x: Not negative; to 34 digits, of which sums lose some far out.

    Example:
        >>> round(upper_tail(Decimal(1)), 6)
        Decimal('0.158655')
    """
    square = _EXACT.multiply(x, x)
    term, total, odd = x, x, 1
    while term > _NEGLIGIBLE:
        odd += 2
        term = _EXACT.divide(_EXACT.multiply(term, square), odd)
        total = _EXACT.add(total, term)
    density = _EXACT.divide(
        _EXACT.exp(_EXACT.divide(square, -2)), _EXACT.sqrt(_EXACT.multiply(2, _PI))
    )
    return _EXACT.subtract(Decimal("0.5"), _EXACT.multiply(density, total))
