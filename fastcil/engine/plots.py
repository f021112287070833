"""Figures of results: matplotlib `Figure` objects, to show, to save or to put in a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fastcil.engine.plot_style import (
    ANNOTATED,
    INK,
    SOFT,
    draw_band,
    draw_heat,
    draw_points,
    finish,
    line_look,
    make_figure,
    method_colour,
    name_lines,
)
from fastcil.engine.result import Result, SeedOutcome
from fastcil.errors import FastcilError
from fastcil.memory import Budget

Array = NDArray[np.float64]
Results = Mapping[str, Result]
"""Method -> its result, in the order of the legend."""


def plot_curves(results: Results, top: int = 1, legend: bool = True) -> Figure:
    """Accuracy on all classes known, after each task.

    Lines are means over seeds, the band of two or more seeds reaches from the lowest to the
    highest; a method's other readouts are dashed and have no band.

    Args:
        results: Method -> result.
        top: 1, or 5 for top-5 accuracy.
        legend: Whether to name the methods beside the plot.
    """
    figure = make_figure(6.7 if legend else 4.1, 3.6)
    axes = figure.subplots()
    for number, (method, result) in enumerate(results.items()):
        x, label = _steps(result)
        look = line_look(number)
        for place, readout in enumerate(result.readouts):
            mean = result.curve(readout, top)
            if place:
                axes.plot(x, mean, "--", lw=1.2, label=f"{method}: {readout}", color=look["color"])
                continue
            axes.plot(x, mean, lw=1.9, label=method, **look)
            if len(result.outcomes) > 1:
                seeds = np.stack([o.curve(readout, top) for o in result.outcomes])
                draw_band(axes, x, seeds, look["color"], len(results))
        axes.set_xticks(_thin(x))
        axes.set_xlabel(label)
    low, high = axes.dataLim.y0, axes.dataLim.y1
    axes.set_ylim(max(0, 10 * ((low - 4) // 10)), min(100, 10 * -(-(high + 4) // 10)))
    axes.set_ylabel(f"{'' if top == 1 else f'top-{top} '}accuracy, %")
    if legend:
        name_lines(figure, axes)
    return finish(figure, axes)


def plot_matrix(result: Result, readout: str | None = None, top: int = 1) -> Figure:
    """Accuracy on each task's classes after each task, mean over seeds; figures up to 10 tasks.

    Tasks that brought no new class have no column.

    Args:
        result: Of one method.
        readout: Which way to classify; None for the method's own.
        top: 1 or 5.
    """
    matrix = result.matrix(readout, top)
    tasks, own = len(matrix), _bringing(result)
    side = 1.2 + min(3.4, 0.44 * max(tasks, 3))
    figure = make_figure(side + (0.4 if tasks > ANNOTATED else 0), side)
    axes = figure.subplots()
    names = [str(t + 1) for t in range(tasks)]
    columns = [names[t] for t in own]
    draw_heat(figure, axes, matrix[:, own], names, columns, limits=(0, 100), places=0)
    axes.set_xlabel("accuracy on the classes of task, %")
    axes.set_ylabel("after task")
    return finish(figure)


def plot_forgetting(results: Results) -> Figure:
    """How far each earlier task fell from its best accuracy, after the last task.

    Tasks that brought no new class are left out.

    Args:
        results: Method -> result; each of two tasks or more.
    """
    figure = make_figure(7.6, 3.2)
    axes = figure.subplots()
    for number, (method, result) in enumerate(results.items()):
        earlier = [t for t in _bringing(result) if t + 1 < len(result.outcomes[0].tasks)]
        drops = np.stack([_drops(outcome)[earlier] for outcome in result.outcomes])
        x = np.array(earlier) + 1
        look = line_look(number)
        axes.plot(x, drops.mean(0), lw=1.9, label=method, **look)
        if len(drops) > 1:
            draw_band(axes, x, drops, look["color"], len(results))
    axes.axhline(0, color=SOFT, lw=0.8)
    axes.set_xticks(_thin(x))
    axes.set_xlabel("classes of task")
    axes.set_ylabel("forgetting, points")
    name_lines(figure, axes)
    return finish(figure, axes)


def plot_first_task(results: Results) -> Figure:
    """Accuracy on the first task's classes, as more are learned (Bai et al. 2023, Fig. 3).

    Lines are means over seeds, bands reach from the lowest to the highest.

    Args:
        results: Method -> result.
    """
    figure = make_figure(6.7, 3.2)
    axes = figure.subplots()
    for number, (method, result) in enumerate(results.items()):
        x, label = _steps(result)
        seeds = np.stack([outcome.accuracy_matrix()[:, 0] for outcome in result.outcomes])
        look = line_look(number)
        axes.plot(x, seeds.mean(0), lw=1.9, label=method, **look)
        if len(seeds) > 1:
            draw_band(axes, x, seeds, look["color"], len(results))
        axes.set_xlabel(label)
    axes.set_xticks(_thin(x))
    axes.set_ylabel("accuracy on the first task, %")
    name_lines(figure, axes)
    return finish(figure, axes)


def plot_memory(results: Results) -> Figure:
    """What memory holds after each task against what it may hold, and how many exemplars.

    The left axes are in the unit of the budgets (bytes where they have several) and show the
    fullest seed; the right ones count exemplars, mean over seeds.

    Args:
        results: Method -> result.
    """
    first = next(iter(results.values()))
    units = [Budget.parse(result.config["memory"]).unit for result in results.values()]
    unit = "images" if set(units) == {"images"} else "bytes"
    amounts = {method: held_amounts(result, unit).max(0) for method, result in results.items()}
    limits = _limits(results, unit)
    scale, name = 1.0, "raw images"
    if unit == "bytes":
        largest = [*map(max, limits), *(float(a.max()) for a in amounts.values())]
        scale, name = byte_scale(max(largest))
    figure = make_figure(10.6, 3.2)
    held, count = figure.subplots(1, 2)
    for number, (method, result) in enumerate(results.items()):
        x, label = _steps(result)
        look = line_look(number)
        held.plot(x, amounts[method] / scale, lw=1.9, label=method, **look)
        totals = [[sum(task.exemplars) for task in o.tasks] for o in result.outcomes]
        count.plot(x, np.mean(totals, axis=0), lw=1.9, **look)
    x, _ = _steps(first)
    called = "limit of the budget" if len(limits) == 1 else "limits of the budgets"
    for place, line in enumerate(limits):
        look = {"color": INK, "lw": 1.3, "ls": (0, (4, 3))}
        held.plot(x, np.array(line) / scale, label=called if place == 0 else None, **look)
    for axes, text in ((held, f"held, {name}"), (count, "exemplars held")):
        axes.set_xlabel(label)
        axes.set_ylabel(text)
        axes.set_ylim(0, 1.06 * max(axes.dataLim.y1, 1e-9))
        axes.set_xticks(_thin(x))
    name_lines(figure, held)
    return finish(figure, held, count)


def plot_exemplars(results: Results) -> Figure:
    """Exemplars held of each class after the last task, mean over seeds; one strip per method.

    Args:
        results: Method -> result.
    """
    columns = 1 if len(results) == 1 else 2
    rows = -(-len(results) // columns)
    figure = make_figure(10.6, 0.5 + 1.35 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(results) :]:
        axes.set_visible(False)
    for number, (method, result) in enumerate(results.items()):
        axes = grid.flat[number]
        counts = np.mean([o.tasks[-1].exemplars for o in result.outcomes], axis=0)
        edges = np.arange(len(counts) + 1) + 0.5
        axes.stairs(counts, edges, fill=True, color=method_colour(number), alpha=0.8)
        ends = np.cumsum([task.classes for task in result.outcomes[0].tasks])[:-1]
        axes.vlines(ends + 0.5, 0, 1, transform=axes.get_xaxis_transform(), color=SOFT, lw=0.7)
        mean = counts.mean() if len(counts) else 0.0
        axes.set_title(f"{method}: {mean:.1f} per class", fontsize=9, loc="left", color=INK)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        if number >= len(results) - columns:
            axes.set_xlabel("class, in the order learned")
            axes.tick_params(labelbottom=True)
    top = max(max(o.tasks[-1].exemplars, default=0) for r in results.values() for o in r.outcomes)
    grid[0, 0].set_ylim(0, 1.05 * max(1, top))
    grid[0, 0].set_xlim(0.5, max(1.5, float(edges[-1])))
    return finish(figure, *grid.flat)


def plot_seconds(results: Results) -> Figure:
    """Wall time of each task, training to evaluation, mean over seeds.

    Args:
        results: Method -> result.
    """
    figure = make_figure(7.6, 3.0)
    axes = figure.subplots()
    for number, (method, result) in enumerate(results.items()):
        seconds = np.mean([[task.seconds for task in o.tasks] for o in result.outcomes], axis=0)
        x = np.arange(1, len(seconds) + 1)
        axes.plot(x, seconds, lw=1.9, label=method, **line_look(number))
    axes.set_xticks(_thin(x))
    axes.set_xlabel("task")
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)
    name_lines(figure, axes)
    return finish(figure, axes)


def plot_record(record: Mapping[str, Any]) -> Figure:
    """A record of kind ``curve``, ``matrix`` or ``scatter``, in the plain form of results.

    Args:
        record: ``kind``, ``title`` and ``payload``; see `fastcil.contract.Record`.

    Raises:
        FastcilError: Another kind, or a payload that is not of its kind's form.

    Example:
        >>> payload = {"x": [0, 1], "y": {"loss": [2.0, 1.0]}}
        >>> len(plot_record({"kind": "curve", "title": "Loss", "payload": payload}).axes)
        1
    """
    kind, title, payload = record["kind"], record["title"], record["payload"]
    figure = make_figure(5.2, 3.1)
    axes = figure.subplots()
    try:
        if kind == "curve":
            _draw_lines(axes, payload)
        elif kind == "matrix":
            values = np.array(payload["values"], dtype=np.float64)
            rows, columns = ([str(n) for n in payload[side]] for side in ("rows", "columns"))
            draw_heat(figure, axes, values, rows, columns)
        elif kind == "scatter":
            draw_points(axes, payload["points"])
        else:
            raise FastcilError(f"record '{title}' is of kind '{kind}', which is not drawn as plot.")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, FastcilError):
            raise
        raise FastcilError(
            f"record '{title}' of kind '{kind}' has a payload of another form: {error!r}."
        ) from error
    return finish(figure, *([axes] if kind == "curve" else []))


def _draw_lines(axes: Axes, payload: Mapping[str, Any]) -> None:
    """The lines of a curve's payload; a legend where there is more than one."""
    lines = payload["y"]
    few = len(payload["x"]) <= 12
    for number, (name, values) in enumerate(lines.items()):
        y = np.array(values, dtype=np.float64)
        look = line_look(number)
        axes.plot(
            payload["x"],
            y,
            lw=1.6,
            label=name,
            color=look["color"],
            ms=4,
            marker=look["marker"] if few else None,
        )
    marks = payload.get("marks", {})
    for name, x in marks.items():
        axes.axvline(x, lw=1.2, ls="--", color=INK, label=name)
    axes.set_xlabel(payload.get("xlabel", ""))
    if all(float(v).is_integer() for v in payload["x"]):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(lines) + len(marks) > 1:
        axes.set_ylabel(payload.get("ylabel", ""))
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    else:
        axes.set_ylabel(payload.get("ylabel") or next(iter(lines), ""))


