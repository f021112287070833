"""What reports, tables and files show of a few-shot stream, and of no other."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastcil.engine import report
from fastcil.engine.compare import Comparison
from fastcil.engine.few_shot_sections import plot_sessions, sessions_section
from fastcil.engine.result import Result
from fastcil.engine.sections import results_section


@pytest.fixture
def few_shot(make_result):
    """Two methods, one with two readouts, over a base session of four classes and three more."""

    def make(method, level, readouts=("linear",), seeds=(0, 1, 2)):
        result = make_result(method, level, (4, 2, 2, 2), seeds, readouts, images=20)
        for outcome in result.outcomes:
            for task in outcome.tasks:
                task.few_shot = True
        return result

    return lambda **more: Comparison(
        {"lucir": make("lucir", 0.8, ("linear", "nme"), **more), "er": make("er", 0.6, **more)}
    )


def naive(result, readout, seed, task):
    """Base, novel and harmonic accuracy, summed class by class."""
    counts = result.outcomes[seed].tasks[task].correct[readout]
    sums = {"base": [0, 0], "novel": [0, 0]}
    for k, (right, images) in enumerate(zip(counts["top1"], counts["count"], strict=True)):
        part = sums["base" if k < 4 else "novel"]
        part[0] += right
        part[1] += images
    base, novel = (100 * right / images for right, images in sums.values())
    return base, novel, 2 / (1 / base + 1 / novel)


def test_figures_are_pooled_over_the_test_images(few_shot):
    result = few_shot().results["lucir"]
    for task in (1, 2, 3):
        seeds = np.array([naive(result, "linear", seed, task) for seed in range(3)])
        assert result.base_accuracy[task] == pytest.approx(seeds[:, 0].mean())
        assert result.novel_accuracy[task] == pytest.approx(seeds[:, 1].mean())
        assert result.harmonic_mean[task] == pytest.approx(seeds[:, 2].mean())
        assert result.harmonic_mean[task] == result.sessions()["harmonic"][task]
    for place, measure in enumerate(("base", "novel", "harmonic")):
        wanted = [naive(result, "nme", seed, 3)[place] for seed in range(3)]
        assert result.per_seed(measure, "nme") == pytest.approx(wanted)
    drops = [o.curve("nme")[0] - o.curve("nme")[-1] for o in result.outcomes]
    assert result.per_seed("drop", "nme") == pytest.approx(drops)
    assert result.performance_drop == pytest.approx(np.mean(result.per_seed("drop")))
    # The base session knows no novel class.
    assert result.base_accuracy[0] == pytest.approx(result.curve()[0])
    assert np.isnan(result.novel_accuracy[0]) and np.isnan(result.harmonic_mean[0])


def test_the_table_has_a_column_for_each_session(few_shot):
    comparison = few_shot()
    table = comparison.sessions_table()
    headings = [str(column.header) for column in table.columns]
    assert headings == ["method", *"0123", "base %", "novel %", "harmonic", "drop"]
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["lucir", "  nme", "er"]
    for row, (method, readout) in enumerate((("lucir", "linear"), ("lucir", "nme"), ("er", None))):
        result = comparison.results[method]
        curve = [cells[1 + session][row] for session in range(4)]
        assert curve == [f"{accuracy:.2f}" for accuracy in result.curve(readout)]
        assert cells[6][row].startswith(f"{np.mean(result.per_seed('novel', readout)):.2f} ± ")


def test_the_file_holds_every_session_without_nan(few_shot, tmp_path):
    comparison = few_shot()
    comparison.save(tmp_path / "compare.json")
    content = json.loads(
        (tmp_path / "compare.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    sessions = content["sessions"]["lucir"]["nme"]
    assert sessions["novel"][0] is None and len(sessions["novel"]) == 4
    curve = comparison.results["lucir"].curve("nme")
    assert sessions["accuracy"] == pytest.approx(curve, abs=1e-3)
    assert content["rows"][0]["sessions"].keys() == {"base", "novel", "harmonic", "drop"}
    result = comparison.results["er"]
    result.save(tmp_path / "result.json")
    summary = json.loads((tmp_path / "result.json").read_text())["summary"]
    assert summary["harmonic_mean"][0] is None
    assert summary["performance_drop"] == pytest.approx(result.performance_drop, abs=1e-3)
    again = Result.load(tmp_path / "result.json")
    assert again.few_shot and again.sessions()["base"] == pytest.approx(result.base_accuracy)


def test_the_report_has_a_section_of_its_own(few_shot):
    comparison = few_shot()
    heading, make = report._SECTIONS["sessions"]
    assert heading == "Few-shot sessions"
    shown = make(comparison)
    assert "Base and novel classes by session" in shown
    assert all(f"{a:.2f}" in shown for a in comparison.results["er"].curve())
    assert "Few-shot: every task after the first" in results_section(comparison)


def test_lines_begin_where_novel_classes_do(few_shot):
    results = few_shot().results
    base, novel, harmonic = plot_sessions(results).axes
    assert base.lines[0].get_xdata().tolist() == [0, 1, 2, 3]
    for axes, measure in ((novel, "novel"), (harmonic, "harmonic")):
        for line, result in zip(axes.lines, results.values(), strict=True):
            assert line.get_xdata().tolist() == [1, 2, 3]
            assert line.get_ydata() == pytest.approx(result.sessions()[measure][1:])


def test_other_streams_show_none_of_it(make_result, tmp_path):
    result = make_result("er")
    comparison = Comparison({"er": result})
    assert comparison.sessions_table() is None and sessions_section(comparison) == ""
    assert "ew-shot" not in results_section(comparison) and "novel" not in repr(result)
    comparison.save(tmp_path / "compare.json")
    assert "sessions" not in json.loads((tmp_path / "compare.json").read_text())
    # But who asks is answered.
    assert result.base_accuracy == pytest.approx(result.matrix()[:, 0])
    # Files written before there were few-shot streams say nothing of them.
    result.save(tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text())
    assert "performance_drop" not in content["summary"]
    for outcome in content["outcomes"]:
        for task in outcome["tasks"]:
            del task["few_shot"]
    (tmp_path / "result.json").write_text(json.dumps(content))
    assert not Result.load(tmp_path / "result.json").few_shot
