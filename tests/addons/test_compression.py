"""The artifact augmentation's schedule, and what is counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastcil.addons.cam import CAM
from fastcil.addons.cim import CIM
from fastcil.addons.compression import BoxConfig, Compression
from fastcil.contract import replace_batch_size, scale_epochs
from fastcil.errors import CompositionError, FastcilError


class Locator:
    """Gives every image a box that says how often it was asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self, examples):
        self.asked += 1
        return torch.full((len(examples), 4), self.asked, dtype=torch.int16)


def attached(world, config, task):
    """Stages of a method with views, the locator, and the state behind them."""
    method = world.Mine(world.Mine.Config(), world.FakeContext())
    method.begin_task(task)
    compression, locate = Compression(config), Locator()
    compression.begin_task(task)
    stages = method.stages(task)
    compression.simulate(task, stages, locate)
    return SimpleNamespace(stages=stages, locate=locate, compression=compression)


# epochs, refresh, step, max -> the chance and the number of box makings after some epochs.
SCHEDULES = [
    (
        200,
        {},
        {0: (0.0, 0), 39: (0.0, 0), 40: (0.1, 1), 80: (0.2, 2), 159: (0.3, 3), 199: (0.4, 4)},
    ),
    (170, {}, {0: (0.0, 0), 121: (0.3, 3), 169: (0.4, 4)}),
    (300, {}, {239: (0.4, 5), 299: (0.4, 7)}),
    (300, {"artifact_max": 1.0}, {299: (0.7, 7)}),
    (8, {"refresh": 2, "artifact_step": 0.25}, {1: (0.0, 0), 3: (0.25, 1), 7: (0.4, 3)}),
    (100, {"artifact_step": 0.0}, {99: (0.0, 0)}),
]


@pytest.mark.parametrize(("epochs", "options", "expected"), SCHEDULES)
def test_schedule(world, epochs, options, expected):
    task = world.make_task()
    made = attached(world, BoxConfig(**options), task)
    (call,) = made.stages[0].before_epoch
    views = made.stages[0].streams[0].views
    for epoch in range(epochs):
        call(epoch)
        if epoch in expected:
            chance, asked = expected[epoch]
            assert (views.probability, made.locate.asked) == (pytest.approx(chance), asked)
            assert float(made.compression.chance) == views.probability
            if asked:
                assert views.boxes.tolist() == [[asked] * 4] * len(task.examples)
                assert torch.equal(made.compression.boxes, views.boxes)


def test_shortened_runs_shrink_the_refresh():
    assert scale_epochs(CAM.Config(), 0.1).refresh == 4
    short = scale_epochs(CIM.Config(), 0.05)
    assert (short.refresh, short.mask.epochs) == (2, 10)


def test_the_mask_stage_keeps_its_batch_size():
    assert replace_batch_size(CIM.Config(), 64).mask.batch_size == 16


def test_only_streams_that_start_with_new_data_are_viewed(world):
    made = attached(world, BoxConfig(ratio=2.0), world.make_task(1))
    learn, rest = made.stages
    assert learn.streams[0].views is rest.streams[0].views
    assert learn.streams[0].views.ratio == 2.0
    assert rest.streams[1].views is None
    assert rest.before_epoch == []


def test_other_stages_go_on_at_the_last_chance_or_not_at_all(world):
    made = attached(world, BoxConfig(), world.make_task(1))
    for epoch in range(170):
        made.stages[0].before_epoch[0](epoch)
    assert made.stages[1].streams[0].views.probability == 0.4
    made = attached(world, BoxConfig(compression_stage=False), world.make_task(1))
    assert made.stages[0].streams[0].views is not None
    assert made.stages[1].streams[0].views is None


def test_without_artifacts_nothing_changes(world):
    made = attached(world, BoxConfig(artifact=False), world.make_task())
    assert all(stream.views is None for stage in made.stages for stream in stage.streams)
    assert made.stages[0].before_epoch == []


def test_until_the_first_refresh_views_hold_whole_images(world):
    task = world.make_task()
    views = attached(world, BoxConfig(), task).stages[0].streams[0].views
    assert views.probability == 0.0
    assert views.boxes[:, 2:].tolist() == task.examples.images.sizes.tolist()


def test_two_addons_that_simulate_are_refused(world):
    task = world.make_task()
    made = attached(world, BoxConfig(), task)
    with pytest.raises(CompositionError, match="two addons"):
        made.compression.simulate(task, made.stages, made.locate)


def test_footprints_are_means_by_task(world):
    compression = Compression(BoxConfig(ratio=4.0))
    for index in range(3):
        task = world.make_task(index)
        compression.begin_task(task)
        if index == 1:
            continue
        sizes = task.examples.images.sizes
        half = torch.cat([torch.zeros_like(sizes), sizes // 2], 1)
        for start in (0, 3):
            part = task.examples.select(list(range(len(task.examples)))[start : start + 3])
            compression.count(half[start : start + 3], part)
    payload = compression.record().payload
    assert payload["x"] == [0, 2]
    share, rate = payload["y"].values()
    assert share == [pytest.approx(0.25)] * 2
    assert rate == [pytest.approx(0.25 + 0.75 / 4)] * 2


BAD = [
    ({"threshold": 1.0}, "threshold is 1.0"),
    ({"threshold": -0.1}, "threshold"),
    ({"ratio": 0.5}, "ratio is 0.5"),
    ({"ratio": float("nan")}, "ratio"),
    ({"refresh": 0}, "refresh is 0"),
    ({"artifact_step": 2.0}, "artifact_step"),
    ({"artifact_max": -1.0}, "artifact_max"),
]


@pytest.mark.parametrize(("options", "named"), BAD)
def test_bad_settings_are_named(options, named):
    for config in (CAM.Config, CIM.Config):
        with pytest.raises(FastcilError, match=named):
            config(**options)


@pytest.mark.parametrize("name", ["inner_lr", "mu", "mu_prime", "steps_per_class"])
def test_bad_mask_settings_are_named(name):
    with pytest.raises(FastcilError, match=f"{name} is -1"):
        CIM.Config(**{name: -1.0})
