"""Runs of EEC: within budgets, stopped and gone on with, composed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from backbones import ConvNet

from fastcil import Learner, Result, train
from fastcil.engine.seed_run import SeedRun
from fastcil.engine.state import load_state
from fastcil.errors import CompositionError, FastcilError


def data(per_class, seed):
    """Images of several sizes, of five classes."""
    rng = np.random.default_rng(seed)
    labels = [label for label in range(5) for _ in range(per_class)]
    sides = [rng.integers(14, 22, 2) for _ in labels]
    return [rng.integers(0, 256, (*side, 3), np.uint8) for side in sides], labels


DATA = data(9, 0), data(2, 1)


def run(run_dir: Path | None, memory="900B", **options) -> Result:
    settings = {
        "engine.epoch_scale": 0.02,
        "engine.batch_size": 12,
        "engine.progress": False,
        "engine.checkpoint_seconds": 0,
        "augment.size": 12,
        "eec.width": 4,
        **options,
    }
    return train("eec", DATA, "b2-inc2", memory, run_dir=run_dir, backbone=ConvNet, **settings)


@pytest.mark.parametrize(
    "memory, options",
    [("900B", {}), ("1500B", {"eec.decoders": 1.0}), ("1MB", {"eec.head": "task"})],
)
def test_stopped_in_the_middle_of_any_stage_it_goes_on(
    memory, options, tmp_path, monkeypatch, assert_same
):
    """With clusters, from which images are drawn, one autoencoder for all, and several."""
    whole = run(tmp_path / "whole", memory, **options)
    save, steps, stops = SeedRun._save_between_steps, 0, 0

    def saved(seed_run, trainer):
        nonlocal steps
        save(seed_run, trainer)
        steps += 1
        if steps % 4 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(SeedRun, "_save_between_steps", saved)
    while True:
        try:
            run(tmp_path / "stopped", memory, **options)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 4
    ends = [tmp_path / name / "seed-0" / "learner.safetensors" for name in ("whole", "stopped")]
    assert_same(*({**load_state(end), "settings": None} for end in ends))
    counts = whole.learner.method.episodes.counts
    decoders = len(whole.learner.method.episodes.decoders)
    assert bool((counts > 1).any()) == (memory != "1MB")
    assert decoders == {"900B": 1, "1500B": 3, "1MB": 3}[memory]


@pytest.mark.parametrize("memory", ["700B", "901B", "5000B", "300B/class", "2 images/class"])
def test_budgets_of_a_run(memory):
    result = run(None, memory)
    for task in result.outcomes[0].tasks:
        limit = task.limit if "B" in memory else task.limit * (3 * 21 * 21 + 28)
        assert 0 < task.nbytes["episodes"] <= limit
    assert [record.title for record in result.learner.method.records()] == ["Images made again"]


def test_a_budget_too_small_for_a_run_is_a_sentence():
    with pytest.raises(FastcilError, match="give it at least"):
        run(None, "300B")


def test_a_saved_learner_goes_on(tmp_path, assert_same):
    learner = run(None).learner
    learner.save(tmp_path / "learner")
    again = Learner.load(tmp_path / "learner", backbone=ConvNet)
    rng = np.random.default_rng(3)
    more = {"new": rng.integers(0, 256, (8, 16, 16, 3), np.uint8)}
    for one in (learner, again):
        one.learn(more)
    assert_same(learner.state(), again.state())


@pytest.mark.parametrize("addon", ["cam", "cim", "mrdc", "mnemonics", "aanets"])
def test_addons_on_exemplars_are_refused(addon):
    with pytest.raises(CompositionError, match="EEC keeps nothing"):
        train(f"eec+{addon}", DATA, "b2-inc2", "1MB", backbone=ConvNet)
