"""How the sessions of a few-shot stream are reported: one by one, base and novel classes apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastcil.engine.compare import SESSION_MEASURES, Comparison, Row
from fastcil.engine.markup import Html, format_figure, plot, table, tag
from fastcil.engine.plot_style import draw_band, finish, line_look, make_figure, name_lines
from fastcil.engine.result import Result
from fastcil.engine.sections import method_name

_PANELS = {
    "base": "base classes, %",
    "novel": "novel classes, %",
    "harmonic": "harmonic mean of both",
}


def sessions_section(comparison: Comparison) -> Html:
    """Accuracy after each session, and base against novel classes; nothing of other streams."""
    if not comparison.few_shot:
        return Html()
    sessions = range(len(next(iter(comparison.results.values())).curve()))
    columns = ["method", *(f"{number}" for number in sessions), *SESSION_MEASURES.values()]
    note = (
        "Columns 0 to the last session: accuracy in % on the test images of all classes seen, "
        "pooled (Tao et al. 2020), session 0 being the base session. After the last session, "
        "base: accuracy on the base session's classes; novel: on all others; harmonic: harmonic "
        "mean of the two (Xian et al. 2017); drop: accuracy after session 0 minus that after the "
        "last, in points (Zhang et al. 2021)."
    )
    shown = table(columns, [_row(comparison, row) for row in comparison.rows()])
    figure = ""
    if len(sessions) > 1:
        drawn = plot(plot_sessions(comparison.results), "Base and novel classes by session")
        figure = tag("div", drawn, class_="plots")
    return Html(shown + tag("p", note, class_="note") + figure)


def _row(comparison: Comparison, row: Row) -> list[Any]:
    result = comparison.results[row.method]
    own = row.readout == result.readouts[0]
    name = method_name(comparison, row.method) if own else tag("span", row.readout, class_="sub")
    return [
        name,
        *(f"{accuracy:.2f}" for accuracy in result.curve(row.readout)),
        *(format_figure(*row.sessions[measure]) for measure in SESSION_MEASURES),
    ]


def plot_sessions(results: Mapping[str, Result]) -> Figure:
    """Accuracy on base and on novel classes, and their harmonic mean, after each session.

    Lines are means over seeds, bands reach from the lowest to the highest. Novel classes begin
    with session 1.

    Args:
        results: Method -> result; each of two sessions or more.
    """
    figure = make_figure(10.6, 3.4)
    panels: tuple[Axes, ...] = tuple(figure.subplots(1, len(_PANELS)))
    for axes, (measure, label) in zip(panels, _PANELS.items(), strict=True):
        for number, (method, result) in enumerate(results.items()):
            seeds = np.stack([outcome.sessions()[measure] for outcome in result.outcomes])
            told = ~np.isnan(seeds).any(0)
            x = np.arange(seeds.shape[1], dtype=np.float64)[told]
            look = line_look(number)
            axes.plot(x, seeds[:, told].mean(0), lw=1.9, label=method, **look)
            if len(seeds) > 1:
                draw_band(axes, x, seeds[:, told], look["color"], len(results))
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("session")
        axes.set_ylabel(label)
    name_lines(figure, panels[0])
    return finish(figure, *panels)
