"""Forward transfer: measured before a task is trained, once, and by what can know of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet
from compositions import every_other

from fastcil import Result, train
from fastcil.contract import Task
from fastcil.contract.registry import METHODS
from fastcil.data import Dataset, Examples, ImageStore
from fastcil.engine.compare import compare
from fastcil.engine.report import write_report
from fastcil.engine.seed_run import SeedRun
from fastcil.engine.trainer import Trainer

OPTIONS = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 8,
    "engine.progress": False,
    "engine.checkpoint_seconds": 0,
    "augment.size": 12,
}
MEASURED = {**OPTIONS, "engine.forward_transfer": True}


def part(per_class: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    labels = [c for c in range(5) for _ in range(per_class + c)]
    images = (
        rng.integers(0, 200, (len(labels), 12, 12, 3)) + 10 * np.array(labels)[:, None, None, None]
    )
    return Examples(ImageStore.from_batch(images.astype(np.uint8)), torch.tensor(labels))


DATA = Dataset("five", part(6, 0), part(4, 1), ("a", "b", "c", "d", "e"))


def run(method: str = "er", scenario: str = "b2-inc2", **changes: Any) -> Result:
    arguments = {"memory": "10 images", "backbone": ConvNet, **MEASURED, **changes}
    return train(method, DATA, scenario, **arguments)


@pytest.mark.parametrize("method", ["finetune", "er", "joint"])
def test_without_new_classes_it_is_the_accuracy_of_the_task_before(method) -> None:
    """Every task of a data-incremental stream is tested on the same images."""
    result = run(method, "data-3")
    if method == "joint":  # Starts anew with every task.
        assert np.isfinite(result.forward_transfer)
        return
    expected = np.mean(result.curve()[:-1]) - 100 / 5
    assert result.forward_transfer == pytest.approx(expected)


@pytest.mark.parametrize("scenario", ["b2-inc2", "task-2", "lfs-3"])
def test_new_classes_alone_are_tested_among_their_own_or_all(
    scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits: list[tuple[Task, Any]] = []
    look = SeedRun._look_ahead

    def watch(seed_run: SeedRun, task: Task) -> None:
        look(seed_run, task)
        learner = seed_run.learner
        order = torch.tensor(seed_run.plan.scenario.order)
        place = torch.empty(5, dtype=torch.int64)
        place[order] = torch.arange(5)
        labels = place[DATA.test.labels]
        learner.method.eval()
        scores = learner.parts.context.scan(learner.method.logits, DATA.test)
        assert scores.shape[1] == task.total
        right = total = 0
        for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
            if label in task.new_classes:
                among = task.new_classes if scenario == "task-2" else range(task.total)
                right += max(among, key=lambda c, row=row: row[c]) == label
                total += 1
        k = len(task.new_classes) if scenario == "task-2" else task.total
        logits.append((task, {"correct": right, "count": total, "among": k}))

    monkeypatch.setattr(SeedRun, "_look_ahead", watch)
    result = run("finetune", scenario)
    tasks = result.outcomes[0].tasks
    assert [task.index for task, _ in logits] == list(range(1, len(tasks)))
    assert [t.ahead for t in tasks] == [None, *(counts for _, counts in logits)]
    moved = [100 * (c["correct"] / c["count"] - 1 / c["among"]) for _, c in logits]
    assert result.forward_transfer == pytest.approx(np.mean(moved))


@pytest.mark.parametrize("method", every_other(METHODS, 1))
def test_every_method_can_be_asked_and_trains_as_if_it_were_not(method) -> None:
    small = {"memory": "60KiB", **({"eec.width": 4} if method == "eec" else {})}
    result = run(method, "lfs-2", **small)
    plain = run(method, "lfs-2", **{**small, "engine.forward_transfer": False})
    assert plain.forward_transfer is None and plain.summary()["forward_transfer"] is None
    assert -100 <= result.forward_transfer <= 100
    for a, b in zip(result.outcomes[0].tasks, plain.outcomes[0].tasks, strict=True):
        assert (a.correct, a.exemplars, a.nbytes) == (b.correct, b.exemplars, b.nbytes)


def test_one_task_transfers_nothing() -> None:
    assert run(scenario="lfs-1").forward_transfer is None


def test_it_is_measured_once_however_often_a_run_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run("icarl")
    looked: list[int] = []
    look, save = SeedRun._look_ahead, SeedRun._save_between_steps
    steps = 0

    def count(seed_run: SeedRun, task: Task) -> None:
        looked.append(task.index)
        look(seed_run, task)

    def stop(seed_run: SeedRun, trainer: Trainer) -> None:
        nonlocal steps
        save(seed_run, trainer)
        steps += 1
        if steps % 2 == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SeedRun, "_look_ahead", count)
        patch.setattr(SeedRun, "_save_between_steps", stop)
        while True:
            try:
                result = run("icarl", run_dir=tmp_path)
                break
            except KeyboardInterrupt:
                assert steps < 200
    assert steps >= 6 and looked == [1, 2]
    assert [t.ahead for t in result.outcomes[0].tasks] == [t.ahead for t in whole.outcomes[0].tasks]
    assert result.forward_transfer == whole.forward_transfer
    loaded = Result.load(tmp_path)
    assert loaded.forward_transfer == whole.forward_transfer


def test_it_is_told_in_result_table_and_report(tmp_path: Path) -> None:
    arguments = {"memory": "6 images", "backbone": ConvNet, "seeds": (0, 1), **MEASURED}
    comparison = compare("finetune,icarl", DATA, "lfs-2", run_dir=tmp_path, **arguments)
    content = json.loads((tmp_path / "icarl" / "result.json").read_text())
    result = comparison.results["icarl"]
    assert content["summary"]["forward_transfer"] == pytest.approx(
        result.forward_transfer, abs=1e-3
    )
    seeds = [outcome.forward_transfer for outcome in result.outcomes]
    assert result.forward_transfer == pytest.approx(np.mean(seeds))
    rows = {(row.method, row.readout): row for row in comparison.rows()}
    assert rows["icarl", "nme"].transfer == (pytest.approx(np.mean(seeds)), None)
    assert rows["icarl", "linear"].transfer is None, "one figure for a method"
    table = comparison.table()
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["FWT"][1] == f"{np.mean(seeds):.2f}" and cells["FWT"][2] == ""
    assert cells["BWT"][0] == f"{comparison.results['finetune'].bwt:.2f}"
    page = write_report(tmp_path).read_text()
    assert "forward transfer: mean over later tasks" in page and ">FWT<" in page


def test_an_outcome_of_earlier_versions_has_none(tmp_path: Path) -> None:
    run("finetune", "lfs-2", run_dir=tmp_path)
    file = tmp_path / "result.json"
    content = json.loads(file.read_text())
    for task in content["outcomes"][0]["tasks"]:
        del task["ahead"]
    file.write_text(json.dumps(content))
    assert Result.load(file).forward_transfer is None
