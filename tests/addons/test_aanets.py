"""AANets: who trains what, alpha's steps against equations, and what survives a restart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcil.addons.aanets import AANets
from fastcil.contract import Batch, Recipe, evaluating
from fastcil.errors import CompositionError
from fastcil.memory.balance import drawn_subset
from fastcil.nn import (
    AggregatedBackbone,
    LinearHead,
    Network,
    linearize,
    resnet20,
    scale_convolutions,
)


class Staged(nn.Module):
    """A stem and two stages with batch norms, in float64."""

    out_channels = 5

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )
            for width in (4, 5)
        )
        self.double()

    def forward(self, images):
        x = self.stem(images.double())
        for stage in self.stages:
            x = stage(x)
        return x


def compose(world, **options):
    """A method of the user's own with the addon, after a first task, at the start of the second."""
    context = world.FakeContext(Staged)
    method = world.Mine(world.Mine.Config(), context)
    addon = AANets(AANets.Config(**{"lr": 0.05, **options}), context, method)
    world.Loop(method, context).run(world.begin(method, addon, world.make_task()))
    addon.end_task(world.make_task())
    return method, addon, context


def state_of(method):
    return {name: value.clone() for name, value in method.network.state_dict().items()}


def changed(before, method):
    after = method.network.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


class Steps:
    """A Stepper that keeps gradients, of a loss scaled as half precision has it."""

    lr = 0.1

    def __init__(self, parameters, scale=1.0):
        self.parameters = list(parameters)
        self.scale = scale
        self.gradients = []

    def update(self, loss):
        for parameter in self.parameters:
            parameter.grad = None
        (self.scale * loss).backward()
        gradients = [p.grad / self.scale for p in self.parameters if p.grad is not None]
        self.gradients.append(gradients)


