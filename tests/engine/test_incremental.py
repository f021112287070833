"""Data- and task-incremental runs: what is measured, how it is told, and that they go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import Arrival, FastcilError, Result, Scenario, train
from fastcil.contract import evaluating
from fastcil.data import Dataset, Examples, ImageStore
from fastcil.engine import plots
from fastcil.engine.compare import Comparison, compare
from fastcil.engine.finding import finding
from fastcil.engine.report import render_report, write_report
from fastcil.engine.seed_run import SeedRun

CLASSES = ("ant", "bee", "cat", "dog", "elk")
OPTIONS = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 8,
    "engine.progress": False,
    "augment.size": 12,
}
METHODS = {
    "finetune": ["linear"],
    "er": ["linear"],
    "icarl": ["nme", "linear"],
    "joint": ["linear"],
}


def part(per_class: int, seed: int) -> Examples:
    """Noise around a colour of each class, uneven numbers of images."""
    rng = np.random.default_rng(seed)
    labels = [c for c in range(len(CLASSES)) for _ in range(per_class + c % 2)]
    colours = np.random.default_rng(1).uniform(60, 195, (len(CLASSES), 1, 1, 3))
    images = rng.normal(colours[labels], 30, (len(labels), 12, 12, 3)).clip(0, 255)
    return Examples(ImageStore.from_batch(images.astype(np.uint8)), torch.tensor(labels))


DATA = Dataset("beasts", part(7, 0), part(4, 1), CLASSES)
COUNT = [4, 5, 4, 5, 4]


def run(method: str = "er", **changes: Any) -> Result:
    arguments = {"data": DATA, "scenario": "data-3", "memory": "10 images", "backbone": ConvNet}
    return train(method, **{**arguments, **OPTIONS, **changes})


def scores_of(result: Result, readout: str) -> tuple[list[list[float]], list[int]]:
    """Scores of the last network for every test image, and labels in learning order."""
    learner = result.learner
    place = [learner.class_names.index(name) for name in CLASSES]
    with evaluating(learner.method):
        scores = learner.parts.context.scan(learner.method.readouts()[readout], DATA.test)
    return scores.tolist(), [place[k] for k in DATA.test.labels.tolist()]


@pytest.mark.parametrize("method", METHODS)
def test_data_incremental(method) -> None:
    result = run(method)
    tasks = result.outcomes[0].tasks
    assert [t.classes for t in tasks] == [5, 0, 0] and result.readouts == METHODS[method]
    assert result.data_incremental and not result.task_aware
    curve, matrix = result.curve(), result.accuracy_matrix
    np.testing.assert_allclose(matrix[:, 0], curve)
    assert matrix.shape == (3, 3) and np.isnan(matrix[:, 1:]).all()
    assert result.forgetting == pytest.approx(curve[:2].max() - curve[2])
    assert result.bwt == pytest.approx(curve[2] - curve[0])
    assert result.average_accuracy == pytest.approx(curve.mean())
    for readout in result.readouts:
        hits = [
            int(np.argmax(row)) == label
            for row, label in zip(*scores_of(result, readout), strict=True)
        ]
        assert result.curve(readout)[-1] == pytest.approx(100 * np.mean(hits))
    for task in tasks:
        assert sum(task.correct[result.readouts[0]]["count"]) == sum(COUNT)
    held = {"finetune": 0, "joint": len(DATA.train)}.get(method, 10)
    assert sum(tasks[-1].exemplars) == held


@pytest.mark.parametrize("method", METHODS)
def test_task_incremental(method) -> None:
    result, plain = run(method, scenario="task-2"), run(method, scenario="lfs-2")
    assert result.task_aware and not plain.task_aware and not result.data_incremental
    assert [t.classes for t in result.outcomes[0].tasks] == [3, 2]
    own = [0, 0, 0, 1, 1]
    for readout in result.readouts:
        hits: list[list[bool]] = [[], []]
        for row, label in zip(*scores_of(result, readout), strict=True):
            among = [c for c in range(5) if own[c] == own[label]]
            hits[own[label]].append(max(among, key=lambda c, row=row: row[c]) == label)
        matrix = result.matrix(readout)
        np.testing.assert_allclose(matrix[1], [100 * np.mean(h) for h in hits])
        assert result.curve(readout)[-1] == pytest.approx(100 * np.mean(hits[0] + hits[1]))
        # Training is the same: only what is compared differs, and from the second task on.
        np.testing.assert_array_equal(matrix[0], plain.matrix(readout)[0])
        assert (matrix[1] >= plain.matrix(readout)[1]).all()
        assert result.curve(readout, top=5)[-1] == 100
    assert result.bwt == pytest.approx(matrix_drop(result))
    assert result.forgetting == pytest.approx(-matrix_drop(result))


def matrix_drop(result: Result) -> float:
    matrix = result.accuracy_matrix
    return float(matrix[1, 0] - matrix[0, 0])


def test_classes_that_come_later_have_columns_of_their_own() -> None:
    """Three tasks, of which the second only brings further images."""
    thirds = torch.arange(len(DATA.train))
    again = thirds[DATA.train.labels < 3][::2]
    stream = Scenario("mix", (Arrival((0, 1, 2)), Arrival((0, 1, 2), again), Arrival((3, 4))))
    result = run(scenario=stream)
    matrix = result.accuracy_matrix
    assert np.isnan(matrix[:, 1]).all() and np.isfinite(matrix[:, 0]).all()
    assert not result.data_incremental
    assert result.bwt == pytest.approx(matrix[2, 0] - matrix[0, 0])
    assert result.forgetting == pytest.approx(matrix[:2, 0].max() - matrix[2, 0])


@pytest.mark.parametrize("method", ["der+cam", "foster+cim"])
@pytest.mark.parametrize("scenario", ["data-2", "task-2"])
def test_methods_that_grow_take_part_too(method, scenario) -> None:
    result = run(method, scenario=scenario)
    assert np.isfinite([result.average_accuracy, result.forgetting, result.bwt]).all()
    assert result.nbytes > 0


@pytest.mark.parametrize("scenario", ["data-3", "data-1", "task-2"])
def test_files_hold_only_numbers_and_the_report_says_what_they_are(scenario, tmp_path) -> None:
    comparison = compare(
        "er,finetune",
        DATA,
        scenario,
        "10 images",
        run_dir=tmp_path,
        seeds=(0, 1),
        backbone=ConvNet,
        **OPTIONS,
    )
    for path in tmp_path.rglob("*.json*"):
        for line in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        ):
            json.dumps(json.loads(line), allow_nan=False)
    for method, result in comparison.results.items():
        loaded = Result.load(tmp_path / method)
        assert loaded.outcomes == result.outcomes and loaded.summary() == result.summary()
        assert loaded.task_aware == (scenario == "task-2")
        assert loaded.data_incremental == (scenario == "data-3")
    page = write_report(tmp_path).read_text()
    assert ("its scores are compared only among" in page) == (scenario == "task-2")
    assert ("all accuracies are on the same test images" in page) == (scenario == "data-3")
    assert ("Forgetting of each earlier task" in page) == (scenario == "task-2")
    assert "nan" not in finding(comparison)


def test_the_headline_says_what_guessing_would_give(make_result) -> None:
    result = make_result(classes=(2, 4), seeds=(0,))
    assert "guessing would give 16.7 %" in finding(Comparison({"er": result}))
    for task in result.outcomes[0].tasks:
        task.task_aware = True
    said = finding(Comparison({"er": result}))
    # As many test images of each class: (2 / 2 + 4 / 4) / 6.
    assert "the task of each being known, guessing among its classes would give 33.3 %" in said
    again = make_result(classes=(5, 0, 0), seeds=(0,))
    said = finding(Comparison({"er": again}))
    assert f"after 3 tasks, {again.bwt:+.1f} points from the first on; guessing" in said
    assert "forgotten" not in said
    render_report(Comparison({"er": again}))


def test_plots_leave_out_tasks_without_new_classes(make_result) -> None:
    result = make_result(classes=(2, 0, 3, 1))
    mesh = plots.plot_matrix(result).axes[0].collections[0]
    values = np.ma.filled(mesh.get_array(), np.nan)
    np.testing.assert_allclose(values, result.accuracy_matrix[:, [0, 2, 3]])
    (line,) = [
        line
        for line in plots.plot_forgetting({"er": result}).axes[0].get_lines()
        if line.get_label() == "er"
    ]
    assert line.get_xdata().tolist() == [1, 3]
    assert np.mean(line.get_ydata()) == pytest.approx(result.forgetting)


@pytest.mark.parametrize("scenario", ["data-3", "task-3"])
def test_a_run_that_was_stopped_goes_on_to_the_same_result(
    scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("icarl", scenario=scenario)
    measure = SeedRun._measure

    def stop(seed_run: SeedRun, *arguments: Any) -> Any:
        if len(seed_run.outcome.tasks) == 1:
            raise KeyboardInterrupt
        return measure(seed_run, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SeedRun, "_measure", stop)
        run("icarl", scenario=scenario, run_dir=tmp_path)
    result = run("icarl", scenario=scenario, run_dir=tmp_path)
    for task, expected in zip(result.outcomes[0].tasks, whole.outcomes[0].tasks, strict=True):
        assert {**vars(task), "seconds": 0} == {**vars(expected), "seconds": 0}


def test_knowing_the_task_is_another_run(tmp_path: Path) -> None:
    arrivals = (Arrival((0, 1)), Arrival((2, 3, 4)))
    run(scenario=Scenario("mine", arrivals), run_dir=tmp_path)
    with pytest.raises(FastcilError, match="tasks was 2 tasks"):
        run(scenario=Scenario("mine", arrivals, task_aware=True), run_dir=tmp_path)


def test_another_order_seed_deals_other_images(tmp_path: Path) -> None:
    run(scenario="data-2", run_dir=tmp_path)
    with pytest.raises(FastcilError, match=r"engine\.order_seed was 1993, now 4"):
        run(scenario="data-2", run_dir=tmp_path, **{"engine.order_seed": 4})
