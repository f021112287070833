"""Symbols to bytes and back: a range coder over integer tables, without a loop over symbols."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcil.compression.errors import BitstreamError
from fastcil.compression.tables import PRECISION, TOTAL, Tables, settled
from fastcil.errors import FastcilError

_WORD = 4
_CHUNK = 16
# Zeros at the end that need not be written: more would take from the decoder's sense of the end.
_SPARED = 16


class SymbolEncoder:
    """Range encoder of integer symbols (Martin 1979; Bamler 2022), to be fed group after group.

    Any int32 can be encoded. What its table does not hold is coded as the table's escape, and
    afterwards its distance d >= 1 from the table by an Elias gamma code: the number n of bits after
    the leading one, in about n + 1 bits, then these n and a sign as they are.

    Raises:
        FastcilError: The package constriction is not installed.

    Example:
        >>> tables = Tables.from_cdf([-1], [np.array([0.0, 0.25, 0.75, 1.0])])
        >>> encoder, index = SymbolEncoder(), np.zeros(3, np.uint8)
        >>> encoder.encode(np.array([1, 0, 7], np.int32), index, tables)
        >>> data = encoder.finish()
        >>> SymbolDecoder(data).decode(index, tables).tolist(), len(data)
        ([1, 0, 7], 5)
    """

    def __init__(self) -> None:
        self._stream = _constriction().stream
        self._encoder = self._stream.queue.RangeEncoder()

    def encode(self, symbols: NDArray[np.int32], index: NDArray[Any], tables: Tables) -> None:
        """Append symbols.

        Args:
            symbols: int32 [N].
            index: Integers [N], the table of each symbol.
            tables: The tables.

        Raises:
            TypeError: Symbols or index of another dtype.
            FastcilError: Arrays of other shapes, or an index without a table.
        """
        if symbols.dtype != np.int32:
            raise TypeError(f"symbols is {symbols.dtype}; it must be int32.")
        order, counts = _grouped(index, tables)
        if symbols.shape != order.shape:
            raise FastcilError(
                f"symbols has shape {symbols.shape} and index {order.shape}; both must be [N]."
            )
        ordered = symbols[order]
        escape = np.repeat(tables.slots - 1, counts)
        # Modulo 2^32, so that what lies below the table is beyond its end too.
        slots = ordered.view(np.uint32) - np.repeat(tables.low.view(np.uint32), counts)
        escaped = (slots >= escape.view(np.uint32)).nonzero()[0]
        slots = slots.view(np.int32)
        slots[escaped] = escape[escaped]
        for table, span in _spans(counts):
            self._encoder.encode(slots[span], _models(tables)[table])
        if escaped.size:
            low = np.repeat(tables.low, counts)[escaped]
            self.encode_outside(ordered[escaped], low, low + (escape[escaped] - 1))

    def encode_rows(self, slots: NDArray[np.int32], frequencies: NDArray[np.int64]) -> None:
        """Append one of S slots each.

        Args:
            slots: int32 [N], 0 to S - 1.
            frequencies: int64 [N, S], at least 1, of which each row sums up to 2^24.
        """
        self._encoder.encode(slots, _rows_model(), _weights(frequencies))

    def encode_outside(
        self, symbols: NDArray[np.int32], low: NDArray[np.int32], high: NDArray[np.int32]
    ) -> None:
        """Append what lies outside low to high, int32 [N] each."""
        values = symbols.astype(np.int64)
        below = values < low
        distance = np.where(below, low - values, values - high)
        bits = np.frexp(distance.astype(np.float64))[1].astype(np.int64) - 1
        tail = 2 * (distance - (1 << bits)) + below  # bits + 1 of them
        first = np.minimum(bits + 1, _CHUNK)
        self._encoder.encode(bits.astype(np.int32), _gamma_model())
        self._encode_bits(tail & ((1 << first) - 1), first)
        rest = (bits + 1 > _CHUNK).nonzero()[0]
        if rest.size:
            self._encode_bits(tail[rest] >> _CHUNK, bits[rest] + 1 - _CHUNK)

    def _encode_bits(self, values: NDArray[np.int64], bits: NDArray[np.int64]) -> None:
        """Append numbers of 1 to 16 bits as they are."""
        sizes = (1 << bits).astype(np.int32)
        self._encoder.encode(values.astype(np.int32), self._stream.model.Uniform(), sizes)

    def finish(self) -> bytes:
        """The bytes of all symbols so far; more may be appended, and `finish` called again.

        They are the fewest that lie in the coder's last interval, but that at most 16 zeros are
        left away at the end. A decoder that reads zeros beyond the end needs no more, and by their
        number knows what symbols can't have been coded (`SymbolDecoder`).
        """
        words = self._encoder.get_compressed().astype(">u4").tobytes()
        position, (lower, width) = self._encoder.pos()
        head, tail = words[: position * _WORD], words[position * _WORD :]
        if int.from_bytes(tail.ljust(8, b"\0"), "big") < lower:
            # The coder carried into the words before: zeros lie in the interval as well.
            tail = b""
        else:
            for length in range(9):
                unit = 1 << (64 - 8 * length)
                point = -(-lower // unit) * unit
                if point - lower < width and point < 1 << 64:
                    tail = point.to_bytes(8, "big")[:length]
                    break
        data = head + tail
        return data[: max(len(data.rstrip(b"\0")), len(data) - _SPARED)]


class SymbolDecoder:
    r"""The counterpart of `SymbolEncoder`.

    It decodes any bytes, in time and memory that the number of symbols bounds: what it makes of
    bytes that no encoder wrote are some symbols or an error.

    A few bytes are not taken for many symbols: n symbols of frequencies f leave the encoder an
    interval of at most

    .. math:: 2^{-b}, \qquad b = \sum_{i=1}^{n} (24 - \log_2 f_i)

    and of its b bits it leaves away up to one word, which is in its state, and 16 zero bytes. Once
    b is more than that beyond the bytes there are, no encoder wrote them, and what comes after need
    not be looked at; with bytes that an encoder did write it never is.

    Args:
        data: What `SymbolEncoder.finish` gave.

    Raises:
        FastcilError: The package constriction is not installed.
    """

    def __init__(self, data: bytes) -> None:
        self._stream = _constriction().stream
        padded = data + bytes(-len(data) % _WORD)
        words = np.frombuffer(padded, ">u4").astype(np.uint32)
        self._decoder = self._stream.queue.RangeDecoder(words)
        # One bit for the rounding of logarithms.
        self._bits_left = 8.0 * (len(data) + _WORD + _SPARED) + 1

    def decode(self, index: NDArray[Any], tables: Tables) -> NDArray[np.int32]:
        """The next symbols.

        Args:
            index: Integers [N], the table of each symbol, the same as in encoding.
            tables: The same tables as in encoding.

        Returns:
            The symbols, int32 [N].

        Raises:
            TypeError: An index of another dtype.
            FastcilError: An index of another shape or without a table.
            BitstreamError: Bytes that no encoder wrote with these tables.
        """
        order, counts = _grouped(index, tables)
        slots = np.empty(order.size, np.int32)
        for table, span in _spans(counts):
            slots[span] = self._take(_models(tables)[table], span.stop - span.start)
        self._spend(tables.costs[np.repeat(tables.starts, counts) + slots])
        low = np.repeat(tables.low, counts)
        ordered = slots + low
        escape = np.repeat(tables.slots - 1, counts)
        escaped = (slots == escape).nonzero()[0]
        if escaped.size:
            ordered[escaped] = self.decode_outside(low[escaped], ordered[escaped] - 1)
        symbols = np.empty_like(ordered)
        symbols[order] = ordered
        return symbols

    def decode_rows(self, frequencies: NDArray[np.int64]) -> NDArray[np.int32]:
        """The next slots, int32 [N], of `SymbolEncoder.encode_rows`.

        Raises:
            BitstreamError: As `decode`.
        """
        slots = self._take(_rows_model(), _weights(frequencies))
        taken = np.take_along_axis(frequencies, slots[:, None].astype(np.int64), 1)
        self._spend(PRECISION - np.log2(taken))
        return slots

    def decode_outside(self, low: NDArray[np.int32], high: NDArray[np.int32]) -> NDArray[np.int32]:
        """The next symbols, int32 [N], that lie outside low to high.

        Raises:
            BitstreamError: As `decode`.
        """
        bits = self._take(_gamma_model(), low.size).astype(np.int64)
        self._spend(PRECISION - np.log2(_gamma_frequencies()[bits]) + bits + 1)
        tail = self._take_bits(np.minimum(bits + 1, _CHUNK))
        rest = (bits + 1 > _CHUNK).nonzero()[0]
        if rest.size:
            tail[rest] += self._take_bits(bits[rest] + 1 - _CHUNK) << _CHUNK
        distance = (1 << bits) + (tail >> 1)
        values = np.where(tail & 1, low - distance, high + distance)
        limits = np.iinfo(np.int32)
        if (values < limits.min).any() or (values > limits.max).any():
            raise BitstreamError("The payload holds a symbol beyond 32 bits; it is damaged.")
        return values.astype(np.int32)

    def _take_bits(self, bits: NDArray[np.int64]) -> NDArray[np.int64]:
        """The next numbers of 1 to 16 bits."""
        sizes = (1 << bits).astype(np.int32)
        return self._take(self._stream.model.Uniform(), sizes).astype(np.int64)

    def _spend(self, bits: NDArray[Any]) -> None:
        """Counts what symbols cost, and stops where the bytes can't have held them."""
        self._bits_left -= float(bits.sum())
        if self._bits_left < 0:
            raise BitstreamError(
                "The payload is shorter than the symbols that it is said to hold; it is damaged, "
                "or of a smaller image."
            )

    def _take(self, model: Any, amount: Any) -> NDArray[np.int32]:
        try:
            return self._decoder.decode(model, amount)
        except AssertionError as error:
            raise BitstreamError("The payload does not decode; it is damaged.") from error


