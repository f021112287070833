from __future__ import annotations

import io
import sys

import matplotlib
import numpy as np
import pytest

from fastcil.engine import plots
from fastcil.errors import FastcilError


def render(figure):
    """Drawing is what finds fault with a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue().decode()


def lines(axes):
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in axes.get_lines()}


def test_curves_are_the_results_means(make_result):
    results = {
        "foster": make_result("foster", readouts=("student", "teacher")),
        "icarl": make_result("icarl", level=0.6, seeds=(0,)),
    }
    for top in (1, 5):
        figure = plots.plot_curves(results, top)
        (axes,) = figure.axes
        drawn = lines(axes)
        assert list(drawn) == ["foster", "foster: teacher", "icarl"]
        assert drawn["foster"] == pytest.approx(results["foster"].curve(top=top))
        assert drawn["foster: teacher"] == pytest.approx(results["foster"].curve("teacher", top))
        assert axes.get_lines()[0].get_xdata() == pytest.approx([2, 4, 6])
        assert [line.get_linestyle() for line in axes.get_lines()] == ["-", "--", "-"]
        # Only foster has several seeds.
        (band,) = axes.collections
        seeds = [o.curve("student", top) for o in results["foster"].outcomes]
        low, high = band.get_datalim(axes.transData).intervaly
        assert (low, high) == pytest.approx((np.min(seeds), np.max(seeds)))
        bottom, ceiling = axes.get_ylim()
        assert 0 <= bottom <= low <= high <= ceiling <= 100
        assert len(figure.legends) == 1
        assert {"foster", "icarl"} <= {t.get_text() for t in figure.legends[0].get_texts()}
        render(figure)
    assert not plots.plot_curves(results, legend=False).legends


def test_tasks_without_new_classes_are_numbered(make_result):
    (axes,) = plots.plot_curves({"er": make_result(classes=(4, 0, 0))}).axes
    assert axes.get_xlabel() == "task"
    assert axes.get_lines()[0].get_xdata() == pytest.approx([1, 2, 3])


@pytest.mark.parametrize("tasks", [1, 3, 10, 11, 25])
def test_matrix_is_annotated_up_to_ten_tasks(make_result, tasks):
    result = make_result(classes=(1,) * tasks)
    figure = plots.plot_matrix(result)
    mesh = figure.axes[0].collections[0]
    values = np.ma.filled(mesh.get_array(), np.nan)
    np.testing.assert_allclose(values, result.accuracy_matrix)
    texts = [t.get_text() for t in figure.axes[0].texts]
    expected = [f"{v:.0f}" for v in result.accuracy_matrix.ravel() if not np.isnan(v)]
    assert texts == (expected if tasks <= 10 else [])
    assert len(figure.axes) == (1 if tasks <= 10 else 2)
    render(figure)


def test_forgetting_of_each_task(make_result):
    result = make_result(classes=(2, 2, 2, 2))
    (axes,) = plots.plot_forgetting({"er": result}).axes
    expected = np.zeros(3)
    for outcome in result.outcomes:
        a = outcome.accuracy_matrix()
        for j in range(3):
            expected[j] += (max(a[t, j] for t in range(j, 3)) - a[3, j]) / len(result.outcomes)
    assert lines(axes)["er"] == pytest.approx(expected)
    assert np.mean(expected) == pytest.approx(result.forgetting)


def test_how_the_first_task_fares(make_result):
    results = {"er": make_result(classes=(2, 3, 1)), "one": make_result("one", seeds=(4,))}
    (axes,) = plots.plot_first_task(results).axes
    drawn = lines(axes)
    for name, result in results.items():
        assert drawn[name] == pytest.approx(result.accuracy_matrix[:, 0])
    assert axes.get_lines()[0].get_xdata() == pytest.approx([2, 5, 6])
    (band,) = axes.collections
    seeds = [outcome.accuracy_matrix()[:, 0] for outcome in results["er"].outcomes]
    low, high = band.get_datalim(axes.transData).intervaly
    assert (low, high) == pytest.approx((np.min(seeds), np.max(seeds)))
    render(axes.figure)


@pytest.mark.parametrize(
    ("memories", "label", "limits"),
    [
        (("4 images", "8 images"), "held, raw images", [[4, 4, 4], [8, 8, 8]]),
        (("8 images", "8 images", "2 images/class"), "held, raw images", [[8] * 3, [4, 8, 12]]),
        (("4KiB", "8 images"), "held, KiB", [[4, 4, 4]]),
        (("unlimited", "2KiB"), "held, KiB", [[2, 2, 2]]),
    ],
)
def test_budgets_of_their_own_have_limits_of_their_own(make_result, memories, label, limits):
    results = {f"m{k}": make_result("er", memory=m) for k, m in enumerate(memories)}
    figure = plots.plot_memory(results)
    held, _ = figure.axes
    assert held.get_ylabel() == label
    dashed = [line for line in held.get_lines() if line.get_linestyle() == "--"]
    assert [line.get_ydata().tolist() for line in dashed] == limits
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    shown = [name for name in names if name.startswith("limit")]
    assert shown == ["limit of the budget" if len(limits) == 1 else "limits of the budgets"]
    render(figure)


@pytest.mark.parametrize(
    ("memory", "label", "limits"),
    [
        ("4KiB", "held, KiB", [4, 4, 4]),
        ("3MiB/class", "held, MiB", [6, 12, 18]),
        ("20 images", "held, raw images", [20, 20, 20]),
        ("5 images/class", "held, raw images", [10, 20, 30]),
        ("unlimited", "held, B", None),
        ("none", "held, B", [0, 0, 0]),
    ],
)
def test_memory_stands_against_the_limit(make_result, memory, label, limits):
    results = {name: make_result(name, memory=memory, held=h) for name, h in (("a", 1), ("b", 0.5))}
    figure = plots.plot_memory(results)
    held, count = figure.axes
    assert held.get_ylabel() == label
    drawn = lines(held)
    if limits is None:
        assert list(drawn) == ["a", "b"]
    else:
        assert drawn["limit of the budget"] == pytest.approx(limits)
        assert drawn["a"] == pytest.approx(limits)
        assert drawn["b"] == pytest.approx(np.array(limits) / 2, abs=1e-3)
    assert count.get_lines()[0].get_ydata() == pytest.approx([7, 14, 21])
    assert held.get_ylim()[0] == 0
    assert held.get_ylim()[1] > max(y.max() for y in drawn.values())
    render(figure)


@pytest.mark.parametrize("methods", [1, 2, 5])
def test_exemplars_of_each_class(make_result, methods):
    results = {f"m{k}": make_result(f"m{k}", classes=(3, 4)) for k in range(methods)}
    figure = plots.plot_exemplars(results)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == [
        f"m{k}: 3.4 per class" for k in range(methods)
    ]
    for axes in shown:
        assert axes.patches[0].get_data().values.tolist() == [3, 4, 3, 4, 3, 4, 3]
        assert axes.get_ylim() == pytest.approx((0, 4.2))
    render(figure)


def test_seconds_of_each_task(make_result):
    (axes,) = plots.plot_seconds({"er": make_result()}).axes
    assert list(axes.get_xticks()) == [1, 2, 3]
    assert lines(axes)["er"] == pytest.approx([10, 11, 12])


def test_records_are_drawn(make_result):
    curve = {"x": [0, 1, 2], "y": {"a": [1, 2, 3], "b": [3, 2, None]}, "xlabel": "x", "ylabel": "y"}
    figure = plots.plot_record({"kind": "curve", "title": "t", "payload": curve})
    drawn = lines(figure.axes[0])
    np.testing.assert_array_equal(drawn["b"], [3, 2, np.nan])
    matrix = {
        "values": [[1.0, 2.0], [3.0, float("nan")], [5, 6]],
        "rows": list("abc"),
        "columns": list("de"),
    }
    figure = plots.plot_record({"kind": "matrix", "title": "t", "payload": matrix})
    assert [t.get_text() for t in figure.axes[0].texts] == ["1.00", "2.00", "3.00", "5.00", "6.00"]
    render(figure)
    points = {"base": [[0.0, 1.0], [2.0, 3.0]], "new": [[4.0, 5.0]]}
    figure = plots.plot_record({"kind": "scatter", "title": "t", "payload": {"points": points}})
    clouds = {c.get_label(): c.get_offsets().tolist() for c in figure.axes[0].collections}
    assert clouds == points
    render(figure)


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "table", "title": "odd", "payload": {}},
        {"kind": "scatter", "title": "odd", "payload": {"points": {"a": [[1], [2]]}}},
        {"kind": "scatter", "title": "odd", "payload": {}},
        {"kind": "curve", "title": "odd", "payload": {"x": [1]}},
        {"kind": "curve", "title": "odd", "payload": {"x": [1], "y": [2]}},
        {"kind": "curve", "title": "odd", "payload": {"x": [1], "y": {"a": [1, 2]}}},
        {"kind": "curve", "title": "odd", "payload": {"x": [1], "y": {"a": ["one"]}}},
        {
            "kind": "matrix",
            "title": "odd",
            "payload": {"values": [[1], [1, 2]], "rows": [], "columns": []},
        },
    ],
)
def test_records_of_another_form_are_refused(record):
    with pytest.raises(FastcilError, match="record 'odd'"):
        plots.plot_record(record)


def test_names_are_never_formulas(make_result):
    name = r"a$\frac{b$"
    results = {name: make_result(name), "b": make_result("b")}
    figures = [
        plots.plot_curves(results),
        plots.plot_forgetting(results),
        plots.plot_first_task(results),
        plots.plot_memory(results),
        plots.plot_exemplars(results),
        plots.plot_seconds(results),
    ]
    matrix = {"values": [[1.0]], "rows": [name], "columns": [name]}
    figures.append(plots.plot_record({"kind": "matrix", "title": name, "payload": matrix}))
    curve = {"x": [1, 2], "y": {name: [1, 2], "b": [1, 2]}, "xlabel": name}
    figures.append(plots.plot_record({"kind": "curve", "title": name, "payload": curve}))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        for figure in figures:
            assert name in render(figure)


def test_plots_leave_no_state_behind(make_result):
    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    render(plots.plot_curves({"er": make_result()}))
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded
