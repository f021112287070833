"""The largest eigenvalue of the Fisher information, traced while a method trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcil.contract import (
    Addon,
    Context,
    Method,
    Record,
    Stage,
    Task,
    check_choices,
    check_positive,
)
from fastcil.curvature import largest_eigenvalue
from fastcil.curvature.anchor import draws
from fastcil.curvature.outputs import Likelihood
from fastcil.data import Examples

_LOSSES = {"categorical": "softmax cross-entropy", "gaussian": "squared error"}


class Fisher(Addon):
    """Traces how curved the loss is (Shon et al. 2022, Sec. 3.1, Fig. 3 and 7).

    Before an epoch of a stage that learns a task's new data, and after its last one, the largest
    eigenvalue of the Fisher information over what the stage trains (`largest_eigenvalue`) is
    measured on some of the task's images, the same ones all through. With softmax cross-entropy it
    comes to nothing as the network fits them, so that a penalty made of it holds nothing; with
    squared error it does not. The curve in the report is broken where a task ends: the next one
    is measured on images of its own, and with its classes.

    It watches and no more: the network that comes out is the same, bit for bit.

    Example:
        >>> Fisher.Config(likelihood="gaussian").samples
        256
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of the trace; the paper tells neither how often nor on how many images.

        Args:
            every: Epochs between two measurements.
            samples: Images of the task that it is measured on; all where there are fewer. Two
                passes' activations of them are held meanwhile.
            likelihood: ``categorical`` for softmax cross-entropy, ``gaussian`` for squared error;
                ``auto`` for the one that the method learns by (`fastcil.contract.Method`).
        """

        every: int = field(default=1, metadata={"epochs": True})
        samples: int = 256
        likelihood: Literal["auto", "categorical", "gaussian"] = "auto"

        def __post_init__(self) -> None:
            check_positive("every", self.every)
            check_positive("samples", self.samples)
            check_choices(self)

    config: Config
    measured: Tensor  # float64 [n, 3]: task, epoch over all tasks, eigenvalue
    begun: Tensor  # int64 [T + 1]: the epoch in which each task began, the next one last

    def __init__(self, config: Any, context: Context, method: Method) -> None:
        super().__init__(config, context, method)
        self.register_buffer("measured", torch.empty(0, 3, dtype=torch.float64))
        self.register_buffer("begun", torch.zeros(1, dtype=torch.int64))
        self._epochs = 0

    def stages(self, task: Task, stages: list[Stage]) -> list[Stage]:
        """The method's stages; those that learn the new data are watched."""
        watched = self.primary("fisher", stages)
        order = torch.randperm(len(task.examples), generator=draws(task.index))
        sample = task.examples.select(order[: self.config.samples])
        self._epochs = 0
        for stage in watched:
            self._watch(task.index, stage, sample, self._epochs)
            self._epochs += stage.recipe.epochs
        return stages

    def _watch(self, task: int, stage: Stage, sample: Examples, before: int) -> None:
        """Measures before epochs of a stage, and as it ends."""

        def measure(epoch: int) -> None:
            place = float(self.begun[-1]) + before + epoch
            row = self.measured.new_tensor([[task, place, self._eigenvalue(stage, sample)]])
            self.measured = torch.cat([self.measured, row])

        def look(epoch: int) -> None:
            if epoch % self.config.every == 0:
                measure(epoch)

        finish = stage.finish

        def end() -> None:
            measure(stage.recipe.epochs)
            if finish is not None:
                finish()

        stage.before_epoch.append(look)
        stage.finish = end

    @property
    def _likelihood(self) -> Likelihood:
        given = self.config.likelihood
        return self.method.likelihood if given == "auto" else given

    def _eigenvalue(self, stage: Stage, sample: Examples) -> float:
        """Of the network as it is."""
        images = self.context.scan(lambda images: images, sample)
        return largest_eigenvalue(
            _Classifier(stage.method, stage.logits or self.method.logits),
            images,
            self._likelihood,
            parameters=stage.parameters(),
        )

    def end_task(self, task: Task) -> None:
        """Notes where the next task begins."""
        self.begun = torch.cat([self.begun, self.begun[-1:] + self._epochs])

    def records(self) -> list[Record]:
        """The eigenvalue over all epochs; ``boundaries`` are those in which a later task began."""
        epochs: list[int] = []
        values: list[float | None] = []
        last = 0
        for task, epoch, value in self.measured.tolist():
            if task != last:
                # Without a value the line is broken.
                epochs.append(int(epoch))
                values.append(None)
            last = task
            epochs.append(int(epoch))
            values.append(value if math.isfinite(value) else None)
        return [
            Record(
                "curve",
                f"Largest eigenvalue of the Fisher information ({_LOSSES[self._likelihood]})",
                {
                    "x": epochs,
                    "y": {"largest eigenvalue": values},
                    "xlabel": "epoch",
                    "ylabel": "largest eigenvalue",
                    "boundaries": self.begun[1:-1].tolist(),
                },
            )
        ]


class _Classifier(nn.Module):
    """What a stage trains, as a module whose outputs are its logits.

    Args:
        method: Whose parameters they depend on.
        logits: Images -> logits.
    """

    def __init__(self, method: nn.Module, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.method = method
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, K]."""
        return self.logits(images)
