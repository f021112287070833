"""The stage of GEM and its kin: a step that memory's gradients have a say in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

from torch import Tensor, nn

from fastcil.contract import Batch, Losses, Stage, Stepper, evaluating, total
from fastcil.nn import flat_gradient, with_gradient
from fastcil.nn.norms import batch_norms, batch_statistics

MemoryNorms = Literal["move", "keep"]
"""Whether memory's passes move the running statistics of batch norms."""


class ConstrainedStage(Stage):
    """Steps by the gradient of the new data, changed by those of memory.

    The first stream is the new data, each other one a part of memory. The gradients of the stage's
    loss on each of memory's batches, then that on the new one, are taken by passes of their own,
    with batch statistics of their own; a single image, of which batch norm has no variance to
    estimate, is seen in evaluation mode. What ``project`` makes of them is what the optimiser
    gets, weight decay and momentum coming after.

    Args:
        project: The gradient on new data [P] and memory's [n, P] -> the gradient to step by [P].
        memory_norms: Whether memory's passes ``move`` running statistics or ``keep`` them.
        **rest: See `Stage`.
    """

    def __init__(
        self,
        *,
        project: Callable[[Tensor, Tensor], Tensor],
        memory_norms: MemoryNorms,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.project = project
        self.memory_norms = memory_norms

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """One step by the projected gradient.

        Args:
            batches: The new data's, and one of each part of memory.
            stepper: Steps the optimiser.

        Returns:
            The named loss terms on the new data, detached.
        """
        new, *memory = batches
        if not memory:
            return super().step(batches, stepper)
        parameters = list(self.parameters())
        constraints = self._constraints(memory, parameters)
        losses = self.loss(new)
        gradient = flat_gradient(total(losses), parameters)
        stepper.update(with_gradient(parameters, self.project(gradient, constraints)))
        return {name: value.detach() for name, value in losses.items()}

    def _constraints(self, memory: Sequence[Batch], parameters: Sequence[nn.Parameter]) -> Tensor:
        """The gradient of the loss on each batch, [n, P]."""
        size = sum(p.numel() for p in parameters)
        rows = parameters[0].new_empty(len(memory), size, requires_grad=False)
        kept = self.memory_norms == "keep"
        norms = [norm for norm in batch_norms(self.method) if norm.training]
        with batch_statistics(norms if kept else []):
            for row, batch in zip(rows, memory, strict=True):
                with evaluating(self.method) if len(batch) == 1 else nullcontext():
                    row.copy_(flat_gradient(total(self.loss(batch)), parameters))
        return rows
