"""The look that all plots share: colours, axes, legends, heat maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

Array = NDArray[np.float64]

_COLOURS = (
    *("#2b6cb0", "#d1602c", "#2f855a", "#805ad5", "#b7871d", "#b83262", "#2c8f99"),
    *("#5f6b7a", "#8a5a3a", "#4c51bf", "#9aa414", "#e07fb0"),
)
_MARKERS = "osD^vPX*<>"
INK, SOFT, GRID = "#1d232a", "#55606c", "#dfe3e8"
_HEAT = LinearSegmentedColormap.from_list("heat", ["#f2f5f9", "#9dbbdc", "#2b6cb0", "#123a68"])
ANNOTATED = 10


def method_colour(number: int) -> str:
    """The colour of the ``number``-th method of a comparison, as ``#rrggbb``.

    Example:
        >>> method_colour(0)
        '#2b6cb0'
    """
    return _COLOURS[number % len(_COLOURS)]


def line_look(number: int) -> dict[str, Any]:
    """Colour and marker of the ``number``-th line."""
    return {
        "color": method_colour(number),
        "marker": _MARKERS[number % len(_MARKERS)],
        "ms": 4.5,
        "mec": "white",
        "mew": 0.6,
    }


def draw_band(axes: Axes, x: Array, seeds: Array, colour: str, bands: int) -> None:
    """From the lowest of ``seeds`` [S, T] to the highest; fainter the more bands there are."""
    shade = 0.15 if bands <= 3 else 0.08
    axes.fill_between(x, seeds.min(0), seeds.max(0), color=colour, alpha=shade, lw=0)


def draw_points(axes: Axes, groups: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """A dot for each point [x, y] of each group, without scales; the groups named above."""
    for number, (name, points) in enumerate(groups.items()):
        x, y = np.array(points, dtype=np.float64).T
        colour = method_colour(number)
        # A cloud of thousands is a picture in the SVG: as shapes it would outweigh the report.
        axes.scatter(x, y, s=9, color=colour, alpha=0.7, lw=0, label=name, rasterized=True)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        borderpad=0,
    )


def make_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that lays itself out."""
    return Figure(figsize=(width, height), layout="constrained")


def name_lines(figure: Figure, axes: Axes) -> None:
    """Names beside the plot, where they cover nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK
    )


def finish(figure: Figure, *plots: Axes) -> Figure:
    """The quiet look of all plots; names are never read as formulas."""
    for axes in plots:
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(SOFT)
        axes.tick_params(labelsize=8.5, colors=SOFT, labelcolor=SOFT, length=3)
        axes.grid(True, axis="y", color=GRID, lw=0.8)
        axes.set_axisbelow(True)
    texts: Iterable[Any] = figure.findobj(Text)
    for text in texts:
        text.set_parse_math(False)
    for axes in figure.axes:
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_fontsize(9)
            label.set_color(SOFT)
    return figure


def draw_heat(
    figure: Figure,
    axes: Axes,
    values: Array,
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float] | None = None,
    places: int = 2,
) -> None:
    """A heat map with the first row on top; figures in the cells where they are few."""
    low, high = limits or (np.nanmin(values), np.nanmax(values))
    high = max(high, low + 1e-12)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values), cmap=_HEAT, vmin=low, vmax=high, edgecolors="w", linewidth=0.6
    )
    axes.set_ylim(len(values), 0)
    for names, ticks, labels in (
        (columns, axes.set_xticks, axes.set_xticklabels),
        (rows, axes.set_yticks, axes.set_yticklabels),
    ):
        step = -(-len(names) // 20)
        ticks(np.arange(len(names))[::step] + 0.5)
        labels(names[::step])
    axes.tick_params(length=0, labelsize=8, colors=SOFT)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("none")
    if max(values.shape) > ANNOTATED:
        bar = figure.colorbar(mesh, ax=axes, fraction=0.05)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, colors=SOFT)
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            light = (value - low) / (high - low) > 0.5
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{value:.{places}f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if light else INK,
            )
