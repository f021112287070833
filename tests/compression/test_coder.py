"""The range coder: any int32 comes back, at the size that the tables foretell."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastcil.compression.coder import SymbolDecoder, SymbolEncoder, information
from fastcil.compression.errors import BitstreamError
from fastcil.compression.gaussian_tables import gaussian_tables
from fastcil.compression.tables import TOTAL, Tables
from fastcil.errors import FastcilError

pytest.importorskip("constriction")
pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

TABLES = gaussian_tables()
SIGMAS = 0.11 * (20 / 0.11) ** (np.arange(64) / 63)
INT32 = st.integers(-(1 << 31), (1 << 31) - 1)
# Near the table's edges and the edges of the 16-bit chunks, or anything.
SYMBOLS = st.one_of(st.integers(-3, 3), st.integers(-140, 140), INT32)
GROUPS = st.lists(st.lists(st.tuples(SYMBOLS, st.integers(0, 63)), max_size=20), max_size=4)


def encode(symbols: np.ndarray, index: np.ndarray, tables: Tables = TABLES) -> bytes:
    encoder = SymbolEncoder()
    encoder.encode(symbols, index, tables)
    return encoder.finish()


def draw(count: int, centre: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Symbols of the distributions that their tables describe."""
    rng = np.random.default_rng(seed)
    index = rng.normal(centre, 9, count).clip(0, 63).astype(np.uint8)
    return np.rint(rng.normal(0, SIGMAS[index])).astype(np.int32), index


@given(GROUPS)
def test_any_groups_come_back(groups: list[list[tuple[int, int]]]) -> None:
    encoder, arrays, bits = SymbolEncoder(), [], 0.0
    for group in groups:
        symbols = np.array([symbol for symbol, _ in group], np.int32)
        index = np.array([table for _, table in group], np.uint8)
        encoder.encode(symbols, index, TABLES)
        arrays.append((symbols, index))
        bits += information(symbols, index, TABLES)
    data = encoder.finish()
    assert len(data) <= bits / 8 + 3
    decoder = SymbolDecoder(data)
    for symbols, index in arrays:
        np.testing.assert_array_equal(decoder.decode(index, TABLES), symbols)


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("symbol", [-(1 << 31), (1 << 31) - 1, -2, 2, 65537, -65538])
def test_nothing_but_escapes(symbol: int, size: int) -> None:
    symbols, index = np.full(size, symbol, np.int32), np.zeros(size, np.uint8)
    data = encode(symbols, index)
    np.testing.assert_array_equal(SymbolDecoder(data).decode(index, TABLES), symbols)
    # Less where the last bits are zeros, which need not be written.
    assert len(data) <= information(symbols, index, TABLES) / 8 + 3


@pytest.mark.parametrize("shift", [-(1 << 20), 1 << 20, 12345])
def test_extremes_of_shifted_tables(shift: int) -> None:
    tables = Tables.from_cdf([shift], [np.array([0.0, 0.5, 1.0])])
    values = [shift - 1, shift, shift + 1, shift + 2, 0, -(1 << 31), (1 << 31) - 1]
    symbols, index = np.array(values, np.int32), np.zeros(len(values), np.uint8)
    decoded = SymbolDecoder(encode(symbols, index, tables)).decode(index, tables)
    np.testing.assert_array_equal(decoded, symbols)


@pytest.mark.parametrize("centre", [-5.0, 10.0, 30.0, 60.0])
def test_size_is_the_information(centre: float) -> None:
    symbols, index = draw(20_000, centre, seed=3)
    data = encode(symbols, index)
    wanted = information(symbols, index, TABLES) / 8
    # The coder's own loss is far below 1 %: nothing is rounded a second time.
    assert wanted - 3 <= len(data) <= wanted * 1.0002 + 3
    np.testing.assert_array_equal(SymbolDecoder(data).decode(index, TABLES), symbols)


