"""Steps of mnemonics training against Liu et al. 2020, Sec. 4, written out by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcil.addons.mnemonics import Mnemonics
from fastcil.contract import Batch, Task, evaluating
from fastcil.data import Augmentation, Examples, ImageStore
from fastcil.errors import CompositionError, FastcilError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
LOOK = Augmentation(16, crop="none", mean=MEAN, std=STD)


def make_images(labels, seed, side=16) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(40, 216, (len(labels), side, side, 3), generator=generator)
    return Examples(ImageStore.from_batch(pixels.to(torch.uint8)), torch.tensor(labels))


def normalised(examples: Examples) -> Tensor:
    """[N, 3, H, W] float64, image by image."""
    images = [examples.images.image(i).double() / 255 for i in range(len(examples))]
    return ((torch.stack(images) - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


TASK = Task(
    index=1,
    classes=(2, 3),
    known=2,
    examples=make_images([2, 3, 3, 2, 2], seed=1),
    exemplars=make_images([0, 0, 0, 1, 1, 2, 2, 3], seed=2),
)
NEW, OLD = [5, 6, 7], [0, 1, 2, 3, 4]


@pytest.fixture
def compose(world):
    """A method in mid-training, the addon, and the stages of its refinement, begun."""

    def make(task=TASK, double=True, method_class=None, **options):
        class Context(world.FakeContext):
            augmentation = LOOK

            def scan(self, function, examples, look="centre", flip=False):
                with torch.no_grad():
                    return function(normalised(examples))

        context = Context()
        method = (method_class or world.Mine)(world.Mine.Config(), context)
        torch.manual_seed(3)
        method.begin_task(replace(task, index=0, known=0))
        for extractor in method.network.extractors:
            extractor.norm.running_mean.normal_()
            extractor.norm.running_var.uniform_(0.5, 2.0)
        addon = Mnemonics(Mnemonics.Config(**options), context, method)
        addon.begin_task(task)
        stages = addon.refinements(task)
        method.train()
        for stage in stages:
            stage.begin()
        if double:
            addon.pixels.double()
        return method, addon, stages

    return make


class Catcher:
    """A Stepper that only differentiates."""

    lr = 1.0

    def __init__(self, values: nn.Parameter) -> None:
        self.values = values
        self.gradient = torch.empty(0)

    def update(self, loss: Tensor) -> None:
        (self.gradient,) = torch.autograd.grad(loss, [self.values])


def gradient_of(stage, batches) -> Tensor:
    """The gradient in the pixels, one image a row: [N, 16, 16, 3]."""
    (values,) = stage.parameters()
    for parameter in stage.method.parameters():
        parameter.requires_grad_(False)
    catcher = Catcher(values)
    stage.step(batches, catcher)
    return catcher.gradient.view(-1, 16, 16, 3)


def batch_of(examples: Examples, entries) -> Batch:
    """What the loader gives; of its images only those of new data are looked at."""
    entries = torch.tensor(entries)
    chosen = examples.select(entries)
    return Batch(normalised(chosen), chosen.labels, torch.zeros_like(entries), entries, entries)


def forward(weights: dict[str, Tensor], network: nn.Module, images: Tensor) -> Tensor:
    """The logits of the tests' backbone and head, in evaluation mode, by hand."""
    norm = network.extractors[0].norm
    x = F.conv2d(images, weights["conv1.weight"], stride=2, padding=1)
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    x = (weights["norm.weight"][:, None, None] * x + weights["norm.bias"][:, None, None]).relu()
    x = F.conv2d(x, weights["conv2.weight"], weights["conv2.bias"], stride=2, padding=1).relu()
    return x.mean((2, 3)) @ weights["head.weight"].T + weights["head.bias"]


