"""Sweeps are found in what runs differ in, and drawn value by value."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastcil.engine.compare import Comparison
from fastcil.engine.report import render_report
from fastcil.engine.result import Result
from fastcil.engine.sweeps import find_sweeps, plot_sweep


@pytest.fixture
def make(make_result: Callable[..., Result]) -> Callable[..., Result]:
    def with_options(method: str = "er", memory: str = "8 images", **options: Any) -> Result:
        result = make_result(method, memory=memory)
        addon = {"mu": 0.5, "eta": 4, "on": False, **options}
        result.config = {**result.config, "addon": addon}
        return result

    return with_options


def test_settings_varied_one_at_a_time_share_their_default(make) -> None:
    results = {
        "default": make(),
        "mu 0": make(mu=0.0),
        "mu 1": make(mu=1.0),
        "eta 9": make(eta=9),
        "eta 1": make(eta=1),
        "eta 16": make(eta=16),
        "on": make(on=True),
        "other": make("icarl"),
    }
    sweeps = {sweep.name: sweep.lines for sweep in find_sweeps(results)}
    assert list(sweeps) == ["addon.mu", "addon.eta"]
    assert [x for x, _ in sweeps["addon.mu"]["er"]] == [0.0, 0.5, 1.0]
    assert [result for _, result in sweeps["addon.eta"]["er"]] == [
        results[label] for label in ("eta 1", "default", "eta 9", "eta 16")
    ]
    assert list(sweeps["addon.mu"]) == ["er"]


def test_budgets_are_swept_by_their_limit(make) -> None:
    sizes = ("1 images/class", "2 images/class", "10 images/class")
    results = {f"{m} {size}": make(m, size) for m in ("er", "icarl") for size in sizes}
    results["bytes"] = make("er", "4KiB")
    (sweep,) = find_sweeps(results)
    assert sweep.name == "memory, raw images" and list(sweep.lines) == ["er", "icarl"]
    # Six classes after the last task.
    assert [x for x, _ in sweep.lines["er"]] == [6, 12, 60]


@pytest.mark.parametrize(
    "settings",
    [
        [{}, {"mu": 0.0}],
        [{}, {"mu": 0.0}, {"eta": 9}],
        [{"mu": 0.1, "eta": 1}, {"mu": 0.2, "eta": 2}, {"mu": 0.3, "eta": 3}],
        [{"mu": "a"}, {"mu": "b"}, {"mu": None}],
    ],
)
def test_fewer_than_three_values_of_one_number_are_no_sweep(make, settings) -> None:
    results = {str(k): make(**own) for k, own in enumerate(settings)}
    assert find_sweeps(results) == []
    assert 'id="sweeps"' not in render_report(Comparison(results))


def test_lines_are_means_over_seeds_and_bands_their_extremes(make) -> None:
    results = {f"{m} {mu}": make(m, mu=mu) for m in ("er", "icarl") for mu in (0.2, 0.1, 0.9)}
    (sweep,) = find_sweeps(results)
    figure = plot_sweep(sweep)
    for axes, measure in zip(figure.axes, ("average", "last"), strict=True):
        assert measure in axes.get_ylabel() and axes.get_xscale() == "log"
        for line, method in zip(axes.get_lines(), ("er", "icarl"), strict=True):
            assert line.get_label() == method
            assert line.get_xdata().tolist() == [0.1, 0.2, 0.9]
            wanted = [
                np.mean(results[f"{method} {mu}"].per_seed(measure)) for mu in (0.1, 0.2, 0.9)
            ]
            assert line.get_ydata() == pytest.approx(wanted)
        assert len(axes.collections) == 2
    figure.savefig(io.BytesIO(), format="svg")
    page = render_report(Comparison(results))
    assert 'id="sweeps"' in page and "Average and last accuracy by addon.mu" in page


def test_values_near_each_other_or_zero_stand_on_a_plain_axis(make) -> None:
    for values in ((0.0, 0.5, 1.0), (2.0, 3.0, 4.0)):
        (sweep,) = find_sweeps({str(mu): make(mu=mu) for mu in values})
        assert {axes.get_xscale() for axes in plot_sweep(sweep).axes} == {"linear"}