@pytest.mark.parametrize("table", [0, 20, 40, 63])
def test_every_frequency_is_taken_as_it_is(table: int) -> None:
    """From the coder's own state: an encoded symbol narrows the interval by its frequency."""
    row = np.split(TABLES.frequencies, TABLES.starts[1:])[table]
    for slot, frequency in enumerate(row[:-1].tolist()):
        encoder = SymbolEncoder()
        symbol = np.array([TABLES.low[table] + slot], np.int32)
        encoder.encode(symbol, np.array([table]), TABLES)
        _, (_, width) = encoder._encoder.pos()
        scale = (2**64 - 1) >> 24
        assert width in (scale * frequency, (scale * frequency) << 32)


def test_information_is_that_of_the_tables() -> None:
    tables = Tables.from_cdf([-1], [np.array([0.0, 0.25, 0.75, 1.0])])
    index = np.zeros(1, np.uint8)
    gamma = [1 / 2 - 7 / TOTAL, 1 / 4, 1 / 8]
    for symbol, bits in [(-1, 2), (0, 1), (1, 2)]:
        got = information(np.array([symbol], np.int32), index, tables)
        assert got == pytest.approx(bits, abs=1e-6)
    # Distances 1 to 7 outside: the class by the gamma code's tables, its bits, and a sign.
    for symbol, n in [(2, 0), (-2, 0), (3, 1), (-4, 1), (5, 2), (8, 2), (-8, 2)]:
        got = information(np.array([symbol], np.int32), index, tables)
        assert got == pytest.approx(24 - np.log2(gamma[n]) + n + 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_more_tables_than_a_byte_counts(dtype: type) -> None:
    count = 200 if dtype is np.uint8 else 300
    tables = Tables.from_cdf(list(range(count)), [np.array([0.0, 0.5, 1.0])] * count)
    index = np.random.default_rng(0).integers(0, count, 500).astype(dtype)
    symbols = index.astype(np.int32) + 1
    data = encode(symbols, index, tables)
    np.testing.assert_array_equal(SymbolDecoder(data).decode(index, tables), symbols)
    assert len(data) == pytest.approx(500 / 8, abs=3)


def test_threads_do_not_matter() -> None:
    parts = [draw(3000, 25.0, seed) for seed in range(6)]
    one = [encode(*part) for part in parts]
    with ThreadPoolExecutor(2) as pool:
        two = list(pool.map(lambda part: encode(*part), parts))
        back = list(pool.map(lambda d, p: SymbolDecoder(d).decode(p[1], TABLES), two, parts))
    assert one == two
    for decoded, (symbols, _) in zip(back, parts, strict=True):
        np.testing.assert_array_equal(decoded, symbols)


def test_golden_bytes() -> None:
    """A change here is a change of the format: streams that exist would no longer decode."""
    symbols = np.array([0, 1, -1, 3, -7, 40, -122, 123, 70_000, -(1 << 31)], np.int32)
    index = np.array([0, 0, 5, 20, 33, 63, 63, 63, 10, 2], np.uint8)
    data = encode(symbols, index)
    golden = "ffffcffffee50f911dfffff928fb07b196dd3d84fffffff0c1ea27917f86017d"
    assert data.hex() == golden
    np.testing.assert_array_equal(SymbolDecoder(data).decode(index, TABLES), symbols)


def test_the_encoder_goes_on_after_finish() -> None:
    symbols, index = draw(100, 30.0, seed=1)
    encoder = SymbolEncoder()
    encoder.encode(symbols[:50], index[:50], TABLES)
    assert encoder.finish() == encode(symbols[:50], index[:50])
    encoder.encode(symbols[50:], index[50:], TABLES)
    decoder = SymbolDecoder(encoder.finish())
    np.testing.assert_array_equal(decoder.decode(index[:50], TABLES), symbols[:50])
    np.testing.assert_array_equal(decoder.decode(index[50:], TABLES), symbols[50:])


def test_any_bytes_decode_or_are_refused() -> None:
    rng = np.random.default_rng(0)
    index = rng.integers(0, 64, 200).astype(np.uint8)
    for length in range(300):
        # Ones in front lead into the last slots, the escapes.
        data = b"\xff" * (length % 3) + rng.bytes(length // 3)
        try:
            symbols = SymbolDecoder(data).decode(index, TABLES)
        except BitstreamError:
            continue
        assert symbols.dtype == np.int32
        assert symbols.shape == index.shape


@pytest.mark.parametrize("edges", [[0.0, 0.5, 1.0], [0.0, 0.999, 1.0], [0.0, 0.01, 0.5, 1.0]])
@pytest.mark.parametrize("count", [1, 7, 300, 5000])
def test_what_ends_in_zeros_is_no_less_decoded(edges: list[float], count: int) -> None:
    """Symbols of the first slots alone: every bit of them is a zero."""
    tables, index = Tables.from_cdf([0], [np.array(edges)]), np.zeros(count, np.uint8)
    symbols = np.zeros(count, np.int32)
    data = encode(symbols, index, tables)
    assert not any(data)
    assert len(data) <= max(information(symbols, index, tables) / 8 + 3 - 16, 0)
    np.testing.assert_array_equal(SymbolDecoder(data).decode(index, tables), symbols)
    symbols[0] = 1  # then a number that the zeros follow
    data = encode(symbols, index, tables)
    np.testing.assert_array_equal(SymbolDecoder(data).decode(index, tables), symbols)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 400)), max_size=6))
