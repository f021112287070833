"""LEC on methods of the user's own: what is added, what a step minimises, what remains."""

from __future__ import annotations

import copy
from typing import ClassVar

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import Learner
from fastcil.addons.lec import LEC
from fastcil.contract import Retained, Stage, evaluating
from fastcil.errors import CompositionError, FastcilError
from fastcil.nn import CosineHead, ExpandedBackbone, Network, scale_convolutions


@pytest.fixture
def reader(world):
    """A context that can scan."""

    class Reader(world.FakeContext):
        @torch.no_grad()
        def scan(self, function, examples):
            return function(self.images(examples))

    return Reader()


def compose(world, context, **options):
    """A user's method with the addon, after a first task."""
    method = world.Mine(world.Mine.Config(), context)
    addon = LEC(LEC.Config(**options), context, method)
    world.Loop(method, context).run(world.begin(method, addon, world.make_task()))
    addon.end_task(world.make_task())
    return method, addon


class Steps:
    """A Stepper that keeps the gradients of every loss it is given."""

    lr = 0.1

    def __init__(self, parameters):
        self.parameters = dict(parameters)
        self.gradients = []

    def update(self, loss):
        for parameter in self.parameters.values():
            parameter.grad = None
        loss.backward()
        found = {n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None}
        self.gradients.append(found)


def test_nodes_come_with_the_second_task(world, reader):
    method, addon = compose(world, reader, gamma=0.6)
    (plain,) = method.network.extractors
    assert isinstance(plain, world.Backbone) and addon.retained() == [] == addon.records()
    world.begin(method, addon, world.make_task(1))
    (made,) = method.network.extractors
    assert isinstance(made, ExpandedBackbone) and made.backbone is plain
    newest = made.newest
    assert newest.weight.dtype == torch.float64 and newest.nodes == 5 and made.gamma == 0.6
    world.begin(method, addon, world.make_task(2))
    assert made.each()[0] is newest and len(made.each()) == 2
    assert method.network.head.in_features == 5


class Twice(Stage):
    """A stage with steps of its own kind, which never asks its objective."""

    def step(self, batches, stepper):
        for part in (slice(0, 4), slice(4, 8)):
            images, labels = batches[0].images[part], batches[0].labels[part]
            loss = torch.nn.functional.cross_entropy(self.method.network(images), labels)
            stepper.update(loss)
        return {"classification": loss.detach()}


@pytest.mark.parametrize("kind", [Stage, Twice])
@pytest.mark.parametrize("expansion", ["ne", "nc", "sa"])
def test_every_update_has_the_pressure_beside_it(world, reader, expansion, kind):
    weight = 0.3
    method, addon = compose(world, reader, expansion=expansion, compression_weight=weight, tau=0.1)
    task = world.make_task(1)
    stages = world.begin(method, addon, task)
    plain = method.stages(task)[0]
    plain = kind(**{k: v for k, v in vars(plain).items() if k in Stage.__dataclass_fields__})
    method.eval()
    batch = world.Loop(method, reader).batch(plain.streams[0], torch.Generator().manual_seed(0))
    alone, beside = Steps(method.named_parameters()), Steps(method.named_parameters())
    plain.step([batch], alone)
    pressed = copy.copy(plain)
    addon.stages(task, [pressed])
    losses = pressed.step([batch], beside)
    newest = method.network.extractors[0].newest
    maps = method.network.extractors[0].backbone(batch.images).detach()
    expected = weight * newest.compression(maps, 0.5)
    assert ("compression" in losses) == (expansion != "ne")
    assert len(alone.gradients) == len(beside.gradients) == (2 if kind is Twice else 1)
    if expansion != "ne":
        torch.testing.assert_close(losses["compression"], expected.detach())
        wanted = dict(zip(("weight", "level"), [newest.weight, newest.level], strict=True))
        wanted |= {"s": newest.s} if expansion == "nc" else {}
        slopes = torch.autograd.grad(expected, list(wanted.values()), allow_unused=True)
        prefix = "network.extractors.0.expansions.0."
        for before in alone.gradients:
            for name, slope in zip(wanted, slopes, strict=True):
                if slope is not None:
                    before[prefix + name] = before.get(prefix + name, 0) + slope
    for before, after in zip(alone.gradients, beside.gradients, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, msg=name)
    assert stages[0].name == "learn"


