"""Energy-based models: a label is an input, and learning contrasts it with few others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcil.contract import (
    Batch,
    Context,
    Losses,
    Method,
    Recipe,
    Stage,
    Stepper,
    Stream,
    Task,
    check_choices,
    check_not_negative,
)
from fastcil.memory.replay import replay_streams
from fastcil.methods.recipes import online
from fastcil.nn import EnergyHead, TaskOutputs, masked_mean, outputs_of
from fastcil.nn.eager import eager
from fastcil.nn.lifecycle import channels, with_head

_CIFAR10 = Recipe(
    epochs=26, lr=1e-4, schedule="constant", optimizer="adam", weight_decay=0.0, batch_size=128
)
_MNIST = replace(_CIFAR10, epochs=22)
_P1 = online(0.1)


class EBM(Method):
    r"""Energy-based model for continual learning (Li et al. 2020).

    A network gives a scalar energy E(x, y) of an image and a label (`fastcil.nn.EnergyHead`),
    which is lowered at the true label and raised at others,

    .. math:: L = E(x, y^+) + \log \sum_{y \in \{y^+\} \cup N} e^{-E(x, y)} ,

    a likelihood whose partition is over a few labels only. With N one label y^-, drawn anew for
    every image in every step from the classes of its task (the paper's choice for
    class-incremental learning), nothing is raised that other tasks have lowered.
    A class is predicted by the least energy among all known ones; logits are -E.

    The draws are a function of a number that is saved and changes with every step, so that a
    resumed run draws the same. A class alone in its task has no negative there; it is contrasted
    with all known classes (the released code needs two), or, where each task has its own classes
    to compare, with none.

    Example:
        >>> EBM.Config().gate, EBM.keeps
        ('softmax', 'nothing')
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of energy-based models.

        The default are the released settings for CIFAR-10 in five tasks: Adam at 1e-4 for 2,000
        iterations of 128 in each, which are 26 epochs of its 10,000 images; the hidden layer of
        1,024 that they come with is in ``PRESETS["cifar10"]``, their convolutions (without batch
        norm) are the run's backbone here. ``PRESETS["mnist"]`` are those for MNIST in five tasks,
        22 epochs of about 12,000; there all the backbone is the hidden layer, here it follows one.

        ``samc-cifar10``, ``samc-cifar100`` and ``samc-mini`` train as the other methods of the
        SAMC paper do: one epoch, plain SGD, batches of 10, a head for each task. How it adapts
        EBM is not told; the learning rate of 0.1, that of all methods with a memory there, and that
        the 10 images per task that these keep are replayed, weighing as many images as they are,
        are ours: 1/t would leave such a rate next to nothing of later tasks.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            gate: How a label's embedding gates hidden units, ``softmax`` (CIFAR-10) or
                ``normalised`` (MNIST); see `fastcil.nn.EnergyHead`. Only with ``softmax`` are
                there class activation maps.
            width: Hidden units; 0 for as many as the backbone has channels.
            negatives: N: one ``random`` class; one label at ``random`` from the ``batch`` (the
                released code for CIFAR-100), a class as often as it occurs; or ``all`` classes
                there are to draw from.
            head: What N is drawn from: with ``all`` the classes in the current task, or all known
                ones while exemplars are replayed (as in the released code); with ``task`` those
                that arrived with the image's own.
            replay: Whether exemplars are kept and replayed.
            replay_share: What the loss of exemplars weighs, new images having the rest: the share
                of past ``tasks``, 1 - 1/t in task t, as in the released code for CIFAR-100, or
                their share of the step's ``images``.
        """

        first: Recipe = _CIFAR10
        later: Recipe = _CIFAR10
        gate: Literal["softmax", "normalised"] = "softmax"
        width: int = 0
        negatives: Literal["random", "batch", "all"] = "random"
        head: Literal["all", "task"] = "all"
        replay: bool = False
        replay_share: Literal["tasks", "images"] = "tasks"

        def __post_init__(self) -> None:
            check_not_negative("width", self.width)
            check_choices(self)

    PRESETS: ClassVar[dict[str, Config]] = {
        "cifar10": Config(width=1024),
        "mnist": Config(_MNIST, _MNIST, gate="normalised", width=400),
        **dict.fromkeys(
            ("samc-cifar10", "samc-cifar100", "samc-mini"),
            Config(_P1, _P1, head="task", replay=True, replay_share="images"),
        ),
    }

    config: Config
    keeps: ClassVar[Literal["exemplars", "everything", "nothing"]] = "nothing"
    selection = "random"

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        if config.replay:
            self.keeps = "exemplars"  # type: ignore[misc]
        self.outputs = TaskOutputs()
        self.draws = _Draws()

    def begin_task(self, task: Task) -> None:
        """Starts the network, or adds embeddings of the new classes."""
        config = self.config
        if task.first:
            backbone = self.context.make_backbone()
            head = EnergyHead(channels(backbone), task.total, config.gate, config.width)
            self.network = with_head(backbone, head)
        else:
            self._head.grow(task.total)
        self.outputs.add(len(task.new_classes))
        self.draws.open()

    @property
    def _head(self) -> EnergyHead:
        head = self.network.head
        assert isinstance(head, EnergyHead)
        return head

    def stages(self, task: Task) -> list[Stage]:
        """One stage on the new data, with memory as a second stream where it is replayed."""
        recipe = self.config.first if task.first else self.config.later
        streams: tuple[Stream, ...] = (Stream((task.examples,), recipe.batch_size),)
        if self.config.replay:
            streams = replay_streams(task, recipe.batch_size)
        replays = len(streams) > 1
        classes = range(task.total) if replays else task.classes
        by_tasks = replays and self.config.replay_share == "tasks"
        return [
            _EnergyStage(
                name="contrast",
                method=self,
                objective=partial(
                    self._loss,
                    outputs_of(classes, task.total).to(self._head.readout.device),
                    1 / (task.index + 1) if by_tasks else 1.0,
                ),
                streams=streams,
                recipe=recipe,
                parameters=self.network.trained_parameters,
                primary=True,
                logits=self.logits,
            )
        ]

    def _loss(self, current: Tensor, share: float, batch: Batch) -> Losses:
        """The contrast of new images, weighed by ``share``, and that of exemplars."""
        scores = self.network(batch.images)  # [B, K], -E
        compared = self.compared(batch.labels, current)
        # E(x, y+) + log sum of exp(-E) is a cross-entropy over what is compared.
        terms = F.cross_entropy(
            scores.masked_fill(~compared, -torch.inf), batch.labels, reduction="none"
        )
        if share == 1.0:
            return {"classification": terms.mean()}
        new = batch.part == 0
        return {
            "classification": share * masked_mean(terms, new),
            "replay": (1 - share) * masked_mean(terms, ~new),
        }

    def compared(self, labels: Tensor, current: Tensor) -> Tensor:
        """Whose energies the loss compares, the label itself and N, bool [B, K].

        Args:
            labels: int64.  # [B]
            current: Which classes N is from with ``head="all"``.  # bool [K]
        """
        known = len(current)
        own = F.one_hot(labels, known)  # [B, K]
        pool = current[None].expand(len(labels), -1).long() * (1 - own)
        if self.config.head == "task":
            pool = self.outputs.own(labels, known).long() * (1 - own)
        else:
            pool = torch.where(pool.any(1, keepdim=True), pool, 1 - own)
        if self.config.negatives == "all":
            return (pool + own).bool()
        if self.config.negatives == "batch":
            there = pool * own.sum(0)  # as often as they occur
            pool = torch.where(there.any(1, keepdim=True), there, pool)
        return (self._drawn(pool) + own).bool()

    def _drawn(self, weights: Tensor) -> Tensor:
        """One class of each row of integer weights [B, K], one-hot; none where all are 0."""
        upper = weights.cumsum(1)
        numbers = self.draws.uniform(len(weights)).to(weights.device, non_blocking=True)
        target = (numbers * upper[:, -1]).long()[:, None]  # below the sum, if that is not 0
        return ((upper > target) & (upper - weights <= target)).long()


class _Draws(nn.Module):
    """Uniform numbers that are a function of a saved one, which changes when it is told.

    It is kept on the host whatever device its method is on: only the generator reads it.

    Attributes:
        seed: int64 [].
    """

    seed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Stays where it is: on the host."""
        return self

    def open(self) -> None:
        """Starts anew, at a number from torch's global generator."""
        self.seed = torch.randint(2**62, (), device="cpu")

    def advance(self) -> None:
        """Makes other numbers of the next ones."""
        self.seed = self.seed + 1

    @eager
    def uniform(self, count: int) -> Tensor:
        """Numbers in [0, 1), float64 [count] on the CPU; the same until `advance`."""
        generator = torch.Generator().manual_seed(int(self.seed))
        return torch.rand(count, dtype=torch.float64, generator=generator)


class _EnergyStage(Stage):
    """A stage whose negatives are drawn anew in every step."""

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """One training step."""
        losses = super().step(batches, stepper)
        method = self.method
        assert isinstance(method, EBM)
        method.draws.advance()
        return losses
