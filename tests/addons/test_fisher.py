"""The traced eigenvalue: what it is of, when it is taken, that it only watches and goes on."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import train
from fastcil.addons.fisher import Fisher
from fastcil.contract import Recipe, scale_epochs
from fastcil.curvature import largest_eigenvalue
from fastcil.engine.plots import plot_record
from fastcil.engine.records import record_to_plain
from fastcil.engine.seed_run import SeedRun
from fastcil.errors import CompositionError, FastcilError


@pytest.fixture
def context(world):
    class Context(world.FakeContext):
        def scan(self, function, examples, look="centre", flip=False):
            assert look == "centre" and not flip
            with torch.no_grad():
                return function(self.images(examples))

    return Context()


def make(world, context, **options):
    method = world.Mine(world.Mine.Config(), context)
    return method, Fisher(Fisher.Config(**options), context, method)


def curve(addon):
    (record,) = addon.records()
    assert record.kind == "curve"
    return record


@pytest.mark.parametrize("given", ["auto", "categorical", "gaussian"])
@pytest.mark.parametrize("own", ["categorical", "gaussian"])
def test_the_method_s_likelihood_is_taken_unless_another_is_given(world, context, given, own):
    method, addon = make(world, context, likelihood=given)
    method.likelihood = own
    task = world.make_task()
    world.begin(method, addon, task)[0].before_epoch[0](0)
    used = own if given == "auto" else given
    seen = context.images(task.examples)
    wanted = largest_eigenvalue(method.network, seen, used)
    assert float(addon.measured[0, 2]) == pytest.approx(wanted, rel=1e-4)
    assert ("squared error" in curve(addon).title) == (used == "gaussian")


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_values_are_those_of_the_network_as_it_was(world, context, likelihood):
    method, addon = make(world, context, likelihood=likelihood)
    task = world.make_task()
    learn, rest = world.begin(method, addon, task)
    expected = []

    def look(epoch=None):
        network = copy.deepcopy(method.network).requires_grad_(True)
        seen = context.images(task.examples)
        expected.append(largest_eigenvalue(network, seen, likelihood))

    learn.before_epoch.append(look)
    finish = learn.finish
    learn.finish = lambda: (look(), finish())
    world.Loop(method, context).run([learn, rest])
    method.end_task(task)
    addon.end_task(task)
    record = curve(addon)
    assert record.payload["x"] == [0, 1, 2, 3, 4] and len(expected) == 5
    # The sample's order differs, and with it the last bits.
    assert record.payload["y"]["largest eigenvalue"] == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0 and len({round(v, 9) for v in expected}) == 5
    assert ("squared error" in record.title) == (likelihood == "gaussian")


def test_epochs_run_on_over_tasks_and_the_line_breaks_between(world, context):
    method, addon = make(world, context, every=3)
    for index in range(3):
        task = world.make_task(index)
        stages = world.begin(method, addon, task)
        world.Loop(method, context).run(stages)
        addon.end_task(task)
    record = curve(addon)
    payload = record.payload
    assert payload["x"] == [0, 3, 4, 4, 4, 7, 8, 8, 8, 11, 12]
    values = payload["y"]["largest eigenvalue"]
    assert [k for k, value in enumerate(values) if value is None] == [3, 7]
    assert payload["boundaries"] == [4, 8]
    plain = json.loads(json.dumps(record_to_plain(record), allow_nan=False))
    (axes,) = plot_record(plain).axes
    assert np.isnan(axes.lines[0].get_ydata()[[3, 7]]).all() and axes.get_xlabel() == "epoch"


def test_only_what_the_stage_trains_counts_and_every_primary_stage_is_watched(world, context):
    method, addon = make(world, context)
    task = world.make_task()
    torch.manual_seed(0)
    method.begin_task(task)
    learn, rest = method.stages(task)
    ended = []
    rest = dataclasses.replace(
        rest,
        primary=True,
        recipe=Recipe(epochs=2, lr=0.01),
        finish=lambda: ended.append(len(addon.measured)),
    )
    world.Loop(method, context).run(addon.stages(task, [learn, rest]))
    addon.end_task(task)
    assert ended == [8], "a finish of the stage's own comes after"
    assert curve(addon).payload["x"] == [0, 1, 2, 3, 4, 4, 5, 6] and addon.begun.tolist() == [0, 6]
    network, seen = method.network, context.images(task.examples)
    head = largest_eigenvalue(network, seen, parameters=network.head.parameters())
    whole = largest_eigenvalue(network, seen, parameters=network.parameters())
    assert float(addon.measured[-1, 2]) == pytest.approx(head, rel=1e-4) and head < whole


def test_the_sample_is_fixed_and_of_the_task_alone(world, context):
    seen = []

    def scan(function, examples, **options):
        seen.append(examples)
        return function(context.images(examples))

    for _ in range(2):
        method, addon = make(world, context, samples=3)
        addon.context = type("Spy", (), {"scan": staticmethod(scan)})()
        world.begin(method, addon, world.make_task(per_class=5))[0].before_epoch[0](0)
    first, second = (world.FakeContext().read(examples) for examples in seen)
    assert len(first) == 3 and torch.equal(first, second)


def test_it_goes_on_from_saved_state(world, context):
    method, addon = make(world, context)
    task = world.make_task()
    whole = world.begin(method, addon, task)
    loop = world.Loop(method, context)
    loop.run(whole, until=2)
    state, structure = {k: v.clone() for k, v in addon.tensors().items()}, addon.structure()
    weights = {k: v.clone() for k, v in method.tensors().items()}
    before = addon.measured.clone()
    again, restored = make(world, context)
    again.begin_task(task)
    again.load_tensors(weights)
    restored.restore(structure)
    restored.load_tensors(state)
    (stage, _) = restored.stages(task, again.stages(task))
    stage.before_epoch[0](2)
    whole[0].before_epoch[0](2)
    assert torch.equal(restored.measured[:2], before[:2])
    assert torch.equal(restored.measured, addon.measured) and len(addon.measured) == 3


def test_a_value_that_is_not_finite_is_a_gap(world, context):
    method, addon = make(world, context)
    (learn, _) = world.begin(method, addon, world.make_task())
    method.network.head.bias.data[0] = torch.nan
    learn.before_epoch[0](0)
    assert curve(addon).payload["y"]["largest eigenvalue"] == [None]


def test_a_method_without_a_stage_that_learns_new_data(world, context):
    method, addon = make(world, context)
    task = world.make_task()
    method.begin_task(task)
    stages = [dataclasses.replace(stage, primary=False) for stage in method.stages(task)]
    with pytest.raises(CompositionError, match="Mine marks none of its stages with primary"):
        addon.stages(task, stages)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"likelihood": "poisson"}, "likelihood is 'poisson'; it must be one of auto, categorical"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(FastcilError, match=words):
        Fisher.Config(**options)


def test_every_is_counted_in_epochs():
    assert scale_epochs(Fisher.Config(every=10), 0.5).every == 5


OPTIONS = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 12,
    "engine.progress": False,
    "engine.checkpoint_seconds": 0,
    "augment.size": 12,
    "backbone": ConvNet,
}


def images(per_class: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    labels = [label for label in range(4) for _ in range(per_class)]
    return rng.integers(0, 256, (len(labels), 12, 12, 3), np.uint8), labels


DATA = images(7, 0), images(2, 1)


def run(method: str, **options: Any):
    return train(method, DATA, "lfs-2", "8 images", **{**OPTIONS, **options})


@pytest.mark.parametrize(
    "method", ["finetune", "der", "foster", "dlcft", "si", "darkpp", "lwf", "er+cam"]
)
def test_training_is_the_same_with_and_without(method, assert_same):
    watched, alone = run(f"{method}+fisher", **{"fisher.samples": 9}), run(method)
    assert_same(watched.learner.method.tensors(), alone.learner.method.tensors())
    for a, b in zip(watched.outcomes[0].tasks, alone.outcomes[0].tasks, strict=True):
        assert a.correct == b.correct and a.nbytes == b.nbytes
        (record,) = (r for r in a.records if r["title"].startswith("Largest eigenvalue"))
        values = record["payload"]["y"]["largest eigenvalue"]
        assert all(v > 0 for v in values if v is not None)


@pytest.fixture(scope="session")
def assert_same():
    def check(a, b):
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items())

    return check


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stopped_run_goes_on_to_the_same_curve(stop, tmp_path: Path, monkeypatch):
    options = {"finetune.later.epochs": 300, "finetune.first.epochs": 300, "fisher.every": 1}
    whole = run("finetune+fisher", **options)
    save, steps = SeedRun._save_between_steps, []

    def saved(seed_run, trainer):
        save(seed_run, trainer)
        steps.append(1)
        if len(steps) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(SeedRun, "_save_between_steps", saved)
    with pytest.raises(KeyboardInterrupt):
        run("finetune+fisher", run_dir=tmp_path / "run", **options)
    resumed = run("finetune+fisher", run_dir=tmp_path / "run", **options)
    for a, b in zip(whole.outcomes[0].tasks, resumed.outcomes[0].tasks, strict=True):
        assert a.records == b.records and a.correct == b.correct


def test_mlps_trained_by_both_losses():
    """The commands behind Shon et al. 2022, Fig. 3, in small."""
    options = {"backbone": None, "network.name": "mlp", "network.width": 8}
    softmax = run("finetune+fisher", **options)
    squared = run("dlcft+fisher", **options)
    nonlinear = run("dlcft+fisher", **options, **{"dlcft.loss": "softmax", "dlcft.linear": False})
    for result, words in (
        (softmax, "softmax cross-entropy"),
        (squared, "squared error"),
        (nonlinear, "softmax cross-entropy"),
    ):
        assert any(words in r["title"] for r in result.outcomes[0].tasks[-1].records)