def outer_by_hand(network, images, labels, seen, targets, steps, rate) -> Tensor:
    """L(theta'(E); D) with every derivative kept."""
    weights = {
        f"{prefix}{name}": parameter.detach().clone().requires_grad_()
        for prefix, part in (("", network.extractors[0]), ("head.", network.head))
        for name, parameter in part.named_parameters()
    }
    for _ in range(steps):
        loss = F.cross_entropy(forward(weights, network, images), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {k: w - rate * g for (k, w), g in zip(weights.items(), gradients, strict=True)}
    return F.cross_entropy(forward(weights, network, seen), targets)


def outer_by_training(network, images, labels, seen, targets, steps, rate) -> float:
    """The same number by training a copy in place, for finite differences."""
    network = copy.deepcopy(network).eval()
    network.requires_grad_(True)
    for _ in range(steps):
        network.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        for parameter in network.parameters():
            parameter.data -= rate * parameter.grad
    with torch.no_grad():
        return float(F.cross_entropy(network(seen), targets))


@pytest.mark.parametrize("steps", [1, 3])
def test_gradient_of_new_exemplars_is_the_double_backward_by_hand(compose, steps):
    method, _, stages = compose(inner_steps=steps, inner_lr=0.7)
    exemplars = TASK.exemplars.select(NEW)
    query, inner = batch_of(TASK.examples, [4, 1, 0]), batch_of(exemplars, [2, 0])
    found = gradient_of(stages[0], [query, inner])

    images = normalised(exemplars)[[2, 0]].requires_grad_()
    loss = outer_by_hand(
        method.network, images, inner.labels, query.images, query.labels, steps, 0.7
    )
    (expected,) = torch.autograd.grad(loss, [images])
    assert found.abs().max() > 1e-7
    for row, gradient in ((2, expected[0]), (0, expected[1])):
        error = (found[row].permute(2, 0, 1) - gradient).abs().max()
        assert error < 1e-6 * gradient.abs().max()
    assert not found[1].any(), "it took no part"


def test_gradient_of_new_exemplars_is_that_of_finite_differences(compose):
    method, _, stages = compose(inner_steps=2, inner_lr=3.0)
    exemplars = TASK.exemplars.select(NEW)
    query, inner = batch_of(TASK.examples, [4, 1, 0]), batch_of(exemplars, [0, 1])
    found = gradient_of(stages[0], [query, inner])[0].permute(2, 0, 1)
    images, h = normalised(exemplars)[[0, 1]], 1e-4
    largest = found.abs().flatten().topk(2).indices.tolist()
    for place in [*largest, 400]:
        ends = []
        for sign in (1, -1):
            moved = images.clone(memory_format=torch.contiguous_format)
            moved[0].view(-1)[place] += sign * h
            ends.append(
                outer_by_training(
                    method.network, moved, inner.labels, query.images, query.labels, 2, 3.0
                )
            )
        expected = (ends[0] - ends[1]) / (2 * h)
        assert abs(float(found.flatten()[place]) - expected) < 1e-5 * float(found.abs().max())


def test_each_half_of_the_old_exemplars_follows_the_other(compose):
    method, _, stages = compose(inner_lr=0.7)
    stage = stages[1]
    old = TASK.exemplars.select(OLD)
    # Every second of a class: labels are 0 0 0 1 1.
    first, second = [0, 2, 3], [1, 4]
    assert [half.tolist() for half in stage.halves] == [first, second]
    pools = [s.pool() - len(TASK.examples) for s in stage.streams]
    assert [p.tolist() for p in pools] == [first, second]
    a, b = batch_of(old.select(first), [2, 0]), batch_of(old.select(second), [0, 1])
    found = gradient_of(stage, [a, b])

    images = normalised(old)
    halves = {"A": images[[3, 0]].requires_grad_(), "B": images[[1, 4]].requires_grad_()}
    for mine, other, labels, targets, rows in (
        ("A", "B", a.labels, b.labels, [3, 0]),
        ("B", "A", b.labels, a.labels, [1, 4]),
    ):
        loss = outer_by_hand(
            method.network, halves[mine], labels, halves[other].detach(), targets, 1, 0.7
        )
        (expected,) = torch.autograd.grad(loss, [halves[mine]])
        error = (found[rows].permute(0, 3, 1, 2) - expected).abs().max()
        assert error < 1e-6 * expected.abs().max()
    assert not found[2].any()


def test_the_released_form_is_the_loop_over_class_means(compose):
    method, addon, (stage,) = compose(form="released")
    (stream,) = stage.streams
    assert stream.pool().tolist() == [*range(5), *(5 + k for k in OLD)]
    images = normalised(TASK.exemplars)
    query = batch_of(Examples.cat([TASK.examples, TASK.exemplars]), [0, 1, 5, 8])
    found = gradient_of(stage, [query])

    free = images[NEW].requires_grad_()
    with evaluating(method):
        embed = method.network.features
        means = [embed(images[:3]).mean(0).detach(), embed(images[3:5]).mean(0).detach()]
        means += [embed(free[:2]).mean(0), embed(free[2:]).mean(0)]
        loss = torch.zeros((), dtype=torch.float64)
        for image, label in zip(query.images, query.labels.tolist(), strict=True):
            feature = embed(image[None])[0]
            cosines = [feature @ m / (feature.norm() * m.norm()) for m in means]
            loss = loss - torch.stack(cosines).log_softmax(0)[label] / len(query)
    (expected,) = torch.autograd.grad(loss, [free])
    error = (found.permute(0, 3, 1, 2) - expected).abs().max()
    assert error < 1e-6 * expected.abs().max()
    assert len(addon.means) == 4


@pytest.mark.parametrize("form", ["bilevel", "released"])
def test_a_step_changes_pixels_and_nothing_else(compose, world, form):
    method, addon, stages = compose(form=form, double=False)
    stage = stages[0]
    lane = world.Lane(stage)
    world.Loop(method, None).own(stage, lane.parameters)
    method.network.extractors[0].act1.train(False)
    modes = [part.training for part in method.modules()]
    before = {name: value.clone() for name, value in method.state_dict().items()}
    pixels = {name: value.detach().clone() for name, value in addon.pixels.items()}
    query = batch_of(TASK.examples, [0, 3])
    inner = [batch_of(TASK.exemplars.select(NEW), [0, 1])] if form == "bilevel" else []

    losses = stage.step([query, *inner], lane)

    assert not any(value.requires_grad for value in losses.values())
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())
    assert modes == [part.training for part in method.modules()]
    assert not torch.equal(addon.pixels["new"], pixels["new"])
    assert form == "released" or torch.equal(addon.pixels["old"], pixels["old"])
    low = (0 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert (addon.pixels["new"].view(-1, 3) >= low).all()


def test_gradient_does_not_depend_on_autocast(compose):
    method, _, stages = compose(double=False)
    method.float()
    query, inner = (
        replace(b, images=b.images.float())
        for b in (batch_of(TASK.examples, [0]), batch_of(TASK.exemplars.select(NEW), [0, 1]))
    )
    plain = gradient_of(stages[0], [query, inner])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradient_of(stages[0], [query, inner])
    assert torch.equal(plain, mixed)


def test_what_is_refined_are_the_values_as_levels(compose):
    _, addon, _ = compose(double=False)
    with torch.no_grad():
        addon.pixels["new"].view(-1, 3).add_(3 / (255 * torch.tensor(STD)))
        addon.pixels["old"].view(-1, 3).sub_(1.4 / (255 * torch.tensor(STD)))
    index, images = addon.refined(TASK)
    assert sorted(index.tolist()) == list(range(8))
    assert index.tolist() == [*NEW, *OLD]
    before = TASK.exemplars.select(index).images
    change = (images.pixels.int() - before.pixels.int()).view(8, -1)
    assert change[:3].eq(3).all() and change[3:].eq(-1).all()
    assert torch.equal(images.geometry, before.geometry)
    assert not len(addon.pixels) and addon.refined(TASK) is None
    pictures, curve = addon.records()
    assert curve.payload["x"] == [1]
    assert curve.payload["y"] == {"new exemplars": [3.0], "old exemplars": [1.0]}
    assert pictures.kind == "images" and len(pictures.payload["images"]) == 6
    assert pictures.payload["captions"][0].startswith("before, after, difference x 42")


def test_state_is_the_values_being_trained(compose):
    _, addon, _ = compose(double=False)
    structure, tensors = addon.structure(), {k: v.clone() for k, v in addon.tensors().items()}
    assert structure == {"pixels": {"new": 3 * 768, "old": 5 * 768}}
    _, other, _ = compose(double=False)
    other.refined(TASK)
    other.restore(structure)
    other.load_tensors(tensors)
    assert torch.equal(other.pixels["old"], addon.pixels["old"])
    assert [len(list(s.parameters())) for s in other.refinements(TASK)] == [1, 1]


@pytest.mark.parametrize(
    ("task", "options", "names"),
    [
        (TASK, {}, ["mnemonics, new", "mnemonics, old"]),
        (TASK, {"adjust_old": False}, ["mnemonics, new"]),
        (TASK, {"form": "released"}, ["mnemonics, new"]),
        (replace(TASK, exemplars=TASK.exemplars.select(NEW)), {}, ["mnemonics, new"]),
        (replace(TASK, exemplars=TASK.exemplars.select([0, 3])), {}, []),
        (replace(TASK, exemplars=TASK.exemplars.select([0, 1])), {}, ["mnemonics, old"]),
        (replace(TASK, exemplars=TASK.exemplars.select([])), {}, []),
    ],
)
def test_stages_are_those_that_have_something_to_train(compose, task, options, names):
    _, addon, stages = compose(task, **options)
    assert [stage.name for stage in stages] == names
    assert (addon.refined(task) is None) == (not names)


def test_frozen_extractors_are_not_stepped(compose):
    method, _, stages = compose(inner_lr=0.7)
    images, labels = normalised(TASK.exemplars.select(NEW)), torch.tensor([2, 2, 3])
    with evaluating(method):
        every = stages[0].stepped(images, labels)
        method.network.freeze(0)
        head = stages[0].stepped(images, labels)
    assert {name.partition(".")[2].partition(".")[0] for name in every} == {"extractors", "head"}
    assert set(head) == {"network.head.weight", "network.head.bias"}


def test_logits_that_come_from_elsewhere_are_refused(compose, world):
    class Elsewhere(world.Mine):
        def logits(self, images):
            return images.mean((2, 3)) @ torch.ones(3, 4, dtype=images.dtype, requires_grad=True)

    _, _, stages = compose(method_class=Elsewhere)
    batches = [batch_of(TASK.examples, [0]), batch_of(TASK.exemplars.select(NEW), [0])]
    with pytest.raises(CompositionError, match="those of Elsewhere do not depend on"):
        gradient_of(stages[0], batches)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"keeps": "nothing"}, "Odd keeps nothing"),
        ({"keeps": "everything"}, "Odd keeps everything"),
        ({"selection": "own"}, "Odd chooses its own"),
    ],
)
def test_methods_without_exemplars_that_may_change_are_refused(compose, world, attributes, says):
    odd = type("Odd", (world.Mine,), attributes)
    with pytest.raises(CompositionError, match=says):
        compose(method_class=odd)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"form": "paper"}, "form is 'paper'"),
        ({"inner_steps": 0}, "inner_steps is 0"),
        ({"inner_batch": 0}, "inner_batch is 0"),
        ({"inner_lr": 0.0}, "inner_lr is 0.0"),
    ],
)
def test_settings_out_of_range(options, says):
    with pytest.raises(FastcilError, match=says):
        Mnemonics.Config(**options)
