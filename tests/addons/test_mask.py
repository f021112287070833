"""The mask-level step against Luo et al. 2023, Eqs. S1, 7 and 9, written out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastcil.addons.cim import CIM
from fastcil.contract import Batch
from fastcil.errors import CompositionError
from fastcil.nn import LinearHead, Network

RATIO = 4.0


def make_batch(size: int, seed: int, classes: int = 4, side: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(size, 3, side, side, generator=generator, dtype=torch.float64),
        torch.randint(0, classes, (size,), generator=generator),
        (torch.arange(size) % 3 == 1).long(),
        torch.arange(size),
    )


def compose(world, extractors=1, classes=4, **options):
    """A method in mid-training, with curves that are not ReLU any more, and its mask stage."""
    context = world.FakeContext()
    method = world.Mine(world.Mine.Config(), context)
    addon = CIM(CIM.Config(**options), context, method)
    torch.manual_seed(3)
    task = world.make_task(classes=classes)
    method.begin_task(task)
    if extractors > 1:
        parts = [world.Backbone() for _ in range(extractors)]
        method.network = Network(parts, LinearHead(5 * extractors, classes).double())
        method.network.freeze(*range(extractors - 1))
    addon.begin_task(task)
    for extractor in method.network.extractors:
        extractor.norm.running_mean.normal_()
        extractor.norm.running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        for parameter in addon.phi.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stages = addon.stages(task, method.stages(task))
    newest = [method.network.extractors[-1], method.network.head]
    stages[0].parameters = lambda: [p for part in newest for p in part.parameters()]
    method.train()
    return method, addon, stages[0].companions[0]


def test_a_step_that_is_not_finite_leaves_the_curves_as_they_are(world):
    """Not even Adam's momentum and weight decay move them."""
    stage = compose(world)[2]
    phi = list(stage.parameters())
    optimizer = torch.optim.Adam(phi, lr=0.01, weight_decay=5e-4)

    class Steps:
        lr = 0.01

        def update(self, loss: Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()
            still = [(p, mask, p.detach().clone()) for p, mask in stage.unmoved()]
            optimizer.step()
            with torch.no_grad():
                for p, mask, before in still:
                    p.copy_(torch.where(mask, before, p))

    batches = [make_batch(6, 1), make_batch(6, 2)]
    before = [p.detach().clone() for p in phi]
    stage.step(batches, Steps())
    moved = [p.detach().clone() for p in phi]
    assert not any(torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    stage.inner_lr = math.inf
    stage.step(batches, Steps())
    assert all(torch.equal(a, b) for a, b in zip(moved, phi, strict=True))


class Catcher:
    """A Stepper that only differentiates."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def update(self, loss: Tensor) -> None:
        loss.backward()


def hypergradient(method, addon, stage, inner, outer, factor) -> list[Tensor]:
    """What the stage would step phi along."""
    learned = list(stage.parameters())
    for parameter in [*method.parameters(), *addon.parameters()]:
        parameter.requires_grad_(False).grad = None
    for parameter in learned:
        parameter.requires_grad_(True)
    stage.step([inner, outer], Catcher(stage.recipe.lr * factor))
    return [parameter.grad for parameter in learned]


@dataclass
class Oracle:
    """The same mathematics in plain functions of plain tensors, nothing of fastcil's."""

    extractors: list[dict[str, Tensor]]
    head: dict[str, Tensor]
    curves: list[list[tuple[Tensor, Tensor]]]
    rate: float
    mu: float
    mu_prime: float
    compress_all: bool

    @classmethod
    def of(cls, method, addon, factor) -> Oracle:
        config = addon.config
        return cls(
            [{k: v.clone() for k, v in e.state_dict().items()} for e in method.network.extractors],
            {k: v.clone() for k, v in method.network.head.state_dict().items()},
            [
                [(c.numerator.detach().clone(), c.denominator.detach().clone()) for c in curves]
                for curves in addon.phi
            ],
            config.inner_lr * factor,
            config.mu,
            config.mu_prime,
            config.compress_all,
        )

    @staticmethod
    def pade(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        top = sum(a[k] * x**k for k in range(6))
        return top / (1 + sum((b[k - 1] * x**k).abs() for k in range(1, 5)))

    @staticmethod
    def extractor_maps(images, w, activations) -> Tensor:
        x = torch.nn.functional.conv2d(images, w["conv1.weight"], None, 2, 1)
        scale = w["norm.weight"] / (w["norm.running_var"] + 1e-5).sqrt()
        shift = w["norm.bias"] - w["norm.running_mean"] * scale
        x = activations[0](x * scale[:, None, None] + shift[:, None, None])
        x = torch.nn.functional.conv2d(x, w["conv2.weight"], w["conv2.bias"], 2, 1)
        return activations[1](x)

    def maps(self, images: Tensor, newest: dict[str, Tensor], curves=None) -> Tensor:
        parts = []
        for number, w in enumerate([*self.extractors[:-1], newest]):
            if curves is None:
                activations = [lambda x: x.clamp(min=0)] * 2
            else:
                activations = [lambda x, c=c: self.pade(x, *c) for c in curves[number]]
            parts.append(self.extractor_maps(images, w, activations))
        return torch.cat(parts, 1)

    def logits(self, maps: Tensor) -> Tensor:
        return maps.flatten(2).mean(2) @ self.head["weight"].T + self.head["bias"]

    @staticmethod
    def entropy(logits: Tensor, labels: Tensor) -> Tensor:
        picked = [row[y] - torch.logsumexp(row, 0) for row, y in zip(logits, labels, strict=True)]
        return -torch.stack(picked).mean()

    def masks(self, maps: Tensor, labels: Tensor) -> Tensor:
        """S1a, S1b."""
        result = []
        for image, y in zip(maps, labels, strict=True):
            a = (self.head["weight"][y][:, None, None] * image).sum(0)
            result.append((a - a.min()) / (a.max() - a.min()))
        return torch.stack(result)

    @staticmethod
    def enlarge(cells: int, side: int) -> Tensor:
        """Bilinear interpolation along one side, as a matrix [side, cells]."""
        matrix = torch.zeros(side, cells, dtype=torch.float64)
        for position in range(side):
            source = max((position + 0.5) * cells / side - 0.5, 0.0)
            low = min(math.floor(source), cells - 1)
            matrix[position, low] += 1 - (source - low)
            matrix[position, min(low + 1, cells - 1)] += source - low
        return matrix

    def composed(self, batch: Batch, masks: Tensor) -> Tensor:
        """S1c, of new images only unless all are asked for."""
        side, cells = batch.images.shape[2], masks.shape[1]
        up = self.enlarge(cells, side)
        small = int(side / math.sqrt(RATIO))
        shown = [int(int(i * small / side) * side / small) for i in range(side)]
        result = []
        for image, mask, part in zip(batch.images, masks, batch.part, strict=True):
            large = up @ mask @ up.T
            coarse = image[:, shown][:, :, shown]
            mixed = large * image + (1 - large) * coarse
            result.append(mixed if self.compress_all or int(part) == 0 else image)
        return torch.stack(result)

    def objective(self, curves, inner: Batch, outer: Batch, create_graph: bool) -> Tensor:
        """Eq. 9 as a function of phi."""
        trained = ("conv1.weight", "norm.weight", "norm.bias", "conv2.weight", "conv2.bias")
        fixed = self.extractors[-1]
        maps = self.maps(inner.images, fixed, curves)
        masks = self.masks(maps, inner.labels)
        images = self.composed(inner, masks)
        theta = {name: fixed[name].clone().requires_grad_() for name in trained}
        logits = self.logits(self.maps(images, {**fixed, **theta}))
        loss = self.entropy(logits, inner.labels) + 0.01 * (logits**2).mean()
        slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=create_graph)
        stepped = {
            name: theta[name] - self.rate * slope for name, slope in zip(theta, slopes, strict=True)
        }
        after = self.logits(self.maps(outer.images, {**fixed, **stepped}))
        return (
            self.entropy(after, outer.labels)
            + self.mu * (masks**2).sum() / masks.numel()
            + self.mu_prime * self.entropy(self.logits(maps), inner.labels)
        )

    def double_backward(self, inner: Batch, outer: Batch) -> list[Tensor]:
        learned = [t.requires_grad_() for curve in self.curves[-1] for t in curve]
        value = self.objective(self.curves, inner, outer, create_graph=True)
        return list(torch.autograd.grad(value, learned))

    def finite_differences(self, inner: Batch, outer: Batch, step: float = 1e-5) -> list[Tensor]:
        result = []
        for curve in self.curves[-1]:
            for tensor in curve:
                slope = torch.empty_like(tensor)
                for k in range(len(tensor)):
                    value = float(tensor[k])
                    ends = []
                    for sign in (1, -1):
                        tensor[k] = value + sign * step
                        value_there = self.objective(self.curves, inner, outer, False)
                        ends.append(float(value_there.detach()))
                    tensor[k] = value
                    slope[k] = (ends[0] - ends[1]) / (2 * step)
                result.append(slope)
        return result


CASES = [
    # extractors, schedule's factor, options
    (1, 1.0, {}),
    (1, 0.25, {"inner_lr": 2.0}),
    (1, 1.0, {"compress_all": True, "mu": 0.0}),
    (2, 1.0, {"inner_lr": 0.5}),
    (1, 1.0, {"mu": 0.0, "mu_prime": 0.0, "inner_lr": 5.0}),
]


@pytest.mark.parametrize(("extractors", "factor", "options"), CASES)
def test_hypergradient_is_the_double_backward_oracles(world, extractors, factor, options):
    method, addon, stage = compose(world, extractors, **options)
    inner, outer = make_batch(6, 1), make_batch(5, 2)
    found = hypergradient(method, addon, stage, inner, outer, factor)
    expected = Oracle.of(method, addon, factor).double_backward(inner, outer)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_hypergradient_is_that_of_finite_differences(world):
    options = {"mu": 0.0, "mu_prime": 0.0, "inner_lr": 5.0}
    method, addon, stage = compose(world, **options)
    inner, outer = make_batch(6, 1), make_batch(5, 2)
    found = torch.cat(hypergradient(method, addon, stage, inner, outer, 1.0))
    expected = torch.cat(Oracle.of(method, addon, 1.0).finite_differences(inner, outer))
    # All of it comes through theta+: without second derivatives there would be nothing.
    assert found.abs().max() > 1e-4
    assert (found - expected).abs().max() < 1e-7 * found.abs().max()


def test_hypergradient_does_not_depend_on_autocast(world):
    method, addon, stage = compose(world)
    method.float(), addon.float()
    inner, outer = (
        Batch(b.images.float(), b.labels, b.part, b.index)
        for b in (make_batch(6, 1), make_batch(5, 2))
    )
    plain = hypergradient(method, addon, stage, inner, outer, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = hypergradient(method, addon, stage, inner, outer, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_a_mask_step_changes_phi_and_nothing_else(world):
    method, addon, stage = compose(world, extractors=2)
    lane = world.Lane(stage)
    world.Loop(method, None).own(stage, lane.parameters)
    method.network.extractors[1].act1.train(False)
    modes = [part.training for part in method.modules()]
    before = {name: value.clone() for name, value in method.state_dict().items()}
    older = [p.clone() for p in addon.phi[0].parameters()]
    newest = [p.detach().clone() for p in addon.phi[1].parameters()]

    losses = stage.step([make_batch(6, 1), make_batch(5, 2)], lane)

    assert losses.keys() == {"outer", "mask", "branch"}
    assert not any(value.requires_grad for value in losses.values())
    assert method.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())
    assert modes == [part.training for part in method.modules()]
    assert all(torch.equal(a, b) for a, b in zip(addon.phi[0].parameters(), older, strict=True))
    changed = [
        not torch.equal(a, b) for a, b in zip(addon.phi[1].parameters(), newest, strict=True)
    ]
    assert all(changed)


def test_a_step_that_overflows_does_not_spoil_phi(world):
    method, addon, stage = compose(world, inner_lr=1e300)
    found = hypergradient(method, addon, stage, make_batch(6, 1), make_batch(5, 2), 1.0)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)


def test_exemplars_are_not_composed_again(world):
    _, _, stage = compose(world)
    batch = make_batch(6, 1)
    flat = torch.zeros(6, 4, 4, dtype=torch.float64)
    composed = stage._compressed(batch, flat)
    old = batch.part == 1
    assert torch.equal(composed.images[old], batch.images[old])
    assert (composed.images[~old] != batch.images[~old]).any()
    assert torch.equal(composed.images[~old][:, :, ::2, ::2], batch.images[~old][:, :, ::2, ::2])


@pytest.mark.parametrize(
    ("classes", "per_class", "steps"), [(10, 0.5, 5), (11, 0.5, 5), (1, 0.5, 1), (4, 2.0, 8)]
)
def test_number_of_steps_and_recipe(world, classes, per_class, steps):
    _, _, stage = compose(world, classes=classes, steps_per_class=per_class)
    assert (stage.name, stage.steps) == ("mask", steps)
    recipe = stage.recipe
    assert (recipe.epochs, recipe.lr, recipe.optimizer) == (4, 0.01, "adam")
    assert (recipe.weight_decay, recipe.clip, recipe.schedule) == (5e-4, 1.0, "cosine")
    assert [len(stream.parts) for stream in stage.streams] == [2, 1]
    assert [stream.batch_size for stream in stage.streams] == [16, 16]
    assert all(stream.views is None for stream in stage.streams)


def test_a_stage_without_logits_is_refused(world):
    class Silent(world.Mine):
        def stages(self, task):
            stages = super().stages(task)
            stages[0].logits = None
            return stages

    context = world.FakeContext()
    method = Silent(Silent.Config(), context)
    with pytest.raises(CompositionError, match="stage 'learn', which names none"):
        world.begin(method, CIM(CIM.Config(), context, method), world.make_task())


def test_a_stage_that_trains_no_extractor_is_refused(world):
    _, _, stage = compose(world)
    stage.main.parameters = lambda: stage.network().head.parameters()
    with pytest.raises(CompositionError, match="stage 'learn' trains"):
        list(stage.parameters())


def test_the_inner_batch_shows_what_a_foreground_ratio_leaves(world):
    _, _, stage = compose(world, foreground_ratio=2.0, ratio=9.0)
    batch = make_batch(5, seed=1)
    masks = torch.rand(5, 4, 4, dtype=torch.float64)
    large = torch.nn.functional.interpolate(masks[:, None], (16, 16), mode="bilinear")

    def shrunk(eta):
        cells = int(16 / eta**0.5)
        source = torch.arange(16) * cells // 16 * 16 // cells
        return batch.images[:, :, source][:, :, :, source]

    expected = large * shrunk(2.0) + (1 - large) * shrunk(9.0)
    expected = torch.where((batch.part == 0)[:, None, None, None], expected, batch.images)
    assert torch.allclose(stage._compressed(batch, masks).images, expected, atol=1e-12)
