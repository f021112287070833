"""Runs whose exemplars are streams: complete when saved, refused in time when they can't be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet
from codecs_of_images import tiny_codec

from fastcil import FastcilError, Learner, train
from fastcil.compression.saving import save_codec
from fastcil.engine.seed_run import SeedRun
from fastcil.engine.state import load_state
from fastcil.engine.trainer import Trainer

OPTIONS: dict[str, Any] = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 8,
    "engine.progress": False,
    "engine.checkpoint_seconds": 0,
    "augment.size": 12,
}


def draw(per_class: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    labels = [label for label in range(4) for _ in range(per_class)]
    return rng.integers(0, 256, (len(labels), 16, 18, 3), np.uint8), labels


DATA = draw(3, 0), draw(1, 1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "codec.safetensors"
    save_codec(path, tiny_codec())
    return path


def run(checkpoint: Path | None, run_dir: Path | None = None, **options: Any) -> Any:
    arguments = {"method": "er", "memory": "45 kB", "learned.checkpoint": checkpoint, **options}
    method, memory = arguments.pop("method"), arguments.pop("memory")
    return train(
        *(method, DATA, "lfs-2", memory, "learned"),
        run_dir=run_dir,
        backbone=ConvNet,
        **OPTIONS,
        **arguments,
    )


def test_weights_count_and_are_reported(checkpoint: Path) -> None:
    outcome = run(checkpoint).outcomes[0].tasks[-1]
    weights = outcome.nbytes["learned codec"]
    assert 20_000 < weights < 40_000 and sum(outcome.exemplars) == 12
    assert outcome.nbytes["budgeted"] == weights + outcome.nbytes["exemplars"] <= 45_000
    free = run(checkpoint, **{"learned.count_codec": False}).outcomes[0].tasks[-1]
    assert free.nbytes["budgeted"] == free.nbytes["exemplars"] == free.nbytes["all"] - weights


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ctrl-C, right after the checkpoint of a step."""
    save, done = SeedRun._save_between_steps, [0]

    def saved(seed_run: SeedRun, trainer: Trainer) -> None:
        save(seed_run, trainer)
        done[0] += 1
        if done[0] == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(SeedRun, "_save_between_steps", saved)


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, assert_same: Any
) -> None:
    run(checkpoint, tmp_path / "whole")
    for steps in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, steps)
            run(checkpoint, tmp_path / "stopped")
    save_codec(checkpoint, tiny_codec(seed=1))
    with pytest.raises(FastcilError, match=r"codec_checksum was [0-9a-f]{16}, now"):
        run(checkpoint, tmp_path / "stopped")
    save_codec(checkpoint, tiny_codec())
    run(checkpoint, tmp_path / "stopped")
    ends = [tmp_path / name / "seed-0" / "learner.safetensors" for name in ("whole", "stopped")]
    assert_same(*(load_state(end) for end in ends))


def shelf(*names: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(names[0]))
    return {name: rng.integers(0, 256, (4, 16, 18, 3), np.uint8) for name in names}


def learner_of(checkpoint: Path, method: str = "er", **options: Any) -> Learner:
    given = {"learned.checkpoint": checkpoint, **OPTIONS, **options}
    memory = given.pop("memory", "45 kB")
    return Learner(method, memory=memory, codec="learned", backbone=ConvNet, **given)


def test_a_saved_learner_is_complete_without_the_checkpoint(
    checkpoint: Path, tmp_path: Path, assert_same: Any
) -> None:
    first, second = shelf("a", "b"), shelf("cc", "dd")
    learner = learner_of(checkpoint, **{"learned.decoder": "pinned"}).learn(first)
    learner.save(tmp_path / "learner")
    checkpoint.unlink()
    loaded = Learner.load(tmp_path / "learner", backbone=ConvNet)
    assert_same(loaded.state(), learner.state())
    before, after = learner.memory.examples().images, loaded.memory.examples().images
    assert torch.equal(before.pixels, after.pixels)
    for one in (learner, loaded):
        one.learn(second)
    assert_same(loaded.state(), learner.state())
    assert loaded.predict(second["cc"]).names == learner.predict(second["cc"]).names
    fresh = learner_of(checkpoint)
    fresh.save(tmp_path / "fresh")
    with pytest.raises(FastcilError, match=r"codec\.safetensors"):
        Learner.load(tmp_path / "fresh", backbone=ConvNet).learn(first)


def test_a_task_that_fails_is_undone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, assert_same: Any
) -> None:
    learner = learner_of(checkpoint, **{"learned.max_pixels": 1000}).learn(shelf("a", "b"))
    before = copy.deepcopy(learner.state())

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fastcil.memory.codecs.learned.LearnedCodec.verify", stop)
        learner.learn(shelf("cc", "dd"))
    assert_same(learner.state(), before)
    assert len(learner.memory.examples()) == 8
    large = {"e": np.zeros((2, 40, 30, 3), np.uint8), "f": np.zeros((2, 16, 18, 3), np.uint8)}
    with pytest.raises(FastcilError, match="an image has 40 x 30 pixels"):
        learner.learn(large)
    assert_same(learner.state(), before)


def test_refused_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    for says, options in (
        ("train one by 'fastcil codec train'", {"learned.checkpoint": None}),
        (r"gone\.safetensors", {"learned.checkpoint": tmp_path / "gone.safetensors"}),
        ("bytes beside exemplars; pass at least", {"memory": "9 kB"}),
        ("was trained for 32 to 1024", {"learned.lmbda": 5000.0}),
        ("an image has 16 x 18 pixels", {"learned.max_pixels": 200}),
    ):
        with pytest.raises(FastcilError, match=says):
            run(checkpoint, tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()


def test_a_growing_budget_without_room_for_weights_is_refused_before_training(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_nothing(*_: Any) -> None:
        raise AssertionError("a step was trained")

    monkeypatch.setattr(Trainer, "run", train_nothing)
    with pytest.raises(FastcilError, match="bytes beside exemplars; pass at least"):
        learner_of(checkpoint, memory="3 kB/class").learn(shelf("a", "b"))


@pytest.mark.parametrize("method", ["icarl+mnemonics", "foster", "darkpp", "gem"])
def test_compositions(method: str, checkpoint: Path) -> None:
    learner = learner_of(checkpoint, method, memory="4 images/class")
    learner.learn(shelf("a", "b")).learn(shelf("cc", "dd"))
    assert min(learner.memory.counts(4)) > 1 and learner.memory.units <= 16
    assert learner.memory.codec.name == "learned"


def test_methods_that_keep_nothing_need_no_codec() -> None:
    learner = learner_of(None, "finetune").learn(shelf("a", "b"))  # type: ignore[arg-type]
    assert "learned codec" not in learner.nbytes()
