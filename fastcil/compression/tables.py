"""Integer probability tables: what the entropy coder and decoder must agree on to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcil.errors import FastcilError

PRECISION = 24
TOTAL = 1 << PRECISION
# So that what lies outside a table fits 32 bits, and a table its index.
_MAX_SYMBOL = 1 << 20
_MAX_SLOTS = 1 << 16
_DTYPES = {"low": np.int32, "slots": np.int32, "frequencies": np.int32}


@dataclass(frozen=True, eq=False)
class Tables:
    """T distributions of integer symbols, each with frequencies that sum up to 2^24.

    Table t gives the symbols ``low[t], low[t] + 1, ..., low[t] + slots[t] - 2`` a frequency each,
    and all other integers together that of its last slot, the escape. A symbol of frequency f
    costs ``24 - log2(f)`` bits.

    Args:
        low: int32 [T], the least symbol of each table, within 2^20 of zero.
        slots: int32 [T], symbols of each table and its escape: 2 to 65,536.
        frequencies: int32 [sum of slots], table after table, each at least 1.

    Raises:
        TypeError: An array of another dtype.
        FastcilError: Arrays that do not fit together, or frequencies with another sum.

    Example:
        >>> tables = Tables.from_cdf([-1], [np.array([0.0, 0.25, 0.75, 1.0])])
        >>> tables.frequencies.tolist()  # of -1, 0 and 1, and of the rest
        [4194304, 8388607, 4194304, 1]
        >>> len(tables), tables.digest.hex()[:16]
        (1, '945c2c456752f99a')
    """

    low: NDArray[np.int32]  # [T]
    slots: NDArray[np.int32]  # [T]
    frequencies: NDArray[np.int32]  # [sum of slots]

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            if getattr(self, name).dtype != dtype:
                raise TypeError(f"{name} is {getattr(self, name).dtype}; it must be int32.")
        if self.low.ndim != 1 or self.low.shape != self.slots.shape or not self.low.size:
            raise FastcilError(
                f"low and slots have shapes {self.low.shape} and {self.slots.shape}; both must be "
                f"[T], with T at least 1."
            )
        if (np.abs(self.low.astype(np.int64)) > _MAX_SYMBOL).any():
            raise FastcilError(f"low goes beyond ±{_MAX_SYMBOL}; a table must start within that.")
        if (self.slots < 2).any() or (self.slots > _MAX_SLOTS).any():
            raise FastcilError(
                f"slots goes from {self.slots.min()} to {self.slots.max()}; a table must have 2 to "
                f"{_MAX_SLOTS}, its escape among them."
            )
        if self.frequencies.shape != (int(self.slots.sum(dtype=np.int64)),):
            raise FastcilError(
                f"frequencies has shape {self.frequencies.shape}; it must be "
                f"[{int(self.slots.sum(dtype=np.int64))}], the sum of slots."
            )
        sums = np.add.reduceat(self.frequencies.astype(np.int64), self.starts)
        if (self.frequencies < 1).any() or (sums != TOTAL).any():
            raise FastcilError(
                f"frequencies must be at least 1 and sum up to {TOTAL} in each table; table "
                f"{int((sums != TOTAL).argmax())} sums up to {int(sums[(sums != TOTAL).argmax()])}."
            )

    def __len__(self) -> int:
        return len(self.low)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tables) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each table begins in ``frequencies``, int64 [T]."""
        return np.cumsum(self.slots, dtype=np.int64) - self.slots

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the tables, the same on every machine."""
        parts = [np.array([PRECISION, len(self)]), self.low, self.slots, self.frequencies]
        return hashlib.sha256(b"".join(part.astype("<i4").tobytes() for part in parts)).digest()

    @cached_property
    def costs(self) -> NDArray[np.float64]:
        """Bits of each slot, float64 [sum of slots]; an escape's without the number after it."""
        return PRECISION - np.log2(self.frequencies)

    def state(self) -> dict[str, NDArray[np.int32]]:
        """The arrays, by name: what to keep with a model that has learned its tables."""
        return {name: getattr(self, name) for name in _DTYPES}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tables:
        """The tables whose `state` it was.

        Raises:
            FastcilError: An array that is missing, or that does not fit the others.
        """
        missing = [name for name in _DTYPES if name not in state]
        if missing:
            raise FastcilError(f"state has no {missing[0]!r}; pass what Tables.state() gave.")
        return cls(**{name: np.ascontiguousarray(state[name]) for name in _DTYPES})

    @classmethod
    def from_cdf(cls, low: Sequence[int], cdf: Sequence[NDArray[np.float64]]) -> Tables:
        """Tables of a factorised prior, one per channel (Ballé et al. 2018, appendix 6.1).

        The symbol ``low[t] + k`` has the mass ``cdf[t][k + 1] - cdf[t][k]``; what lies below
        ``cdf[t][0]`` and above ``cdf[t][-1]`` is the escape's. Frequencies are rounded to the
        nearest integer and to at least 1, and the most frequent symbol takes up what is left.

        Args:
            low: The least symbol of each table.
            cdf: float64 [symbols + 1] each, the cumulative distribution at the symbols' edges,
                ``low - 1/2, low + 1/2, ...``.

        Raises:
            FastcilError: A CDF that falls, leaves 0..1, or gives a table less than one symbol.
        """
        if len(low) != len(cdf) or not len(low):
            raise FastcilError(
                f"low has {len(low)} entries and cdf {len(cdf)}; give both one per table, of one "
                f"table at least."
            )
        rows = [_integer_row(np.asarray(edges, np.float64), t) for t, edges in enumerate(cdf)]
        slots = np.array([len(row) for row in rows], np.int32)
        return cls(np.array(low, np.int32), slots, np.concatenate(rows))


def _integer_row(edges: NDArray[np.float64], table: int) -> NDArray[np.int32]:
    """One table's frequencies, of its symbols and its escape."""
    mass = np.diff(edges)
    inside = edges.ndim == 1 and 2 <= edges.size <= _MAX_SLOTS
    if not (inside and edges[0] >= 0 and edges[-1] <= 1 and (mass >= 0).all()):
        raise FastcilError(
            f"cdf of table {table} must be 2 to {_MAX_SLOTS} numbers that rise from 0 or above to "
            f"1 or below."
        )
    share = np.append(mass, max(1.0 - mass.sum(), 0.0))
    row = np.maximum(np.rint(share * TOTAL), 1).astype(np.int64)
    return settled(row)


def settled(row: NDArray[np.int64]) -> NDArray[np.int32]:
    """Frequencies near the sum that they must have, with the greatest taking up the difference.

    Example:
        >>> settled(np.array([TOTAL, 5, 1])).tolist()
        [16777210, 5, 1]
    """
    row = row.copy()
    row[row.argmax()] += TOTAL - row.sum()
    return row.astype(np.int32)