def _limits(results: Results, unit: str) -> list[tuple[float, ...]]:
    """What the budgets in a unit allow after each task, each once."""
    found = [
        tuple(task.limit for task in result.outcomes[0].tasks if task.limit is not None)
        for result in results.values()
        if Budget.parse(result.config["memory"]).unit == unit
    ]
    return [limits for limits in dict.fromkeys(found) if limits]


def held_amounts(result: Result, unit: str) -> Array:
    """What counted towards the budget after each task, [seeds, T].

    Args:
        result: Of one method.
        unit: ``bytes``, or ``images`` for the papers' accounting.
    """
    return np.array(
        [
            [t.nbytes["budgeted"] if unit == "bytes" else t.units for t in outcome.tasks]
            for outcome in result.outcomes
        ],
        dtype=np.float64,
    )


def byte_scale(largest: float) -> tuple[float, str]:
    """The power of 1024 to show bytes in, and its name.

    Args:
        largest: The largest number of bytes to show.

    Example:
        >>> byte_scale(409600), byte_scale(900)
        ((1024.0, 'KiB'), (1.0, 'B'))
    """
    scale = 1.0
    for name in ("B", "KiB", "MiB", "GiB"):
        if largest < 1024 * scale or name == "GiB":
            break
        scale *= 1024
    return scale, name


def _steps(result: Result) -> tuple[Array, str]:
    """Where a result's tasks stand on the x axis: by classes known, if every task brought some."""
    classes = [task.classes for task in result.outcomes[0].tasks]
    if all(classes):
        return np.cumsum(classes).astype(np.float64), "classes known"
    return np.arange(1.0, len(classes) + 1), "task"


def _thin(x: NDArray[Any]) -> NDArray[Any]:
    """Ticks at the tasks, at every second or third of many."""
    return x[:: -(-len(x) // 12)]


def _bringing(result: Result) -> list[int]:
    """The tasks that brought new classes, from 0."""
    return [t for t, task in enumerate(result.outcomes[0].tasks) if task.classes]


def _drops(outcome: SeedOutcome) -> Array:
    """Best past accuracy minus the last, of each task but the last; NaN where it has no class."""
    matrix = outcome.accuracy_matrix()[:, :-1]
    return np.asarray(np.fmax.reduce(matrix[:-1], axis=0) - matrix[-1])