def test_runs_of_first_and_last_slots_come_back(runs: list[tuple[int, int]]) -> None:
    """Carries and zeros where the coder's words end."""
    tables = Tables.from_cdf([0], [np.array([0.0, 0.3, 0.31, 0.9999, 1.0])])
    symbols = np.concatenate([[0], *(np.full(n, s) for s, n in runs)]).astype(np.int32)
    index = np.zeros(len(symbols), np.uint8)
    encoder = SymbolEncoder()
    encoder.encode(symbols, index, tables)
    rows = np.tile([TOTAL - 3, 1, 1, 1], (len(symbols), 1))
    encoder.encode_rows(symbols, rows)
    decoder = SymbolDecoder(encoder.finish())
    np.testing.assert_array_equal(decoder.decode(index, tables), symbols)
    np.testing.assert_array_equal(decoder.decode_rows(rows), symbols)


@pytest.mark.parametrize("length", [0, 1, 10, 100])
def test_more_symbols_than_bytes_can_hold_are_refused(length: int) -> None:
    """After as many as they hold, and 20 bytes' worth of what follows."""
    index = np.full(64, 40, np.uint8)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        decoder, bits = SymbolDecoder(rng.bytes(length)), 0.0
        with pytest.raises(BitstreamError, match="payload"):
            for _ in range(100):
                bits += information(decoder.decode(index, TABLES), index, TABLES)
        assert bits <= 8 * (length + 20) + 1
        outside = SymbolDecoder(rng.bytes(length))
        with pytest.raises(BitstreamError, match="payload"):
            for _ in range(100):
                outside.decode_outside(*np.zeros((2, 64), np.int32))
        rows = SymbolDecoder(rng.bytes(length))
        with pytest.raises(BitstreamError, match="shorter than the symbols"):
            for _ in range(100):
                rows.decode_rows(np.full((64, 4), TOTAL // 4))


def test_bad_arguments() -> None:
    symbols, index = draw(4, 30.0, seed=0)
    encoder = SymbolEncoder()
    with pytest.raises(TypeError, match="symbols is int64"):
        encoder.encode(symbols.astype(np.int64), index, TABLES)
    with pytest.raises(TypeError, match="index is float64"):
        encoder.encode(symbols, index.astype(np.float64), TABLES)
    with pytest.raises(FastcilError, match=r"index has shape \(2, 2\)"):
        encoder.encode(symbols, index.reshape(2, 2), TABLES)
    with pytest.raises(FastcilError, match=r"symbols has shape \(4,\) and index \(3,\)"):
        encoder.encode(symbols, index[:3], TABLES)
    for outside in (64, -1):
        with pytest.raises(FastcilError, match="there are tables 0 to 63"):
            SymbolDecoder(b"").decode(np.array([outside]), TABLES)


def test_without_constriction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    for make in (SymbolEncoder, lambda: SymbolDecoder(b"")):
        with pytest.raises(FastcilError, match="pip install 'constriction"):
            make()
