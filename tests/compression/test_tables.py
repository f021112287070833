"""Integer tables: exact sums, the published Gaussian ones, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import logistic, norm

from fastcil.compression.gaussian_tables import (
    LEVELS,
    compute_gaussian_tables,
    gaussian_tables,
)
from fastcil.compression.tables import TOTAL, Tables, settled
from fastcil.errors import FastcilError

SIGMAS = 0.11 * (20 / 0.11) ** (np.arange(LEVELS) / (LEVELS - 1))


def rows(tables: Tables) -> list[np.ndarray]:
    return np.split(tables.frequencies.astype(np.int64), tables.starts[1:])


def test_the_file_is_what_the_function_computes() -> None:
    stored, computed = gaussian_tables(), compute_gaussian_tables()
    for name, array in computed.state().items():
        np.testing.assert_array_equal(stored.state()[name], array)
    # Streams that exist need these tables: a new digest needs a new version of the format.
    digest = "112f2b7d0fc88244d006bf285a0f54bbb498b897798bf77050f08c2e57e7fea1"
    assert stored.digest.hex() == computed.digest.hex() == digest


@pytest.mark.slow
def test_the_file_of_wide_scales_is_what_the_function_computes() -> None:
    stored, computed = gaussian_tables(0.11, 256.0), compute_gaussian_tables(0.11, 256.0)
    assert stored == computed and len(stored) == 64
    assert stored.digest.hex()[:16] == "6e06a05ab1f6500e"


def test_gaussian_frequencies_are_the_rounded_masses() -> None:
    for sigma, low, row in zip(SIGMAS, gaussian_tables().low, rows(gaussian_tables()), strict=True):
        symbols = np.arange(low, -low + 1)
        mass = norm.cdf((symbols + 0.5) / sigma) - norm.cdf((symbols - 0.5) / sigma)
        wanted = np.maximum(np.rint(mass * TOTAL), 1)
        difference = np.abs(row[:-1] - wanted)
        assert difference[symbols != 0].max() == 0
        # The most frequent symbol pays for those that got a unit too much.
        assert difference[symbols == 0] <= len(row)
        assert row[-1] == 1


def test_gaussian_tables_span_all_but_a_billionth() -> None:
    reach = -gaussian_tables().low
    assert (2 * norm.sf((reach + 0.5) / SIGMAS) <= 1e-9).all()
    shorter = 2 * norm.sf((reach - 0.5) / SIGMAS)
    assert (shorter > 1e-9).all()
    np.testing.assert_array_equal(gaussian_tables().slots, 2 * reach + 2)


@pytest.mark.parametrize("shift", [0.0, 0.4, -7.3])
def test_factorised_tables(shift: float) -> None:
    low = [-4, -20, 0]
    edges = [np.arange(a - 0.5, b + 1) for a, b in ((-4, 4), (-20, 5), (0, 0))]
    tables = Tables.from_cdf(low, [logistic.cdf(edge, shift) for edge in edges])
    assert tables.slots.tolist() == [10, 27, 2]
    for edge, row in zip(edges, rows(tables), strict=True):
        cdf = logistic.cdf(edge, shift)
        wanted = np.append(np.diff(cdf), 1 - cdf[-1] + cdf[0]) * TOTAL
        assert row.sum() == TOTAL
        assert np.abs(row - np.maximum(wanted, 1)).max() <= len(row)


def test_the_digest_is_of_all_arrays() -> None:
    tables = Tables.from_cdf([0, 0], [np.array([0.0, 0.5, 1.0])] * 2)
    moved = Tables.from_cdf([0, 1], [np.array([0.0, 0.5, 1.0])] * 2)
    other = Tables.from_cdf([0, 0], [np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.4, 1.0])])
    assert len({t.digest for t in (tables, moved, other)}) == 3
    assert Tables.from_state(tables.state()).digest == tables.digest


def test_settled_keeps_the_sum() -> None:
    assert settled(np.array([3, 7, 1])).tolist() == [3, TOTAL - 4, 1]


GOOD = Tables.from_cdf([0], [np.array([0.0, 0.5, 1.0])]).state()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"low": np.array([0.0])}, "low is float64"),
        ({"low": np.array([[0]], np.int32)}, "low and slots have shapes"),
        ({"low": np.array([], np.int32), "slots": np.array([], np.int32)}, "T at least 1"),
        ({"low": np.array([1 << 21], np.int32)}, "low goes beyond"),
        ({"low": np.array([-(1 << 31)], np.int32)}, "low goes beyond"),
        ({"slots": np.array([1], np.int32)}, "slots goes from 1 to 1"),
        ({"slots": np.array([4], np.int32)}, "frequencies has shape"),
        ({"frequencies": np.array([5, 5, 5], np.int32)}, "table 0 sums up to 15"),
        ({"frequencies": np.array([0, TOTAL - 1, 1], np.int32)}, "at least 1"),
    ],
)
def test_bad_arrays(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises((TypeError, FastcilError), match=sentence):
        Tables.from_state({**GOOD, **change})


@pytest.mark.parametrize(
    "edges",
    [[0.0], [0.5, 0.4], [-0.1, 1.0], [0.0, 1.1], [0.0, np.nan, 1.0], [[0.0, 1.0]]],
)
def test_bad_cdf(edges: list[Any]) -> None:
    with pytest.raises(FastcilError, match="cdf of table 0"):
        Tables.from_cdf([0], [np.array(edges)])


def test_missing_array_and_unequal_lists() -> None:
    with pytest.raises(FastcilError, match="state has no 'slots'"):
        Tables.from_state({"low": GOOD["low"]})
    with pytest.raises(FastcilError, match="low has 2 entries and cdf 1"):
        Tables.from_cdf([0, 1], [np.array([0.0, 1.0])])