def batch_of(count, seed, classes=4):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 12, 12, generator=generator).double()
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Batch(images, labels, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def test_two_branches_from_the_second_task_on(world):
    method, addon, context = compose(world)
    (first,) = method.network.extractors
    assert isinstance(first, Staged) and addon.retained() == [] and addon.records() == []
    task = world.make_task(1)
    stages = world.begin(method, addon, task)
    (made,) = method.network.extractors
    assert isinstance(made, AggregatedBackbone)
    weights = {n: v for n, v in first.state_dict().items() if v.ndim == 4}
    for name, value in weights.items():
        assert torch.equal(made.stable.state_dict()[name], value)
        assert torch.equal(made.plastic.state_dict()[name], value)
    world.Loop(method, context).run(stages)
    addon.end_task(task)
    learned = made.alphas.detach().clone()
    world.begin(method, addon, world.make_task(2))
    assert method.network.extractors[0] is made
    assert torch.equal(made.alphas, learned)
    for name, value in weights.items():
        assert torch.equal(made.stable.state_dict()[name], value)


def test_who_trains_what(world):
    method, addon, _ = compose(world)
    learn, rest = world.begin(method, addon, world.make_task(1))
    made, head = method.network.extractors[0], method.network.head
    network = {id(p) for p in method.network.parameters()}
    assert {id(p) for p in learn.parameters()} == network - {id(made.alphas)}
    assert [id(p) for p in rest.parameters()] == [id(p) for p in head.parameters()]
    (alpha,) = learn.companions
    assert list(alpha.parameters()) == [made.alphas] and rest.companions == []


def test_what_moves(world):
    method, addon, context = compose(world)
    learn, _ = world.begin(method, addon, world.make_task(1))
    # Both branches start the same, so that alpha has no gradient.
    apart(method.network.extractors[0])
    before = state_of(method)
    (alpha,) = learn.companions
    alpha_state = {"extractors.0.alphas"}
    loop = world.Loop(method, context)
    lane = world.Lane(alpha)
    loop.own(alpha, lane.parameters)
    method.train()
    alpha.step([loop.batch(alpha.streams[0], torch.Generator())], lane)
    assert changed(before, method) == alpha_state
    assert all(part.training for part in method.modules())
    before = state_of(method)
    learn.companions = []
    loop.run([learn])
    frozen = {f"extractors.0.stable.{n}" for n, v in Staged().state_dict().items() if v.ndim == 4}
    assert changed(before, method) == before.keys() - frozen - alpha_state


@pytest.mark.parametrize("options", [{"fixed": True}, {}])
def test_alpha_stays_where_nothing_weighs(world, options):
    method, addon, context = compose(world, **options)
    task = world.make_task(1)
    if not options:
        task = replace(task, exemplars=task.examples.select([]))
    stages = world.begin(method, addon, task)
    assert all(stage.companions == [] for stage in stages)
    world.Loop(method, context).run(stages[:1])
    assert method.network.extractors[0].alphas.tolist() == [0.5, 0.5]


def hand_written(made, head, alphas, batch):
    """Cross-entropy of the aggregated network with running statistics, module by module."""

    def norm(layer, x):
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    def stage(layers, x, scale):
        conv, bn, _ = layers
        weight = conv.weight * conv.scale if scale else conv.weight
        return norm(bn, F.conv2d(x, weight, padding=1)).relu()

    stem = made.stable.stem[0]
    x = F.conv2d(batch.images, stem.weight * stem.scale, stride=2, padding=1).relu()
    y = F.conv2d(batch.images, made.plastic.stem[0].weight, stride=2, padding=1).relu()
    for k in range(2):
        stable = stage(made.stable.stages[k], x, True)
        plastic = stage(made.plastic.stages[k], y, False)
        x = y = alphas[k] * stable + (1 - alphas[k]) * plastic
    return F.cross_entropy(x.mean((2, 3)) @ head.weight.T + head.bias, batch.labels)


def apart(made):
    """Moves the branches away from each other, so that alpha matters."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def by_hand(method, batch):
    made, head = method.network.extractors[0], method.network.head
    alphas = made.alphas.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(hand_written(made, head, alphas, batch), alphas)
    return gradient


def test_alphas_gradient_is_that_of_the_balanced_cross_entropy(world):
    method, addon, _ = compose(world)
    learn, _ = world.begin(method, addon, world.make_task(1))
    apart(method.network.extractors[0])
    method.train()
    (alpha,) = learn.companions
    batch, steps = batch_of(6, 1), Steps(alpha.parameters())
    losses = alpha.step([batch], steps)
    expected = by_hand(method, batch)
    assert expected.abs().min() > 1e-5
    torch.testing.assert_close(steps.gradients[0][0], expected, rtol=1e-10, atol=1e-14)
    found = hand_written(
        method.network.extractors[0],
        method.network.head,
        method.network.extractors[0].alphas,
        batch,
    )
    torch.testing.assert_close(losses["balanced"], found.detach())


def test_alphas_recipe_follows_the_stage(world):
    method, addon, _ = compose(world, lr=0.03)
    recipe = Recipe(
        epochs=9, lr=2.0, schedule="step", milestones=(4,), optimizer="adam", clip=1.0, batch_size=3
    )
    method.config = method.Config(recipe)
    learn, _ = world.begin(method, addon, world.make_task(1))
    found = learn.companions[0].recipe
    assert [found.lr_at(e) for e in (0, 3, 4, 8)] == pytest.approx([0.03, 0.03, 0.003, 0.003])
    assert (found.optimizer, found.clip, found.weight_decay) == ("sgd", 0.0, 0.0)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_summed_gradients(world, scale):
    """Each step follows the sum of all gradients, those of the method's loss included."""
    method, addon, _ = compose(world, gradients="summed")
    learn, _ = world.begin(method, addon, world.make_task(1))
    made = method.network.extractors[0]
    apart(made)
    (alpha,) = learn.companions
    expected = torch.zeros(2, dtype=torch.float64)
    for epoch in range(2):
        for number in range(2):
            batch = batch_of(5, 10 * epoch + number)
            for parameter in method.parameters():
                parameter.requires_grad_(False)
            steps = Steps(learn.parameters(), scale)
            for parameter in steps.parameters:
                parameter.requires_grad_(True)
            with evaluating(method):
                losses = learn.step([batch], steps)
                alphas = made.alphas.detach().clone().requires_grad_()
                named = {"network.extractors.0.alphas": alphas}
                again = sum(learn.loss(batch, named).values())
                expected += torch.autograd.grad(again, alphas)[0]
                plain = torch.autograd.grad(sum(learn.loss(batch).values()), steps.parameters)
            assert losses.keys() == {"classification", "pull"} and made.alphas.grad is None
            for mine, theirs in zip(steps.gradients[0], plain, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-13)
        made.alphas.requires_grad_(True)
        batch, steps = batch_of(6, 10 * epoch + 5), Steps(alpha.parameters(), scale)
        expected += by_hand(method, batch)
        alpha.step([batch], steps)
        torch.testing.assert_close(steps.gradients[0][0], expected, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(addon.summed, expected, rtol=1e-9, atol=1e-13)


def test_a_gradient_that_overflows_is_left_out_of_the_sum(world):
    method, addon, _ = compose(world, gradients="summed")
    learn, _ = world.begin(method, addon, world.make_task(1))
    (alpha,) = learn.companions
    batch = batch_of(4, 0)
    alpha.step([replace(batch, images=batch.images * float("inf"))], Steps(alpha.parameters()))
    assert addon.summed.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("per_class", "new"), [(0, 2), (1, 1), (3, 3), (20, 4)], ids=["most", "1", "3", "all"]
)
def test_the_balanced_data(world, per_class, new):
    task = world.make_task(1)  # 4 images each of classes 2 and 3, 2 exemplars of 0 and 1
    positions = drawn_subset(task, per_class)
    labels = torch.cat([task.examples.labels, task.exemplars.labels])[positions]
    assert labels.bincount().tolist() == [2, 2, new, new]
    assert positions.tolist() == sorted(set(positions.tolist()))
    assert torch.equal(positions, drawn_subset(task, per_class))
    method, addon, _ = compose(world, per_class=per_class)
    learn, _ = world.begin(method, addon, task)
    (stream,) = learn.companions[0].streams
    assert torch.equal(stream.subset, positions)
    assert stream.parts[0] is task.examples and stream.parts[1] is task.exemplars


@pytest.mark.parametrize(("most", "steps"), [(1, 1), (2, 0), (501, 0)])
def test_one_pass_or_the_most_steps(world, most, steps):
    """Of 8 images, four a batch: two steps."""
    method, addon, _ = compose(world, most_steps=most)
    method.config = method.Config(replace(method.config.recipe, batch_size=4))
    learn, _ = world.begin(method, addon, world.make_task(1))
    assert len(learn.companions[0].streams[0]) == 8
    assert learn.companions[0].steps == steps


def test_what_is_kept_and_shown(world):
    method, addon, context = compose(world)
    history = []
    for index in (1, 2):
        task = world.make_task(index)
        world.Loop(method, context).run(world.begin(method, addon, task))
        addon.end_task(task)
        history.append(method.network.extractors[0].alphas.tolist())
    (entry,) = addon.retained()
    assert entry.kind == "network"
    single = sum(t.numel() * t.element_size() for t in Staged().state_dict().values())
    scales = 8 * (4 * 3 + 4 * 4 + 5 * 4)
    assert entry.nbytes == single + scales + 2 * 8
    (record,) = addon.records()
    assert record.payload["x"] == [1, 2]
    for level in range(2):
        shown = record.payload["y"][f"level {level + 1}"]
        assert shown == pytest.approx([alphas[level] for alphas in history])
        assert shown[0] != 0.5 != shown[1]


def refuse(world, method_class=None, backbone=Staged):
    context = world.FakeContext(backbone)
    base = method_class or world.Mine
    AANets(AANets.Config(), context, base(base.Config(), context))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"keeps": "nothing"}, "by exemplars, and Odd keeps nothing; compose"),
        ({"keeps": "everything"}, "by exemplars, and Odd keeps everything"),
        ({"adds_extractors": True}, "of a method's one extractor, and Odd has several"),
    ],
)
def test_methods_refused(world, attributes, message):
    with pytest.raises(CompositionError, match=message):
        refuse(world, type("Odd", (world.Mine,), attributes))


def test_backbones_refused(world):
    with pytest.raises(CompositionError, match="aanets' makes two branches, but branch Backbone"):
        refuse(world, backbone=world.Backbone)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [Staged(), Staged()], "has several"),
        (lambda: [linearize(resnet20(width=2))], "branch Linearized has no module stem"),
        (lambda: [scale_convolutions(Staged())], "Mine has frozen the convolutions"),
    ],
)
def test_networks_refused_when_they_are_there(world, make, message):
    method, addon, _ = compose(world)
    extractors = make()
    method.network = Network(extractors, LinearHead(sum(e.out_channels for e in extractors), 2))
    with pytest.raises(CompositionError, match=message):
        addon.begin_task(world.make_task(1))


def test_a_method_without_a_primary_stage_is_refused(world):
    method, addon, _ = compose(world)
    stages = method.stages(world.make_task())
    with pytest.raises(CompositionError, match="Mine marks none of its stages with primary=True"):
        addon.stages(world.make_task(), [replace(stage, primary=False) for stage in stages])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"per_class": -1}, "per_class is -1"),
        ({"most_steps": 0}, "most_steps is 0"),
        ({"gradients": "all"}, "gradients is 'all'; it must be one of own, summed"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        AANets.Config(**options)
