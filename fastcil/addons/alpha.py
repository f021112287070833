"""The steps of AANets' aggregation weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcil.contract import Batch, Losses, Stage, Stepper, Stream, evaluating, total
from fastcil.nn.gradients import differentiate


class AlphaStage(Stage):
    """Gradient steps on the aggregation weights alpha (Liu et al. 2021, Sec. 4.2, upper level).

    The loss is the cross-entropy of a balanced batch, the whole method being in evaluation mode
    (as in the released code), so that batch norms of both branches use their statistics.

    Args:
        main: The stage that it accompanies, whose schedule, batch size and momentum it has.
        stream: The balanced data.
        lr: Learning rate of alpha at the start.
        most_steps: Steps at each visit, at most; one pass if that is shorter.
        logits: Images -> logits.
        alphas: Gives alpha.
        summed: Gives the sum of alpha's gradients so far [levels], which each step adds to and
            then follows; None: each step follows its own.
    """

    def __init__(
        self,
        main: Stage,
        stream: Stream,
        *,
        lr: float,
        most_steps: int,
        logits: Callable[[Tensor], Tensor],
        alphas: Callable[[], nn.Parameter],
        summed: Callable[[], Tensor] | None,
    ) -> None:
        super().__init__(
            name="alpha",
            method=main.method,
            objective=self._objective,
            streams=(stream,),
            recipe=replace(
                main.recipe, optimizer="sgd", lr=lr, weight_decay=0.0, clip=0.0, clip_value=0.0
            ),
            parameters=lambda: [alphas()],
            steps=most_steps if len(stream) > most_steps * stream.batch_size else 0,
        )
        self.scores = logits
        self.alphas = alphas
        self.summed = summed

    def _objective(self, batch: Batch) -> Losses:
        return {"balanced": F.cross_entropy(self.scores(batch.images), batch.labels)}

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """One step of alpha.

        Args:
            batches: A balanced batch.
            stepper: Steps alpha's optimiser.

        Returns:
            The cross-entropy, detached, as ``balanced``.
        """
        with evaluating(self.method):
            losses = self.loss(Batch.cat(batches))
        loss = total(losses)
        if self.summed is not None:
            # Backward takes its precision from the forward pass, not from autocast.
            with torch.autocast(loss.device.type, enabled=False):
                (gradient,) = differentiate(loss, [self.alphas()])
            _add(self.summed(), gradient)
            # A linear function of alpha with the sum as its gradient.
            loss = (self.alphas() * self.summed()).sum()
        stepper.update(loss)
        return {name: value.detach() for name, value in losses.items()}


def sum_gradients(
    stage: Stage, alphas: Callable[[], nn.Parameter], summed: Callable[[], Tensor]
) -> None:
    """Makes a stage's own steps, which leave alpha alone, add to the sum of alpha's gradients.

    Args:
        stage: Changed in place.
        alphas: Gives alpha.
        summed: Gives the sum [levels], added to in place.
    """
    step = stage.step

    def summing(batches: Sequence[Batch], stepper: Stepper) -> Losses:
        alphas().requires_grad_(True)
        return step(batches, _Summing(stepper, alphas(), summed()))

    stage.step = summing  # type: ignore[method-assign]


class _Summing:
    """A Stepper that adds what alpha's gradients were to a sum."""

    def __init__(self, stepper: Stepper, alphas: nn.Parameter, summed: Tensor) -> None:
        self.stepper = stepper
        self.alphas = alphas
        self.summed = summed

    @property
    def lr(self) -> float:
        """The learning rate of this epoch."""
        return self.stepper.lr

    def update(self, loss: Tensor) -> None:
        """Steps as the Stepper that it stands for, and takes alpha's gradient from it."""
        # alpha's own optimiser clears its gradient before a step, not after.
        self.alphas.grad = None
        unit = loss.new_zeros((), requires_grad=True)
        self.stepper.update(loss + unit)
        if self.alphas.grad is not None and unit.grad is not None:
            # The gradient of 1 is what the loss was scaled by, in half precision.
            _add(self.summed, self.alphas.grad / unit.grad)
        self.alphas.grad = None


def _add(summed: Tensor, gradient: Tensor) -> None:
    """Adds a gradient in place; one that isn't finite, which scaling may lead to, counts as 0."""
    summed += torch.where(gradient.isfinite().all(), gradient, 0.0)
