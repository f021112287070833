"""How many more bits one codec takes than another at the same quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import Akima1DInterpolator

from fastcil.errors import FastcilError

Points = Sequence[tuple[float, float]]
"""(bits per pixel, PSNR in dB) of the operating points of a codec, in any order."""
Fit = Literal["cubic", "akima"]
Array = NDArray[np.float64]


def bd_rate(anchor: Points, test: Points, fit: Fit = "cubic") -> float:
    r"""Bjøntegaard's difference of rates (Bjøntegaard 2001, VCEG-M33), in percent.

    .. math:: 100 \Big( \exp \Big[ \frac{1}{D_1 - D_0}
        \int_{D_0}^{D_1} \ln R_{test}(D) - \ln R_{anchor}(D) \, \mathrm{d}D \Big] - 1 \Big)

    over the PSNR :math:`D_0` to :math:`D_1` that both curves reach.

    Args:
        anchor: Operating points to compare with, two or more.
        test: Operating points of the codec in question.
        fit: How log rate follows from PSNR. ``cubic``: one polynomial of degree 3 (lower with
            fewer than 4 points) by least squares, as the paper's and most published figures.
            ``akima``: a piecewise cubic through all points, without the swings of the former.

    Returns:
        Percent; negative where ``test`` takes fewer bits.

    Raises:
        FastcilError: Another fit; fewer than two points; a rate that is not positive; a point that
            is not finite; two points of one PSNR; or curves that share no PSNR.

    Example:
        >>> curve = [(0.1, 28.0), (0.2, 31.0), (0.4, 34.0), (0.8, 37.0)]
        >>> round(bd_rate(curve, [(0.9 * bpp, psnr) for bpp, psnr in curve]), 6)
        -10.0
    """
    if fit not in get_args(Fit):
        raise FastcilError(f"fit is {fit!r}; it must be one of {', '.join(get_args(Fit))}.")
    (low_a, high_a, area_a), (low_t, high_t, area_t) = (
        _curve(name, points, fit) for name, points in (("anchor", anchor), ("test", test))
    )
    low, high = max(low_a, low_t), min(high_a, high_t)
    if not low < high:
        raise FastcilError(
            f"anchor reaches {low_a:.2f} to {high_a:.2f} dB and test {low_t:.2f} to {high_t:.2f} "
            f"dB; to be compared they must share a range."
        )
    mean = (area_t(low, high) - area_a(low, high)) / (high - low)
    return float(100 * np.expm1(mean))


class _Cubic:
    """A polynomial by least squares, about the middle of its points for the digits' sake."""

    def __init__(self, x: Array, y: Array) -> None:
        self.fitted = np.polynomial.Polynomial.fit(x, y, min(3, len(x) - 1))

    def __call__(self, low: float, high: float) -> float:
        whole = self.fitted.integ()
        return float(whole(high) - whole(low))


def _curve(name: str, points: Points, fit: Fit) -> tuple[float, float, Any]:
    """The range of PSNR of a curve, and the integral of its log rate."""
    rows = np.array(sorted(points, key=lambda point: point[1]), np.float64)
    if rows.ndim != 2 or rows.shape[1:] != (2,) or len(rows) < 2:
        raise FastcilError(f"{name} has shape {list(rows.shape)}; it must have two points or more.")
    rate, quality = rows.T
    if not (np.isfinite(rows).all() and (rate > 0).all()):
        raise FastcilError(f"{name} holds a rate or a PSNR that is not positive and finite.")
    if (np.diff(quality) <= 0).any():
        raise FastcilError(f"{name} has two points of the same PSNR; leave one of them out.")
    logs = np.log(rate)
    if fit == "cubic" or len(rows) == 2:
        return quality[0], quality[-1], _Cubic(quality, logs)
    return quality[0], quality[-1], Akima1DInterpolator(quality, logs).integrate
