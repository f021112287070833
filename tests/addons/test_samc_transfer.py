"""The gradients that SAMC's analysis compares are those of the images that it says."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from backbones import ConvNet
from torch.nn import functional as F

from fastcil.addons.completed import Completed
from fastcil.addons.samc import SAMC
from fastcil.addons.transfer_records import Transfer
from fastcil.contract import Stage, Task
from fastcil.curvature.anchor import draws
from fastcil.data import Augmentation, Examples, ImageStore
from fastcil.engine.context import EngineContext
from fastcil.methods.er import ExperienceReplay
from fastcil.ops import salient_masks

SIZE, COUNT = 16, 12
PRODUCT, PRODUCT_ORIGINAL, COSINES, LOSS = 1, 2, slice(3, 6), 6


def noise(seed: int) -> ImageStore:
    rng = np.random.default_rng(seed)
    return ImageStore.from_batch(rng.integers(0, 256, (COUNT, SIZE, SIZE, 3), np.uint8))


def labels_of(classes: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(classes).repeat_interleave(COUNT // 2)


class Setting:
    """A second task beside memory of the first, of which all images and originals are known."""

    def __init__(self, classes: tuple[int, int], samples: int) -> None:
        torch.manual_seed(0)
        augmentation = Augmentation(SIZE, crop="none")
        context = EngineContext(ConvNet, augmentation, torch.device("cpu"))
        self.augmentation = augmentation
        self.method = ExperienceReplay(ExperienceReplay.Config(), context)
        config = SAMC.Config(threshold=0.5, completion="rule", samples=samples, analyse=True)
        self.addon = SAMC(config, context, self.method)
        new = Examples(noise(0), labels_of((0, 1)))
        first = Task(0, (0, 1), 0, new, new.select([]))
        self.method.begin_task(first)
        self.addon.begin_task(first)
        maps = self.addon.marks(first.examples)
        completed = self.addon._completed(first.examples.images, maps)
        masks = salient_masks(maps, completed.sizes, 0.5)
        # Of five exemplars the analysis knows four, and memory has them in another order.
        kept = torch.tensor([1, 4, 7, 10])
        pairs = Completed.of(first.examples, completed, maps, masks, exact=True)
        assert len(pairs) == COUNT
        shown = Completed(
            pairs.originals.select(kept), completed.select(kept), maps[kept], masks[:0]
        )
        self.addon.transfer.keep(first, shown)
        held = torch.tensor([10, 2, 1, 7, 4])
        exemplars = Examples(completed, first.examples.labels).select(held)
        self.remembered = Examples(completed, first.examples.labels).select(kept)
        self.originals = first.examples.select(kept)
        examples = Examples(noise(1), labels_of(classes))
        self.task = Task(1, classes, 2, examples, exemplars)
        self.method.begin_task(self.task)
        for norm in (m for m in self.method.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.running_mean.uniform_(-0.3, 0.3)
            norm.running_var.uniform_(0.5, 2)
        stages = self.addon.stages(self.task, self.method.stages(self.task))
        self.stage: Stage = stages[0]
        self.network = copy.deepcopy(self.method.network).double().eval()

    @property
    def transfer(self) -> Transfer:
        return self.addon.transfer

    def loss(self, examples: Examples, network: torch.nn.Module | None = None) -> torch.Tensor:
        """The mean cross-entropy, in float64, of images normalised here."""
        pixels = examples.images.reconstruct().pixels.view(-1, SIZE, SIZE, 3).double() / 255
        mean, std = (
            torch.tensor(values, dtype=torch.float64)
            for values in (self.augmentation.mean, self.augmentation.std)
        )
        scores = (network or self.network)(((pixels - mean) / std).permute(0, 3, 1, 2))
        return F.cross_entropy(scores, examples.labels)

    def value(self, examples: Examples, network: torch.nn.Module | None = None) -> float:
        with torch.no_grad():
            return float(self.loss(examples, network))

    def gradient(self, examples: Examples) -> list[torch.Tensor]:
        return list(torch.autograd.grad(self.loss(examples), list(self.network.parameters())))


def dot(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


@pytest.mark.parametrize("samples", [5, COUNT])
@pytest.mark.parametrize("classes", [(2, 3), (0, 1)])
def test_gradients_are_those_of_the_images_known(classes, samples):
    setting = Setting(classes, samples)
    assert setting.stage.begin is not None
    before = copy.deepcopy(setting.method.state_dict())
    setting.stage.begin()
    after = setting.method.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    order = torch.randperm(COUNT, generator=draws(1, torch.initial_seed()))[:samples]
    new = setting.task.examples.select(order)
    g, completed, original = (
        setting.gradient(examples) for examples in (new, setting.remembered, setting.originals)
    )
    pairs = ((g, completed), (g, original), (original, completed))
    cosines = [dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5 for a, b in pairs]
    (row,) = setting.transfer.begun.tolist()
    assert row[0] == 0
    assert row[PRODUCT] == pytest.approx(dot(g, completed), rel=1e-3)
    assert row[PRODUCT_ORIGINAL] == pytest.approx(dot(g, original), rel=1e-3)
    assert row[COSINES] == pytest.approx(cosines, rel=1e-3)
    assert row[LOSS] == pytest.approx(setting.value(setting.remembered), rel=1e-5)
    # Far enough from each other that other images would be noticed.
    others = Examples(setting.task.exemplars.images, setting.task.exemplars.labels)
    wrong = [setting.gradient(e) for e in (others, setting.task.examples, setting.originals)]
    for other in wrong[: 2 if samples < COUNT else 1]:
        assert dot(other, completed) != pytest.approx(dot(g, completed), rel=1e-2)
    assert cosines[2] < 0.99


@pytest.mark.parametrize(("classes", "falls"), [((2, 3), False), ((0, 1), True)])
def test_a_small_step_changes_the_loss_as_the_product_says(classes, falls):
    """New classes of a shared head push memory's down; images of the same classes help them."""
    setting = Setting(classes, COUNT)
    setting.stage.begin()
    setting.stage.finish()
    g = setting.gradient(setting.task.examples)
    product = dot(g, setting.gradient(setting.remembered))
    moved, size = copy.deepcopy(setting.network), 1e-6
    with torch.no_grad():
        for parameter, slope in zip(moved.parameters(), g, strict=True):
            parameter -= size * slope
    before, after = (setting.value(setting.remembered, of) for of in (setting.network, moved))
    fall = (before - after) / size
    assert fall == pytest.approx(product, rel=1e-3) and (product > 0) == falls
    for ended, row in enumerate(setting.transfer.steps.tolist()):
        assert row[:3] == [1, 0, ended]
        assert row[3] == pytest.approx(product, rel=1e-3)
        assert row[4] == pytest.approx(fall, rel=0.05)
    assert len(setting.transfer.steps) == 2
    record = next(r for r in setting.addon.records() if r.title.startswith("Does a step"))
    table = {row[0]: row[1:] for row in record.payload["rows"]}
    for when in ("beginning", "ending"):
        met = [1, 1, "1 (100 %)"], [1, 0, "none"]
        assert table[f"Lemma 4.1, a small step, tasks {when}"] == met[not falls]
        assert table[f"<g, g~k> < 0, a rise, tasks {when}"] == met[falls]


def test_without_a_gradient_there_is_no_step():
    setting = Setting((2, 3), COUNT)
    setting.stage.objective = lambda batch: {"nothing": batch.images.new_zeros(())}
    setting.stage.begin()
    assert setting.transfer.steps.tolist() == [[1, 0, 0, 0, 0]]
    setting.stage.finish()
    record = next(r for r in setting.addon.records() if r.title.startswith("Does a step"))
    assert all(row[2:] == [0, "none"] for row in record.payload["rows"])


def test_parameters_are_put_back_when_a_loss_fails():
    setting = Setting((2, 3), COUNT)
    objective, seen = setting.stage.objective, []

    def fails(batch):
        seen.append(batch)
        if len(seen) == 4:  # new images, completed ones, originals, and the step
            raise RuntimeError("out of memory")
        return objective(batch)

    setting.stage.objective = fails
    before = copy.deepcopy(setting.method.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"):
        setting.stage.begin()
    after = setting.method.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