def test_who_trains_what(world, reader):
    method, addon = compose(world, reader)
    world.begin(method, addon, world.make_task(1))
    learn, rest = world.begin(method, addon, world.make_task(2))
    older, newer = method.network.extractors[0].each()
    trained = {id(p) for p in learn.parameters()}
    everything = {id(p) for p in method.network.parameters()}
    assert trained == everything - {id(p) for p in older.parameters()}
    assert id(newer.level) in trained
    assert [id(p) for p in rest.parameters()] == [id(p) for p in method.network.head.parameters()]


def test_a_task_ends_with_the_nodes_it_uses(world, reader):
    method, addon = compose(world, reader)
    task = world.make_task(1)
    stages = world.begin(method, addon, task)
    expanded = method.network.extractors[0]
    finish, stages[0].finish = stages[0].finish, None
    expanded.newest.weight.data[1:3] = -1.0
    expanded.newest.requires_grad_(False)
    world.Loop(method, reader).run(stages[:1], until=3)
    assert float(expanded.newest.beta) == 3.0
    images = reader.images(task.examples)
    with evaluating(method), torch.no_grad():
        newest, maps = expanded.newest, expanded.backbone(images)
        alpha = newest.alpha(newest.responses(maps))[:, :, 0, 0]
        keep = (alpha >= 0.5).any(0)
        masked = newest(maps).mean((2, 3)) * keep
        expected = method.network.head(0.8 * maps.mean((2, 3)) + masked)
    finish()
    assert expanded.newest.nodes == keep.sum() < 5
    with evaluating(method), torch.no_grad():
        torch.testing.assert_close(method.logits(images), expected)
    (entry,) = addon.retained()
    assert entry.kind == "network" and entry.nbytes > 0
    (record,) = addon.records()
    assert record.payload["y"]["nodes kept, of 1"] == [int(keep.sum()) / 5]


@pytest.mark.parametrize("spoil", ["everything", "several", "curvature", "head", "scaled"])
def test_what_it_cannot_serve_is_refused_with_a_reason(world, reader, spoil):
    class Other(world.Mine):
        keeps: ClassVar[str] = "everything" if spoil == "everything" else "exemplars"
        adds_extractors: ClassVar[bool] = spoil == "several"

        def retained(self):
            return [Retained("importances", "curvature", {})] if spoil == "curvature" else []

        def begin_task(self, task):
            super().begin_task(task)
            if spoil == "head":
                self.network = Network(self.network.extractors, CosineHead(5, 2).double())
            if spoil == "scaled":
                scale_convolutions(self.network.extractors[0])

    reasons = {
        "everything": "keeps everything",
        "several": "has several",
        "curvature": "how much",
        "head": "classifies by CosineHead",
        "scaled": "is 'scaled'",
    }
    method = Other(Other.Config(), reader)
    with pytest.raises(CompositionError, match=reasons[spoil]) as caught:
        world.begin(method, LEC(LEC.Config(), reader, method), world.make_task())
    assert "'lec'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"expansion": "none"}, "expansion is 'none'"),
        ({"tau": 0.0}, "tau is 0.0"),
        ({"price": 1.0}, "price is 1.0"),
        ({"gamma": -1.0}, "gamma is -1.0"),
    ],
)
def test_bad_settings_are_a_sentence(options, says):
    with pytest.raises(FastcilError, match=says):
        LEC.Config(**options)


def test_dark_without_memory_learns_saves_and_loads(tmp_path):
    """Table 6's composition."""
    options = {"engine.epoch_scale": 0.04, "engine.batch_size": 8, "engine.progress": False}
    learner = Learner("dark+lec", memory="none", backbone=ConvNet, **options)
    rng = np.random.default_rng(0)
    shelf = {name: rng.integers(0, 256, (7, 16, 18, 3), np.uint8) for name in "abcdef"}
    for names in ("ab", "cd", "ef"):
        learner.learn({name: shelf[name] for name in names})
    assert len(learner.method.network.extractors[0].each()) == 2
    assert len(learner.memory.examples()) == 0
    learner.save(tmp_path / "learner.safetensors")
    again = Learner.load(tmp_path / "learner.safetensors", backbone=ConvNet)
    for one in (learner, again):
        one.learn({"g": shelf["a"][::-1].copy()})
    assert torch.equal(again.predict(shelf["c"]).scores, learner.predict(shelf["c"]).scores)
