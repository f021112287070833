"""What runs of other frameworks stumble over: each trap, and that it isn't here.

They were found by running or reading PyCIL, Mammoth, FACIL and the code released with CIM; the
names of the tests say what happened there.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backbones import ConvNet

from fastcil import Arrival, Result, Scenario, train
from fastcil.engine.seed_run import SeedRun
from fastcil.engine.trainer import Trainer

SIZES = (4, 1, 2)
CLASSES = sum(SIZES)
EDGES = np.cumsum([0, *SIZES])
UNEVEN = Scenario(
    "uneven",
    tuple(Arrival(tuple(range(a, b))) for a, b in itertools.pairwise(EDGES)),
)
OPTIONS = {
    "engine.epoch_scale": 0.005,
    "engine.batch_size": 12,
    "engine.progress": False,
    "augment.size": 12,
}


def draw(per_class: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    labels = [label for label in range(CLASSES) for _ in range(per_class + label % 2)]
    return rng.integers(0, 256, (len(labels), 14, 14, 3), np.uint8), labels


DATA = draw(5, 0), draw(3, 1)


def run(method: str = "icarl", **changes: Any) -> Result:
    arguments = {"data": DATA, "scenario": UNEVEN, "memory": "15 images", "backbone": ConvNet}
    return train(method, **{**arguments, **OPTIONS, **changes})


def events(folder: Path, seed: int) -> list[dict[str, Any]]:
    lines = (folder / f"seed-{seed}" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", ["er", "icarl", "der", "foster+cim"])
def test_tasks_that_are_no_tens_end_the_run_in_a_value_error(method: str) -> None:
    """Accuracy was grouped by tens of classes; here by tasks, and so is forgetting."""
    result = run(method, seeds=(0, 1))
    assert [outcome.seed for outcome in result.outcomes] == [0, 1]
    for outcome in result.outcomes:
        assert [task.classes for task in outcome.tasks] == list(SIZES)
        matrix = Result(result.config, result.environment, [outcome]).accuracy_matrix
        assert matrix.shape == (3, 3)
        found = outcome.tasks[-1].correct[result.readouts[0]]
        for j, (a, b) in enumerate(itertools.pairwise(EDGES)):
            assert sum(found["count"][a:b]) == sum(3 + label % 2 for label in range(a, b))
            right = 100 * sum(found["top1"][a:b]) / sum(found["count"][a:b])
            assert matrix[2, j] == pytest.approx(right)
        best = np.nanmax(matrix[:2, :2], axis=0)
        forgotten = Result(result.config, result.environment, [outcome]).forgetting
        assert forgotten == pytest.approx(float(np.mean(best - matrix[2, :2])))


def test_a_second_seed_writes_into_the_first_one_s_log_or_never_starts(tmp_path: Path) -> None:
    run(seeds=(0, 1), run_dir=tmp_path)
    logs = [events(tmp_path, seed) for seed in (0, 1)]
    for seed, log in enumerate(logs):
        assert {line["seed"] for line in log if "seed" in line} == {seed}
        assert sum(line["event"] == "evaluated" for line in log) == len(SIZES)
    trained = [[line["event"] for line in log] for log in logs]
    assert trained[0] == trained[1], "the second seed trains as much as the first"


def test_a_second_seed_loads_the_first_one_s_checkpoint(tmp_path: Path) -> None:
    first = run(seeds=0, run_dir=tmp_path)
    both = run(seeds=(0, 1), run_dir=tmp_path)
    alone = run(seeds=1)
    weights = [r.learner.method.state_dict() for r in (first, alone)]
    assert any(not np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [t.correct for t in both.outcomes[1].tasks] == [
        t.correct for t in alone.outcomes[0].tasks
    ]


@pytest.mark.parametrize(
    "memory, each",
    [
        ("15 images", [15 // 4, 15 // 5, 15 // 7]),
        ("2 images/class", [2, 2, 2]),
        ("6 images", [1, 1, 0]),
    ],
)
@pytest.mark.filterwarnings("ignore:memory is '6 images':UserWarning")
def test_a_budget_grows_that_should_not_or_is_rounded_up(memory: str, each: list[int]) -> None:
    result = run("er", memory=memory)
    for task, wanted in zip(result.outcomes[0].tasks, each, strict=True):
        assert task.exemplars == [wanted] * len(task.exemplars)
        limit = 2 * len(task.exemplars) if "/class" in memory else int(memory.split()[0])
        assert sum(task.exemplars) <= limit


@pytest.mark.parametrize("left", ["result", "learner"])
def test_a_restart_after_the_last_task_fails(left: str, tmp_path: Path, monkeypatch) -> None:
    """Killed when all is learned and nothing is said: what is left is said, nothing trained."""
    whole = run(run_dir=tmp_path / "whole")
    owner, name = (Result, "save") if left == "result" else (SeedRun, "_finish")
    with monkeypatch.context() as patched:

        def killed(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            run(run_dir=tmp_path / "killed")
    monkeypatch.setattr(Trainer, "run", lambda *_, **__: pytest.fail("trained"))
    again = run(run_dir=tmp_path / "killed")
    assert [t.correct for t in again.outcomes[0].tasks] == [
        t.correct for t in whole.outcomes[0].tasks
    ]


def test_average_accuracy_leaves_out_the_first_task() -> None:
    result = run("er")
    assert len(result.curve()) == len(SIZES)
    assert result.average_accuracy == pytest.approx(float(np.mean(result.curve())))
    assert result.last_accuracy == pytest.approx(float(result.curve()[-1]))


def test_files_appear_beside_the_run_and_the_folder_changes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("er")
    assert Path(os.getcwd()) == tmp_path and not list(tmp_path.iterdir())
    run("er", run_dir="runs/one")
    assert [file.name for file in tmp_path.iterdir()] == ["runs"]
    assert Path(os.getcwd()) == tmp_path
