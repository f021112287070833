"""A run of any method, stopped between any two steps, goes on to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backbones import ConvNet
from compositions import SAMPLE, SHORT

from fastcil import FastcilError, Learner, train
from fastcil.engine.result import Result
from fastcil.engine.seed_run import SeedRun
from fastcil.engine.state import load_state
from fastcil.engine.trainer import Trainer

OPTIONS = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 12,
    "engine.progress": False,
    "engine.checkpoint_seconds": 0,
    "augment.size": 12,
}


def draw(per_class: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    labels = [label for label in range(5) for _ in range(per_class)]
    return rng.integers(0, 256, (len(labels), 16, 18, 3), np.uint8), labels


DATA = draw(7, 0), draw(2, 1)


def run(method: str, run_dir: Path | None, **options: Any) -> Result:
    named = (method.partition("+")[0], method.partition("+")[2], "engine")
    short = {k: v for k, v in SHORT.items() if k.partition(".")[0] in named}
    all_options = {**OPTIONS, **short, **options}
    return train(
        method, DATA, "b2-inc2", "10 images", run_dir=run_dir, backbone=ConvNet, **all_options
    )


class Interruptions:
    """Stops a run, as Ctrl-C does, after a checkpoint that was just written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        self.stop_after = -1
        save = SeedRun._save_between_steps

        def saved(seed_run: SeedRun, trainer: Trainer) -> None:
            save(seed_run, trainer)
            self.steps += 1
            if self.steps == self.stop_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(SeedRun, "_save_between_steps", saved)


@pytest.fixture
def interruptions(monkeypatch: pytest.MonkeyPatch) -> Interruptions:
    return Interruptions(monkeypatch)


# Of the same kind as others that are among the rest.
LONG = ("der+cim", "podnet+cim", "gem+samc", "lucir+aanets", "online-ewc", "mas", "osla", "eeil")
LONG += ("finetune", "wa", "ncm", "lwf", "a-gem")


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] * (m in LONG)) for m in SAMPLE]
)
def test_stopped_again_and_again_ends_in_the_same_bits(
    method, interruptions, tmp_path: Path, assert_same
) -> None:
    whole = run(method, tmp_path / "whole", **{"engine.checkpoint_seconds": 1e9})
    total, interruptions.steps = interruptions.steps, 0
    # Every sitting does a few steps, so that each stage of each task is stopped in its middle.
    share, stops = max(3, total // 5), 0
    interruptions.stop_after = share
    while True:
        try:
            stopped = run(method, tmp_path / "stopped")
            break
        except KeyboardInterrupt:
            stops += 1
            interruptions.stop_after += share
    assert interruptions.steps == total, "no step is lost, and none is done twice"
    assert stops == (total - 1) // share or stops == total // share
    for a, b in zip(whole.outcomes[0].tasks, stopped.outcomes[0].tasks, strict=True):
        assert_same({**vars(a), "seconds": 0}, {**vars(b), "seconds": 0})
    ends = [tmp_path / name / "seed-0" / "learner.safetensors" for name in ("whole", "stopped")]
    learners = [{**load_state(end), "settings": None} for end in ends]
    assert_same(*learners)
    left = {file.name for file in (tmp_path / "stopped" / "seed-0").iterdir()}
    assert left == {"events.jsonl", "learner.safetensors", "result.json"}


def test_what_a_kill_leaves_in_the_middle_of_a_write_is_removed(interruptions, tmp_path) -> None:
    interruptions.stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        run("er", tmp_path)
    (tmp_path / "seed-0" / ".checkpoint.safetensors.12345").write_bytes(b"half")
    interruptions.stop_after = -1
    run("er", tmp_path)
    names = {file.name for file in (tmp_path / "seed-0").iterdir()}
    assert names == {"events.jsonl", "learner.safetensors", "result.json"}


def test_a_damaged_checkpoint_is_a_sentence(interruptions, tmp_path) -> None:
    interruptions.stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        run("er", tmp_path)
    file = tmp_path / "seed-0" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FastcilError, match="it is damaged"):
        run("er", tmp_path)


@pytest.mark.parametrize(
    "method", ["finetune", "darkpp", "ewc", "dlcft", "icarl", "der", "foster+cim"]
)
@pytest.mark.parametrize("when", ["training", "remembering"])
def test_a_learner_that_is_stopped_is_as_it_was(
    method, when, monkeypatch: pytest.MonkeyPatch, assert_same
) -> None:
    """What was begun is undone: learning the same classes again is as if nothing had happened."""
    shelves = [{f"{t}{k}": draw(7, 10 * t + k)[0][:7] for k in range(2)} for t in range(2)]
    learner = Learner(method, memory="10 images", backbone=ConvNet, **OPTIONS)
    other = Learner(method, memory="10 images", backbone=ConvNet, **OPTIONS)
    run_stages = Trainer.run

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def stop_late(trainer: Trainer, *arguments: Any) -> None:
        run_stages(trainer, *arguments)
        raise KeyboardInterrupt

    for shelf in shelves:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if when == "training":
                patch.setattr(Trainer, "run", stop_late)
            else:
                patch.setattr("fastcil.memory.Memory.update", stop)
            learner.learn(shelf)
        assert learner.class_names == other.class_names and learner.tasks == other.tasks
        if other.class_names:
            assert_same(other.state(), learner.state())
            expected = other.predict(DATA[1][0])
            assert learner.predict(DATA[1][0]).names == expected.names
        other.learn(shelf)
        learner.learn(shelf)
    assert_same(other.state(), learner.state())
