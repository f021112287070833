"""Weights held where they were by a quadratic penalty: what EWC and its kin are made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastcil.contract import (
    Batch,
    Context,
    Losses,
    Method,
    Recipe,
    Retained,
    Stage,
    Stream,
    Task,
    check_choices,
    check_not_negative,
)
from fastcil.curvature import Curvature
from fastcil.curvature.anchor import Hold, draws, keep, kept_curvature, scan_of
from fastcil.curvature.layers import find_layers
from fastcil.data import Examples
from fastcil.nn import Network, Tensors, cross_entropy_among, outputs_of, rows_of_others
from fastcil.nn.lifecycle import linear_head, start_network

FIRST = Recipe(epochs=200, lr=0.1, schedule="step", milestones=(60, 120, 170), weight_decay=5e-4)
LATER = Recipe(epochs=80, lr=0.1, schedule="step", milestones=(40, 70), weight_decay=2e-4)


@dataclass(frozen=True)
class AnchoredConfig:
    """Settings that all of them share.

    Args:
        first: Recipe of the first task.
        later: Recipe of every later task.
        lam: Weight lambda of the penalty.
        head: ``all`` known classes share one softmax, whose weights are held too; or each ``task``
            has its own, which nothing else touches and nothing holds, and the curvature is that
            of its own loss.

    Example:
        >>> AnchoredConfig().head
        'all'
    """

    first: Recipe = FIRST
    later: Recipe = LATER
    lam: float = 1.0
    head: Literal["all", "task"] = "all"

    def __post_init__(self) -> None:
        check_not_negative("lam", self.lam)
        check_choices(self)


class Anchored(Method):
    r"""Cross-entropy, and a quadratic penalty for leaving the old tasks' weights.

    .. math:: L = \mathrm{CE} + \lambda \, P(\theta)

    Subclasses say which curvature P is made of, and how a task's is added to those before it.

    Attributes:
        kept: Where the weights were, and the curvature there; empty in the first task.
    """

    config: Any
    keeps: ClassVar[Literal["exemplars", "everything", "nothing"]] = "nothing"
    kept: Tensors

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.kept = Tensors()
        self._hold: Hold | None = None

    @abstractmethod
    def curvature(self) -> Curvature:
        """An empty curvature of the network as it is now."""

    @abstractmethod
    def shares(self, task: Task) -> tuple[float, float]:
        """Weights of the curvature of the tasks so far, and of the new one's, in what is kept."""

    def names(self) -> list[str]:
        """Parameters of the network that are held."""
        return held_parameters(self.network, self.config.head)

    def begin_task(self, task: Task) -> None:
        """Starts the network, or adds the new classes to its head."""
        if task.first:
            self.network = start_network(self.context.make_backbone(), task.total)
        else:
            linear_head(self.network).grow(task.total)

    def stages(self, task: Task) -> list[Stage]:
        """One stage on the new data."""
        recipe = self.config.first if task.first else self.config.later
        own, head = self.own(task), linear_head(self.network)
        weight = self.weight(task) if len(self.kept) else 0.0

        def objective(batch: Batch) -> Losses:
            return self.loss(batch, own, weight)

        return [
            Stage(
                name="finetune with penalty" if len(self.kept) else "finetune",
                method=self,
                objective=objective,
                streams=(Stream((task.examples,), recipe.batch_size),),
                recipe=recipe,
                parameters=self._start,
                primary=True,
                logits=self.logits,
                unmoved=None if own is None else partial(rows_of_others, head, own),
            )
        ]

    def own(self, task: Task) -> Tensor | None:
        """Outputs [K] that the task's softmax is over, None for all."""
        if self.config.head == "all":
            return None
        return outputs_of(task.classes, task.total).to(linear_head(self.network).weight.device)

    def looked_at(self, task: Task) -> Examples:
        """Images that the curvature is measured on."""
        return task.examples

    def weight(self, task: Task) -> float:
        """What the penalty is multiplied by in a task."""
        lam: float = self.config.lam
        return lam

    def loss(self, batch: Batch, own: Tensor | None, weight: float) -> Losses:
        """Cross-entropy over ``own`` [K] or all outputs, and the penalty."""
        logits = self.network(batch.images)
        losses = {"classification": cross_entropy_among(logits, batch.labels, own)}
        if weight:
            losses["penalty"] = weight * self.penalty()
        return losses

    def penalty(self) -> Tensor:
        """P of the network's weights."""
        return self._held_by()(self.network)

    def _held_by(self) -> Hold:
        """What was kept, as a penalty; to make it waits for the device."""
        if self._hold is None or self._hold.kept is not self.kept:
            self._hold = Hold(self.kept, self.curvature())
        return self._hold

    def _start(self) -> Iterable[nn.Parameter]:
        """What a stage trains, asked as it begins: before any step."""
        if len(self.kept):
            self._held_by()
        return self.network.trained_parameters()

    def end_task(self, task: Task) -> None:
        """Measures the curvature at the task's end and adds it to that of the tasks before."""
        curvature = self.curvature()
        if len(self.kept):
            curvature.load_tensors(kept_curvature(self.kept))
        scan = scan_of(self.context, self.network, self.looked_at(task), curvature.of_batches)
        with outputs_among(self.network, self.own(task)):
            drawn = draws(task.index, torch.initial_seed())
            curvature.measure(scan, drawn, *self.shares(task))
        self.kept = keep(self.network, self.names(), curvature)
        self._hold = None

    def retained(self) -> list[Retained]:
        """The anchor and the curvature."""
        buffers = {name: self.kept[name] for name in self.kept.names}
        return [Retained("curvature", "curvature", buffers)]


@contextmanager
def outputs_among(
    network: nn.Module, own: Tensor | None, fill: float | None = None
) -> Iterator[None]:
    """Puts ``fill`` in the place of outputs that are not among ``own`` [K].

    The least number there is, which gives them no probability, or 0 for squared error.
    """
    if own is None:
        yield
        return

    def mask(_: nn.Module, __: Any, outputs: Tensor) -> Tensor:
        # Not minus infinity: times the zero that is its share of a gradient it would be NaN.
        least = torch.finfo(outputs.dtype).min
        return outputs.masked_fill(~own, least if fill is None else fill)

    handle = network.register_forward_hook(mask)
    try:
        yield
    finally:
        handle.remove()


def of_mean(tasks: int) -> tuple[float, float]:
    """Shares of the old ones and of the new one in the mean over ``tasks`` tasks."""
    return (tasks - 1) / tasks, 1 / tasks


def held_parameters(network: Network, head: str) -> list[str]:
    """What a stage trains, but for heads of their own (``head="task"``)."""
    trained = {id(p) for p in network.trained_parameters()}
    return [
        name
        for name, p in network.named_parameters()
        if id(p) in trained and (head == "all" or not name.startswith("head."))
    ]


def held_layers(network: nn.Module, names: Collection[str]) -> list[str]:
    """Convolutions and linear layers all of whose parameters are among ``names``."""
    return [layer.name for layer in find_layers(network) if set(layer.parameters) <= set(names)]