def information(symbols: NDArray[np.int32], index: NDArray[Any], tables: Tables) -> float:
    """Bits that symbols take under tables: what `SymbolEncoder` gets to within a few bytes.

    Args:
        symbols: int32 [N].
        index: Integers [N], the table of each symbol.
        tables: The tables.

    Returns:
        The sum over symbols of -log2 of their probability.

    Example:
        >>> tables = Tables.from_cdf([-1], [np.array([0.0, 0.25, 0.75, 1.0])])
        >>> round(information(np.array([1, 0], np.int32), np.zeros(2, np.uint8), tables), 4)
        3.0
    """
    low, escape = tables.low.astype(np.int64)[index], tables.slots.astype(np.int64)[index] - 1
    slots = symbols - low
    outside = (slots < 0) | (slots >= escape)
    bits = tables.costs[tables.starts[index] + np.where(outside, escape, slots)].sum()
    distance = np.where(slots < 0, -slots, slots - escape + 1)[outside]
    tail = np.frexp(distance.astype(np.float64))[1] - 1
    return float(bits + (PRECISION - np.log2(_gamma_frequencies()[tail]) + tail + 1).sum())


def _grouped(index: NDArray[Any], tables: Tables) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The order that brings the symbols of each table together, and how many each has."""
    if index.dtype.kind not in "ui":
        raise TypeError(f"index is {index.dtype}; it must be integers, such as uint8.")
    if index.ndim != 1:
        raise FastcilError(f"index has shape {index.shape}; it must be [N].")
    if index.size and (int(index.max()) >= len(tables) or int(index.min()) < 0):
        raise FastcilError(
            f"index goes from {index.min()} to {index.max()}; there are tables 0 to "
            f"{len(tables) - 1}."
        )
    # Of narrow integers NumPy's stable order is a radix sort.
    narrow = index.astype(np.uint8 if len(tables) <= 256 else np.int32, copy=False)
    return narrow.argsort(kind="stable"), np.bincount(narrow, minlength=len(tables))


def _spans(counts: NDArray[np.intp]) -> Iterator[tuple[int, slice]]:
    """The tables that are used, and where their symbols lie."""
    ends = counts.cumsum()
    for table in counts.nonzero()[0].tolist():
        yield table, slice(int(ends[table] - counts[table]), int(ends[table]))


def _constriction() -> ModuleType:
    try:
        import constriction
    except ImportError as error:
        raise FastcilError(
            "The learned codec codes its symbols by the package constriction, which is not "
            "installed; pip install 'constriction>=0.5,<0.6'."
        ) from error
    return constriction


def _model(frequencies: NDArray[np.int32]) -> Any:
    """A distribution of constriction's with exactly these frequencies.

    It gives each of n symbols one unit of 2^-24 and shares the other 2^24 - n out by the weights
    passed. Weights that sum up to just that are scaled by 1.0, and no rounding is left.
    """
    weights = (frequencies - 1).astype(np.float64)
    return _constriction().stream.model.Categorical(weights, perfect=False)


@lru_cache(maxsize=1)
def _rows_model() -> Any:
    """Distributions that come with the symbols, a row each; scaled as those of `_model`."""
    return _constriction().stream.model.Categorical(perfect=False)


def _weights(frequencies: NDArray[np.int64]) -> NDArray[np.float64]:
    """What `_model` says."""
    return np.ascontiguousarray(frequencies - 1, np.float64)


@lru_cache(maxsize=16)
def _models(tables: Tables) -> list[Any]:
    return [_model(row) for row in np.split(tables.frequencies, tables.starts[1:])]


@lru_cache(maxsize=1)
def _gamma_frequencies() -> NDArray[np.int32]:
    """Frequencies of 0 to 31 bits after the leading one: 1/2, 1/4, 1/8, ..."""
    return settled(np.maximum(TOTAL >> np.arange(1, 33), 1))


@lru_cache(maxsize=1)
def _gamma_model() -> Any:
    return _model(_gamma_frequencies())
