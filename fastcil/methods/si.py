"""Synaptic intelligence: weights are held by how much they did for the loss while they moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastcil.contract import (
    Batch,
    Context,
    Losses,
    Method,
    Recipe,
    Retained,
    Stage,
    Stepper,
    Stream,
    Task,
    check_choices,
    check_not_negative,
    check_positive,
    total,
)
from fastcil.curvature import half_quadratic
from fastcil.curvature.curvature import grown
from fastcil.curvature.penalty import diagonal_product
from fastcil.methods.anchored import FIRST, LATER, held_parameters
from fastcil.methods.recipes import FINETUNING
from fastcil.nn import (
    Tensors,
    cross_entropy_among,
    gradients_of,
    outputs_of,
    rows_of_others,
    with_gradient,
)
from fastcil.nn.lifecycle import linear_head, start_network

_CIFAR10 = Recipe(
    epochs=50,
    lr=0.03,
    schedule="constant",
    momentum=0.0,
    weight_decay=0.0,
    batch_size=32,
    clip_value=1.0,
)
_MNIST = replace(_CIFAR10, epochs=1, lr=0.1, batch_size=10)


class SI(Method):
    r"""Synaptic intelligence (Zenke et al. 2017).

    .. math:: L = \mathrm{CE} + c \sum_i \Omega_i (\theta_i - \theta_i^{t-1})^2, \qquad
        \Omega_i = \sum_{k<t} \frac{[\omega_i^k]_+}{(\theta_i^k - \theta_i^{k-1})^2 + \xi}, \qquad
        \omega_i^k = -\sum_\tau g_i(\tau)\, \delta\theta_i(\tau)

    over the steps of task k, g being the gradient of CE alone and :math:`\delta\theta` what the
    optimiser made of a step. Released codes differ in the negative part: it is dropped here, as
    in Buzzega et al.'s, for a negative importance would drive weights away.

    Attributes:
        path: Where every parameter was when the task began, and its omega so far.
        kept: Where the parameters were after the last task, and Omega.

    Example:
        >>> SI.Config().c, SI.PRESETS["mnist"].xi
        (0.5, 0.9)
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of SI; the recipes are those of `Finetune`.

        ``PRESETS`` are those of Buzzega et al.'s released code for Seq-CIFAR-10 and Seq-MNIST.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            head: ``all`` known classes share one softmax; or each ``task`` has its own head.
            c: Weight of the penalty.
            xi: Damping of the displacement.
        """

        first: Recipe = FIRST
        later: Recipe = LATER
        head: Literal["all", "task"] = "all"
        c: float = 0.5
        xi: float = 1.0

        def __post_init__(self) -> None:
            check_choices(self)
            check_not_negative("c", self.c)
            check_positive("xi", self.xi)

    PRESETS: ClassVar[dict[str, Any]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING),
        "cifar10": Config(first=_CIFAR10, later=_CIFAR10),
        "mnist": Config(first=_MNIST, later=_MNIST, c=1.0, xi=0.9),
    }

    config: Config
    keeps = "nothing"
    path: Tensors
    kept: Tensors

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.path = Tensors()
        self.kept = Tensors()

    def names(self) -> list[str]:
        """Parameters of the network that are held."""
        return held_parameters(self.network, self.config.head)

    def begin_task(self, task: Task) -> None:
        """Starts the network, or adds the new classes; notes where the weights are."""
        if task.first:
            self.network = start_network(self.context.make_backbone(), task.total)
        else:
            linear_head(self.network).grow(task.total)
        own = dict(self.network.named_parameters())
        here = {f"start/{name}": own[name].detach().clone() for name in self.names()}
        zeros = {f"omega/{name}": torch.zeros_like(own[name].detach()) for name in self.names()}
        self.path = Tensors({**here, **zeros})

    def stages(self, task: Task) -> list[Stage]:
        """One stage on the new data, which follows the weights' path."""
        return [_PathStage(self, task)]

    def penalty(self) -> Tensor:
        """Sum of Omega (theta - anchor)^2."""
        anchor, omega = self.kept.group("anchor/"), self.kept.group("omega/")
        own = dict(self.network.named_parameters())
        moved = [own[name] - grown(where, own[name].shape) for name, where in anchor.items()]
        products = [diagonal_product(2 * grown(v, own[n].shape)) for n, v in omega.items()]
        return half_quadratic(moved, products)

    def follow(self, gradients: dict[str, Tensor], before: dict[str, Tensor]) -> None:
        """Adds one step's share of the path integral."""
        own = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, gradient in gradients.items():
                self.path[f"omega/{name}"].sub_(gradient * (own[name] - before[name]))

    def end_task(self, task: Task) -> None:
        """Makes importances of the path."""
        own = dict(self.network.named_parameters())
        before, old = self.path.group("start/"), self.kept.group("omega/")
        values = {}
        omegas = self.path.group("omega/")
        for name in self.names():
            moved = own[name].detach() - before[name]
            importance = omegas[name].clamp(min=0) / (moved.square() + self.config.xi)
            if name in old:
                importance = importance + grown(old[name], importance.shape)
            values[f"omega/{name}"] = importance
            values[f"anchor/{name}"] = own[name].detach().clone()
        self.kept, self.path = Tensors(values), Tensors()

    def retained(self) -> list[Retained]:
        """The anchor and the importances."""
        buffers = {name: self.kept[name] for name in self.kept.names}
        return [Retained("importances", "curvature", buffers)]


class _PathStage(Stage):
    """Cross-entropy and penalty, with the gradient of the first kept apart."""

    def __init__(self, si: SI, task: Task) -> None:
        config = si.config
        recipe = config.first if task.first else config.later
        own = None
        if config.head == "task":
            own = outputs_of(task.classes, task.total)
            own = own.to(linear_head(si.network).weight.device)
        weight = config.c if len(si.kept) else 0.0

        def objective(batch: Batch) -> Losses:
            logits = si.network(batch.images)
            losses = {"classification": cross_entropy_among(logits, batch.labels, own)}
            if weight:
                losses["penalty"] = weight * si.penalty()
            return losses

        super().__init__(
            name="synaptic intelligence",
            method=si,
            objective=objective,
            streams=(Stream((task.examples,), recipe.batch_size),),
            recipe=recipe,
            parameters=si.network.trained_parameters,
            primary=True,
            logits=si.logits,
            unmoved=None if own is None else partial(rows_of_others, linear_head(si.network), own),
        )
        self._si = si

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """One update, whose share of the path integral is kept.

        The optimiser is handed a linear function of the weights with the whole loss's gradient,
        so that cross-entropy is differentiated once, not once alone and once with the penalty.
        """
        losses = self.loss(Batch.cat(batches))
        named = {n: p for n, p in self._si.network.named_parameters() if p.requires_grad}
        parameters = list(named.values())
        task = whole = gradients_of(losses["classification"], parameters)
        rest = {name: value for name, value in losses.items() if name != "classification"}
        if rest:
            pulls = gradients_of(total(rest), parameters)
            whole = [g + pull for g, pull in zip(task, pulls, strict=True)]
        followed = set(self._si.names())
        before = {name: p.detach().clone() for name, p in named.items() if name in followed}
        flat = torch.cat([g.flatten() for g in whole])
        stepper.update(with_gradient(parameters, flat))
        by_name = dict(zip(named, task, strict=True))
        self._si.follow({name: by_name[name] for name in before}, before)
        return {name: value.detach() for name, value in losses.items()}
