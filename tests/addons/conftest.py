"""A small world for addons: images, a method of the user's own, a context and a training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcil.contract import Addon, Batch, Losses, Method, Recipe, Stage, Stream, Task
from fastcil.data import Examples, ImageStore
from fastcil.nn import LinearHead, Network

SIDE = 16
RECIPE = Recipe(epochs=4, lr=0.05, batch_size=8, weight_decay=0.0)


class Backbone(nn.Module):
    """Two convolutions with batch norm, in float64 so that equations can be checked closely."""

    out_channels = 5

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.act2 = nn.ReLU()
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        inner = self.act1(self.norm(self.conv1(images.to(self.conv1.weight.dtype))))
        return self.act2(self.conv2(inner))


class FakeContext:
    """Reads images one by one, resized to a square."""

    augmentation: Any = SimpleNamespace(crop="resized")

    def __init__(self, backbone: Callable[[], nn.Module] = Backbone) -> None:
        self.make_backbone = self.bare_backbone = backbone
        self.scans = 0
        self.seen: dict[int, tuple[Examples, Tensor]] = {}

    def images(self, examples: Examples) -> Tensor:
        if id(examples) not in self.seen:
            self.seen[id(examples)] = (examples, self.read(examples))
        return self.seen[id(examples)][1]

    def read(self, examples: Examples) -> Tensor:
        squares = [
            F.interpolate(
                torch.as_tensor(examples.images.image(i)).permute(2, 0, 1)[None].double() / 255,
                (SIDE, SIDE),
                mode="bilinear",
            )
            for i in range(len(examples))
        ]
        return torch.cat(squares) if squares else torch.zeros(0, 3, SIDE, SIDE)

    @torch.no_grad()
    def scan_labelled(
        self,
        function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
        examples: Examples,
        look: str = "whole",
    ) -> tuple[Tensor, ...]:
        assert look == "whole"
        self.scans += 1
        return function(self.images(examples), examples.labels, examples.images.sizes)

    def scan(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


class Mine(Method):
    """A user's own method: one network, cross-entropy and a pull towards small logits."""

    @dataclass(frozen=True)
    class Config:
        recipe: Recipe = RECIPE

    config: Config

    def begin_task(self, task: Task) -> None:
        if getattr(self, "network", None) is None:
            backbone = self.context.make_backbone()
            head = LinearHead(int(backbone.out_channels), task.total).double()
            self.network = Network([backbone], head)
        else:
            self.network.head.grow(task.total)

    def stages(self, task: Task) -> list[Stage]:
        recipe = self.config.recipe
        everything = (task.examples, task.exemplars)
        learn = Stage(
            name="learn",
            method=self,
            objective=self.loss,
            streams=(Stream(everything, recipe.batch_size),),
            recipe=recipe,
            parameters=lambda: self.network.parameters(),
            primary=True,
            logits=self.logits,
        )
        rest = Stage(
            name="rest",
            method=self,
            objective=self.loss,
            streams=(Stream(everything, 4), Stream((task.exemplars,), 4)),
            recipe=recipe,
            parameters=lambda: self.network.head.parameters(),
        )
        return [learn, rest]

    def loss(self, batch: Batch) -> Losses:
        logits = self.network(batch.images)
        return {
            "classification": F.cross_entropy(logits, batch.labels),
            "pull": 0.01 * logits.square().mean(),
        }


class Loop:
    """The trainer in small: epochs, companions, who requires a gradient; no augmentation."""

    def __init__(self, method: Method, context: FakeContext) -> None:
        self.method = method
        self.context = context

    def batch(self, stream: Stream, generator: torch.Generator) -> Batch:
        lengths = torch.tensor([len(part) for part in stream.parts])
        starts = lengths.cumsum(0) - lengths
        size = min(stream.batch_size, int(lengths.sum()))
        positions = torch.randperm(int(lengths.sum()), generator=generator)[:size]
        part = (positions[:, None] >= starts[None, :]).sum(1) - 1
        images = torch.cat([self.context.images(part) for part in stream.parts])
        labels = torch.cat([part.labels for part in stream.parts])
        return Batch(images[positions], labels[positions], part, positions - starts[part])

    def own(self, stage: Stage, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in stage.method.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)

    def run(self, stages: Sequence[Stage], seed: int = 0, until: int | None = None) -> None:
        """Trains all stages, or the first one's epochs up to ``until``."""
        generator = torch.Generator().manual_seed(seed)
        for stage in stages:
            self.method.train()
            if stage.begin is not None:
                stage.begin()
            lanes = [Lane(part) for part in [stage, *stage.companions]]
            for epoch in range(stage.recipe.epochs):
                if epoch == until:
                    return
                for call in stage.before_epoch:
                    call(epoch)
                for lane in lanes:
                    lane.epoch = epoch
                    self.own(lane.stage, lane.parameters)
                    for _ in range(lane.stage.steps or 2):
                        batches = [self.batch(s, generator) for s in lane.stage.streams if len(s)]
                        lane.losses = lane.stage.step(batches, lane)
            if stage.finish is not None:
                stage.finish()


class Lane:
    """A stage under way, and the Stepper it sees."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.parameters = list(stage.parameters())
        self.optimizer = stage.recipe.make_optimizer(self.parameters)
        self.epoch = 0
        self.losses: Losses = {}

    @property
    def lr(self) -> float:
        return self.stage.recipe.lr_at(self.epoch)

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        if self.stage.recipe.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.stage.recipe.clip)
        self.optimizer.step()


def make_examples(labels: Sequence[int], seed: int, sides: tuple[int, int] = (20, 28)) -> Examples:
    """Images of noise, of several sizes, with a bright square whose colour tells the class."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for number, label in enumerate(labels):
        height, width = sides[number % 2], sides[(number + 1) % 2]
        image = torch.randint(0, 90, (height, width, 3), generator=generator)
        image[4:12, 5:14, label % 3] = 240
        images.append(image.to(torch.uint8).numpy())
    return Examples(ImageStore.from_images(images), torch.tensor(list(labels), dtype=torch.int64))


def make_task(index: int = 0, classes: int = 2, per_class: int = 4) -> Task:
    """A task of ``classes`` new classes, with exemplars of the older ones."""
    known = index * classes
    new = tuple(range(known, known + classes))
    examples = make_examples([c for c in new for _ in range(per_class)], seed=index)
    exemplars = make_examples([*range(known), *range(known)], seed=100 + index)
    if not known:
        exemplars = examples.select([])
    return Task(index=index, classes=new, known=known, examples=examples, exemplars=exemplars)


def begin(method: Method, addon: Addon, task: Task, seed: int = 0) -> list[Stage]:
    """What the engine does before training a task."""
    torch.manual_seed(seed)
    method.begin_task(task)
    addon.begin_task(task)
    return addon.stages(task, method.stages(task))


@pytest.fixture
def world() -> SimpleNamespace:
    """Everything above, by name."""
    return SimpleNamespace(
        SIDE=SIDE,
        Backbone=Backbone,
        FakeContext=FakeContext,
        Mine=Mine,
        Loop=Loop,
        Lane=Lane,
        make_examples=make_examples,
        make_task=make_task,
        begin=begin,
    )
