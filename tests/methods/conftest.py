"""A tiny network, a fake context and the smallest loop that runs a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet
from torch import Tensor, nn

from fastcil.contract import Batch, Method, Recipe, Stage, Stream, Task
from fastcil.data import Augmentation, Examples, ImageStore

SIDE = 8
# Uneven tasks, the last of a single class.
SIZES = (5, 3, 1)


def read(examples: Examples, index: Sequence[int], flip: bool = False) -> Tensor:
    """Images as they lie in the store, scaled to [-1, 1], [B, 3, h, w]."""
    raw = examples.images.pixels.view(-1, SIDE, SIDE, 3)[list(index)]
    images = raw.permute(0, 3, 1, 2).to(torch.get_default_dtype()) / 127.5 - 1.0
    return images.flip(3) if flip else images


class TinyContext:
    """What the engine lends, without an engine."""

    augmentation = Augmentation(SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def make_backbone(self) -> nn.Module:
        return ConvNet()

    bare_backbone = make_backbone

    @torch.no_grad()
    def scan(
        self,
        function: Callable[[Tensor], Tensor],
        examples: Examples,
        look: str = "centre",
        flip: bool = False,
    ) -> Tensor:
        return function(read(examples, range(len(examples)), flip))

    @torch.no_grad()
    def scan_labelled(
        self,
        function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
        examples: Examples,
        look: str = "whole",
    ) -> tuple[Tensor, ...]:
        images = read(examples, range(len(examples)))
        return function(images, examples.labels, examples.images.sizes)


def make_examples(labels: Sequence[int], seed: int = 0) -> Examples:
    """Noise around a colour, and a bright corner, that differ from class to class."""
    images = make_images(tuple(labels), seed)
    return Examples(ImageStore.from_batch(images), torch.tensor(list(labels), dtype=torch.int64))


@cache
def make_images(labels: tuple[int, ...], seed: int) -> np.ndarray:
    """uint8 [N, SIDE, SIDE, 3]."""
    rng = np.random.default_rng(seed)
    images = []
    for label in labels:
        colour = np.random.default_rng(1000 + label).uniform(40, 215, 3)
        image = rng.normal(colour, 12, (SIDE, SIDE, 3))
        image[: SIDE // 2, (label % 2) * SIDE // 2 :][:, : SIDE // 2] += 60
        images.append(image.clip(0, 255).astype(np.uint8))
    return np.stack(images)


def make_tasks(sizes: Sequence[int] = SIZES, per_class: int = 12, kept: int = 4) -> list[Task]:
    """Tasks of ``sizes`` new classes, each with ``kept`` exemplars per class, old or new."""
    tasks, known = [], 0
    everything = [make_examples([c] * per_class, seed=c) for c in range(sum(sizes))]
    for index, size in enumerate(sizes):
        new = Examples.cat(everything[known : known + size])
        old = [part.select(torch.arange(kept)) for part in everything[:known]]
        none = new.select(torch.arange(0))
        tasks.append(
            Task(
                index=index,
                classes=tuple(range(known, known + size)),
                known=known,
                examples=new,
                exemplars=Examples.cat(old) if old else none,
                room=kept * (known + size),
                allowance=20_000.0 * kept * (known + size),
            )
        )
        known += size
    return tasks


def after(task: Task, kept: int = 4) -> Task:
    """The same task once memory holds ``kept`` exemplars of its classes too."""
    chosen = [(task.examples.labels == c).nonzero()[:kept, 0] for c in task.classes]
    new = task.examples.select(torch.cat(chosen))
    return replace(task, exemplars=Examples.cat([task.exemplars, new]))


def batch_of(stream: Stream, positions: Tensor) -> Batch:
    """The images at some positions of a stream's parts, read as one sequence."""
    starts = torch.tensor([0, *[len(p) for p in stream.parts]]).cumsum(0)[:-1]
    part = torch.bucketize(positions.contiguous(), starts, right=True) - 1
    index = positions - starts[part]
    everything = Examples.cat(stream.parts)
    images = read(everything, positions.tolist())
    labels = everything.labels[positions]
    return Batch(images, labels, part, index)


def draw(stream: Stream, generator: torch.Generator) -> Iterator[Batch | None]:
    """Batches of a stream without end; None while its subset is a function that gives nothing."""
    while True:
        pool = stream.pool()
        order = torch.randperm(len(pool), generator=generator).split(stream.batch_size)
        for entries in order[:1] if callable(stream.subset) else order:
            batch = batch_of(stream, pool[entries])
            yield replace(batch, entry=entries) if len(entries) else None


class Loop:
    """Runs stages as the trainer does, and keeps each step's total loss.

    Args:
        probe: Called with a stage after each of its epochs.
    """

    def __init__(self, probe: Callable[[Stage, int], None] | None = None) -> None:
        self.probe = probe
        self.losses: dict[str, list[float]] = {}
        self.trained: dict[str, list[str]] = {}

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def begin(self, stage: Stage) -> None:
        stage.method.train()
        if stage.begin is not None:
            stage.begin()
        parameters = list(stage.parameters())
        stage.method.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.optimizer = stage.recipe.make_optimizer(parameters)
        chosen = {id(p) for p in parameters}
        self.trained[stage.name] = [
            name for name, p in stage.method.named_parameters() if id(p) in chosen
        ]

    def run(self, stage: Stage) -> None:
        self.begin(stage)
        generator = torch.Generator().manual_seed(0)
        lanes = [draw(stream, generator) for stream in stage.streams]
        steps = -(-len(stage.streams[0]) // stage.streams[0].batch_size)
        for epoch in range(stage.recipe.epochs):
            for call in stage.before_epoch:
                call(epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = stage.recipe.lr_at(epoch)
            for _ in range(steps):
                drawn = [batch for lane in lanes if (batch := next(lane)) is not None]
                losses = stage.step(drawn, self)
                self.losses.setdefault(stage.name, []).append(
                    float(sum(float(v) for v in losses.values()))
                )
            if self.probe is not None:
                self.probe(stage, epoch)
        if stage.finish is not None:
            stage.finish()


def learn(method: Method, task: Task, probe: Callable[[Stage, int], None] | None = None) -> Loop:
    """A whole task, memory's update included; ``release`` is left to the test."""
    torch.manual_seed(100 + task.index)
    method.begin_task(task)
    loop = Loop(probe)
    for stage in method.stages(task):
        loop.run(stage)
    method.end_task(after(task))
    return loop


def shorten(config: Any, epochs: int = 3, lr: float = 0.05, batch: int = 16) -> Any:
    """A Config whose recipes are short, constant and small."""
    recipes = {
        name: replace(
            value,
            epochs=epochs,
            lr=lr,
            schedule="constant",
            batch_size=batch,
            milestones=(),
            warmup=min(value.warmup, 1),
        )
        for name, value in vars(config).items()
        if isinstance(value, Recipe)
    }
    return replace(config, **recipes)


@pytest.fixture
def lab() -> SimpleNamespace:
    """Everything above, by name."""
    return SimpleNamespace(
        context=TinyContext(),
        make_examples=make_examples,
        make_tasks=make_tasks,
        after=after,
        read=read,
        batch_of=batch_of,
        Loop=Loop,
        learn=learn,
        shorten=shorten,
    )
