"""One stretch of training: which parameters, which data, which loss, how long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastcil.contract.batch import Batch
from fastcil.contract.recipe import Recipe
from fastcil.data import Examples

Losses = dict[str, Tensor]
"""Named scalar terms of a loss; what is minimised is their sum."""


@dataclass
class Views:
    """Simulated compression of a stream's first part: boxes, and how often they apply.

    Args:
        boxes: int16 [N, 4], one box (y0, x0, y1, x1) per image of the part.
        ratio: Downsampling ratio eta of what lies outside the box (Luo et al. 2023, Eq. 3).
        probability: Chance that an image is read compressed, drawn anew at every step.
    """

    boxes: Tensor  # [N, 4]
    ratio: float = 4.0
    probability: float = 1.0


@dataclass
class Stream:
    """Where a stage's images come from.

    The parts are read as one sequence, new data first. Each epoch shuffles ``subset`` (or all of
    it). A stage's first stream is read once an epoch; the others keep it company with full
    batches, and one that runs out within the epoch starts over with a new shuffle.

    Where ``subset`` is a function the positions change as training goes (a reservoir). It is
    asked at every step, after the step before it is done, and each step draws its batch from
    them anew, independently, without replacement; no batch while there are none. The first stream,
    which sets the length of an epoch, asks it once, after the stage's ``begin``: a subset that
    depends on what the stages before have learned. What it answers must be part of the method's
    saved state.

    Args:
        parts: Data read as one sequence; empty parts are allowed.
        batch_size: Images per step; all of them where there are fewer.
        subset: int64 positions in that sequence, None for all of it, or a function that gives
            the positions of the moment, on the CPU.
        views: Simulated compression of the first part, or None.
    """

    parts: tuple[Examples, ...]
    batch_size: int
    subset: Tensor | Callable[[], Tensor] | None = None
    views: Views | None = None

    def __len__(self) -> int:
        if isinstance(self.subset, Tensor):
            return len(self.subset)
        return sum(len(part) for part in self.parts)

    @property
    def steps(self) -> int:
        """Steps of an epoch of it: a last image alone is left out.

        Batch normalisation has no variance to estimate from one image.
        """
        full, rest = divmod(len(self), self.batch_size)
        return full + (rest > 1 or (full == 0 and rest > 0))

    def pool(self) -> Tensor:
        """The positions it draws from now, int64 on the CPU."""
        if self.subset is None:
            return torch.arange(len(self))
        return self.subset.cpu() if isinstance(self.subset, Tensor) else self.subset()


class Stepper(Protocol):
    """What the trainer lends a step: everything that depends on device, precision or ranks."""

    def update(self, loss: Tensor) -> None:
        """Back-propagates ``loss``, reduces over ranks, clips, steps the optimiser."""
        ...

    @property
    def lr(self) -> float:
        """The learning rate of this epoch."""
        ...


class _Call(nn.Module):
    """Gives `torch.func.functional_call` a module whose forward is any function of the method."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


@dataclass
class Stage:
    """One stretch of training; the trainer runs it, nothing else trains anything.

    A stage is described, not executed, by a method: when a run resumes in the middle of one,
    ``stages(task)`` is called again and must describe the same stage; work that changes the
    method belongs in ``begin`` and ``finish``, which a resumed run does not repeat.

    Args:
        name: What progress lines and events call it.
        method: The module whose parameters the objective uses.
        objective: Batch -> named loss terms.
        streams: Where images come from; the first sets the length of an epoch. Their batches are
            joined for ``objective``.
        recipe: Optimiser, schedule, epochs.
        parameters: Returns what is trained; asked when the stage begins, after ``begin``.
        primary: Whether this stage learns the task's new data: addons attach to such stages.
        logits: Images -> logits of the classifier this stage trains (for addons).
        begin: Called before the first epoch, everything being in training mode. Of the modes it
            sets, a resumed run knows what `fastcil.nn.Network.freeze` froze.
        finish: Called after the last epoch.
        before_epoch: Called with the epoch's number before each epoch.
        companions: Stages that take a few steps of their own after each epoch of this one. Of a
            companion, ``begin``, ``finish``, ``before_epoch`` and companions of its own are not
            used, and its recipe's schedule follows this stage's epochs.
        steps: Steps of an epoch or, of a companion, of each visit; 0 to read the first stream once.
        behind: Whether it stands behind the stream, on images held meanwhile: in an online scenario
            its recipe keeps its length. What serves the memory, such as an autoencoder, does so.
        unmoved: Gives parameters with masks of their entries, broadcast to them, that no step
            changes: weight decay would shrink the heads of tasks that the loss has nothing of.
        compiled: The objective as `torch.compile` made it, for steps that need first derivatives
            only (it refuses double backward); set by the trainer.
    """

    name: str
    method: nn.Module
    objective: Callable[[Batch], Losses]
    streams: tuple[Stream, ...]
    recipe: Recipe
    parameters: Callable[[], Iterable[nn.Parameter]]
    primary: bool = False
    logits: Callable[[Tensor], Tensor] | None = None
    begin: Callable[[], None] | None = None
    finish: Callable[[], None] | None = None
    before_epoch: list[Callable[[int], None]] = field(default_factory=list)
    companions: list[Stage] = field(default_factory=list)
    steps: int = 0
    behind: bool = False
    unmoved: Callable[[], Iterable[tuple[nn.Parameter, Tensor]]] | None = None
    compiled: Callable[[Batch], Losses] | None = None

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Calls a function of the method, with some of its parameters replaced.

        Args:
            function: Anything that computes with the method's modules.
            *args: Its arguments.
            parameters: Names as in ``method.named_parameters()`` -> tensors to use instead.
        """
        if parameters is None:
            return function(*args)
        named = {f"method.{name}": value for name, value in parameters.items()}
        return torch.func.functional_call(_Call(self.method), named, (function, *args))

    def loss(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Losses:
        """The named loss terms on a batch: a pure function of the parameters.

        Args:
            batch: Images and labels.
            parameters: Replaces parameters of ``method`` by name, as a bilevel step needs.
        """
        if parameters is None and self.compiled is not None:
            return self.compiled(batch)
        losses: Losses = self.call(self.objective, batch, parameters=parameters)
        return losses

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """One training step; a stage that needs more than loss, backward, step overrides it.

        Args:
            batches: One batch per stream, in order; a stream without any image has none, nor
                has one whose ``subset`` is a function that gave no position.
            stepper: Back-propagates and steps the optimiser.

        Returns:
            The named loss terms, detached.
        """
        losses = self.loss(Batch.cat(batches))
        stepper.update(total(losses))
        return {name: value.detach() for name, value in losses.items()}


def total(losses: Losses) -> Tensor:
    """The sum of named loss terms, in float32 or better."""
    return torch.stack(
        [v.to(torch.promote_types(v.dtype, torch.float32)) for v in losses.values()]
    ).sum()
