"""BD-rate against integration by hand and the package bjontegaard."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.interpolate import Akima1DInterpolator

from fastcil.compression.anchors import VTM_KODAK
from fastcil.compression.bd_rate import Fit, Points, bd_rate
from fastcil.errors import FastcilError

OURS = [(0.12, 27.9), (0.35, 31.8), (0.85, 36.4), (1.7, 40.0)]
MANY = [(0.09, 26.1), (0.2, 29.0), (0.33, 31.2), (0.6, 34.1), (0.9, 36.2), (1.6, 39.7), (2.5, 43.0)]
PAIRS = [(VTM_KODAK, OURS), (OURS, VTM_KODAK), (VTM_KODAK, MANY), (MANY, OURS), (OURS, MANY[1:5])]


def by_quadrature(anchor: Points, test: Points, fit: Fit) -> float:
    """The definition: fits of log10 rate over PSNR, integrated by adaptive quadrature."""
    fits, ends = [], []
    for points in (anchor, test):
        rate, quality = np.array(sorted(points)).T
        logs = np.log10(rate)
        if fit == "akima":
            fits.append(Akima1DInterpolator(quality, logs))
        else:
            design = np.vander(quality - 33, 4)
            weights = np.linalg.lstsq(design, logs, rcond=None)[0]
            fits.append(lambda d, weights=weights: np.polyval(weights, d - 33))
        ends.append((quality[0], quality[-1]))
    low, high = max(e[0] for e in ends), min(e[1] for e in ends)
    area = quad(lambda d: fits[1](d) - fits[0](d), low, high, limit=200)[0]
    return 100 * (10 ** (area / (high - low)) - 1)


@pytest.mark.parametrize("fit", ["cubic", "akima"])
@pytest.mark.parametrize("pair", PAIRS)
def test_against_quadrature(pair: tuple[Points, Points], fit: Fit) -> None:
    assert bd_rate(*pair, fit) == pytest.approx(by_quadrature(*pair, fit), abs=1e-4)


@pytest.mark.parametrize("fit", ["cubic", "akima"])
@pytest.mark.parametrize("pair", PAIRS)
def test_against_bjontegaard(pair: tuple[Points, Points], fit: Fit) -> None:
    peer = pytest.importorskip("bjontegaard")
    (anchor_rate, anchor), (test_rate, test) = (np.array(points).T for points in pair)
    wanted = peer.bd_rate(
        anchor_rate, anchor, test_rate, test, fit, require_matching_points=False, min_overlap=0
    )
    assert bd_rate(*pair, fit) == pytest.approx(wanted, abs=1e-6)


def test_order_of_points_does_not_matter() -> None:
    assert bd_rate(OURS[::-1], MANY[::-1]) == bd_rate(OURS, MANY)


def test_few_points() -> None:
    # A straight line in log rate: twice the rate everywhere.
    anchor, test = [(0.1, 30.0), (0.4, 34.0)], [(0.2, 30.0), (0.8, 34.0)]
    assert bd_rate(anchor, test) == pytest.approx(100)
    assert bd_rate(anchor, test, "akima") == pytest.approx(100)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(0.1, 30.0)], "anchor has shape"),
        ([(0.0, 30.0), (0.2, 31.0)], "not positive and finite"),
        ([(0.1, 30.0), (0.2, np.inf)], "not positive and finite"),
        ([(0.1, 30.0), (0.2, 30.0)], "two points of the same PSNR"),
        ([(0.1, 10.0), (0.2, 20.0)], "anchor reaches 10.00 to 20.00 dB and test 27.90 to 40.00"),
    ],
)
def test_bad_points(points: Points, message: str) -> None:
    with pytest.raises(FastcilError, match=message):
        bd_rate(points, OURS)


def test_bad_fit() -> None:
    with pytest.raises(FastcilError, match="fit is 'linear'; it must be one of cubic, akima"):
        bd_rate(OURS, MANY, "linear")  # type: ignore[arg-type]
