"""Settings that a comparison sweeps: runs of one composition that differ in a single number."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastcil.engine.options import flatten
from fastcil.engine.plot_style import draw_band, finish, line_look, make_figure, name_lines
from fastcil.engine.result import Result
from fastcil.memory import Budget

LEAST = 3
"""Values that make a sweep."""
_MEMORY = "memory"
# The label's own, or the same in all runs of a comparison.
_APART = ("method", "seeds", "preset")
_WIDE = 8


@dataclass(frozen=True)
class Sweep:
    """A setting, and the runs in which it takes different values and nothing else does.

    Args:
        name: The option's dotted name; or what the budget is counted in.
        lines: Composition -> value and result, by ascending value.
    """

    name: str
    lines: Mapping[str, list[tuple[float, Result]]]


def find_sweeps(results: Mapping[str, Result]) -> list[Sweep]:
    """The numeric options, and the budget, of which runs try three values or more.

    Runs belong together if they are of one composition and alike in all else; of several such
    groups the largest is taken, so that settings varied one at a time around a common default
    make a sweep each, with that default in every one.

    Args:
        results: Label -> result.
    """
    configs = [(dict(_settings(result)), result) for result in results.values()]
    names = dict.fromkeys(name for config, _ in configs for name in config)
    sweeps = []
    for name in names:
        lines = {}
        for method in dict.fromkeys(str(result.config["method"]) for result in results.values()):
            own = [pair for pair in configs if pair[1].config["method"] == method]
            points = max(_groups(name, own), key=len, default={})
            if len(points) >= LEAST:
                lines[method] = sorted(points.items())
        if lines:
            sweeps.append(Sweep(name, lines))
    return sweeps


def plot_sweep(sweep: Sweep) -> Figure:
    """Average and last accuracy against a setting, a line for each composition.

    Lines are means over seeds, bands reach from the lowest to the highest. Values that lie far
    apart stand on a logarithmic axis.

    Args:
        sweep: From `find_sweeps`.
    """
    figure = make_figure(10.6, 3.4)
    panels: tuple[Axes, Axes] = figure.subplots(1, 2)
    for axes, measure in zip(panels, ("average", "last"), strict=True):
        for number, (method, points) in enumerate(sweep.lines.items()):
            x = np.array([value for value, _ in points])
            seeds = np.array([result.per_seed(measure) for _, result in points]).T  # [S, N]
            look = line_look(number)
            axes.plot(x, seeds.mean(0), lw=1.9, label=method, **look)
            if len(seeds) > 1:
                draw_band(axes, x, seeds, look["color"], len(sweep.lines))
        axes.set_xlabel(sweep.name)
        axes.set_ylabel(f"{measure} accuracy, %")
        values = [value for points in sweep.lines.values() for value, _ in points]
        if min(values) > 0 and max(values) >= _WIDE * min(values):
            axes.set_xscale("log")
    name_lines(figure, panels[0])
    return finish(figure, *panels)


def _settings(result: Result) -> Iterator[tuple[str, Any]]:
    """A run's options under their dotted names; the budget as its limit after the last task."""
    for name, value in flatten(result.config).items():
        if name == _MEMORY:
            limit = result.outcomes[0].tasks[-1].limit
            unit = Budget.parse(value).unit
            yield f"memory, {'bytes' if unit == 'bytes' else 'raw images'}", limit
        elif name not in _APART:
            yield name, value


def _groups(
    name: str, configs: list[tuple[dict[str, Any], Result]]
) -> Iterator[dict[float, Result]]:
    """Value -> result, of the runs that differ in nothing else."""
    groups: dict[Hashable, dict[float, Result]] = {}
    for config, result in configs:
        value = config.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            rest = repr(sorted((k, v) for k, v in config.items() if k != name))
            groups.setdefault(rest, {})[float(value)] = result
    yield from groups.values()
