"""Figures of rates and distortions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from fastcil.engine.plot_style import finish, line_look, make_figure, name_lines

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Codec -> (bits per pixel, quality) of its operating points."""


def plot_rate_distortion(
    curves: Curves, quality: str = "PSNR, dB", dashed: Sequence[str] = ()
) -> Figure:
    """Quality over rate, a line for each codec.

    Args:
        curves: Codec -> points, in the order of the legend.
        quality: What the points' second numbers are.
        dashed: Codecs whose lines are dashed, such as those that others have measured.

    Example:
        >>> figure = plot_rate_distortion({"jpeg": [(0.5, 29.0), (0.2, 25.0)]})
        >>> figure.axes[0].lines[0].get_xdata().tolist()
        [0.2, 0.5]
    """
    figure = make_figure(6.7, 3.9)
    axes = figure.subplots()
    for number, (codec, points) in enumerate(curves.items()):
        x, y = zip(*sorted(points), strict=True)
        style = "--" if codec in dashed else "-"
        axes.plot(x, y, style, lw=1.7, label=codec, **line_look(number))
    # From nothing on; of one rate alone the margin would be none.
    axes.set_xlim(0, 1.05 * max(rate for points in curves.values() for rate, _ in points))
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel(quality)
    name_lines(figure, axes)
    return finish(figure, axes)
