"""Nodes that are added to a method's network for each task, and compressed to those it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcil.contract import (
    Addon,
    Batch,
    Context,
    Losses,
    Method,
    Record,
    Retained,
    Stage,
    Stepper,
    Task,
    check_choices,
    check_not_negative,
    check_positive,
    evaluating,
)
from fastcil.errors import CompositionError
from fastcil.nn import ExpandedBackbone, LinearHead, Network
from fastcil.nn.expansion import Layer, Removal, check_rates, nodes_in_use, retention_curve
from fastcil.nn.extractor_kinds import extractor_structure
from fastcil.nn.growing import compress, expanded_backbone, without_settled


class LEC(Addon):
    r"""Learnable expansion and compression for methods of other settings (Yang et al. 2021).

    In every task but the first the method's backbone gets as many new nodes as it has features,
    and its head reads

    .. math:: f_t(x) = \gamma f_{t-1}(x) + \alpha_t \odot f'_t(x)

    (Eq. 4; `fastcil.nn.ExpandedBackbone`). The method's stages train the nodes with all else, and
    in those that learn the new data every step has

    .. math:: \lambda_2 L_R(\alpha_t; \theta'_t, \tau)

    beside the method's loss, on the images of its first stream, for the nodes and tau alone (Eq. 8;
    `fastcil.nn.Expansion.compression`). The maps that it reads are those of the backbone in
    evaluation mode. As the last of these stages ends, nodes that are not used are removed for
    good, and nodes stay as they were learned from then on.

    It is meant for ``dark+lec`` without memory on Sequential MNIST (Table 6, App. A.4: "replacing
    the fully-connected layers of DER"), whose one epoch a task leaves beta at 1. `LECNet` is the
    method in its few-shot form.

    Example:
        >>> LEC.Config().gamma
        0.8
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of expansion and compression; see `LECNet.Config`, whose defaults these are.

        Args:
            expansion: ``ne``, ``nc`` or ``sa``.
            layer: What the nodes are: ``fc`` on pooled features, ``conv1x1`` or ``conv3x3``.
            gamma: Weight of the features there were.
            compression_weight: lambda_2.
            tau: Retention rate, or where it starts.
            learn_tau: Whether ``sa`` learns tau.
            price: rho.
            removal: What of ``sa`` is removed: nodes ``unused`` by every training image, or with
                alpha below 1/2 in the ``mean``.
        """

        expansion: Literal["ne", "nc", "sa"] = "sa"
        layer: Layer = "fc"
        gamma: float = 0.8
        compression_weight: float = 0.1
        tau: float = 0.5
        learn_tau: bool = True
        price: float = 0.5
        removal: Removal = "unused"

        def __post_init__(self) -> None:
            check_choices(self)
            check_positive("gamma", self.gamma)
            check_not_negative("compression_weight", self.compression_weight)
            check_rates(self.tau, self.price)

    config: Config
    expanded: Tensor

    def __init__(self, config: Any, context: Context, method: Method) -> None:
        super().__init__(config, context, method)
        # How many tasks have brought nodes.
        self.register_buffer("expanded", torch.zeros((), dtype=torch.int64))

    def check(self, method: Method) -> None:
        """Raises `CompositionError` without one backbone whose parameters may become more."""
        name = type(method).__name__
        if method.keeps == "everything":
            raise CompositionError(
                f"addon 'lec' adds nodes to what was learned before, and {name} keeps everything, "
                f"to learn it anew; compose it with a method that goes on, as 'dark'."
            )
        if method.adds_extractors:
            raise CompositionError(
                f"addon 'lec' adds nodes to a method's one extractor, and {name} has several; "
                f"compose it with a method that has one, as 'dark'."
            )
        if any(entry.kind == "curvature" for entry in method.retained()):
            raise CompositionError(
                f"addon 'lec' adds parameters in every task, and {name} measures how much those "
                f"it has matter; compose it with a method that doesn't, as 'dark'."
            )
        network: Any = getattr(method, "network", None)
        if network is None:
            return
        if not isinstance(network, Network) or not isinstance(network.head, LinearHead):
            raise CompositionError(
                f"addon 'lec' adds nodes before a LinearHead, and {name} classifies by "
                f"{type(getattr(network, 'head', network)).__name__}; compose it with a method "
                f"that has one, as 'dark'."
            )
        kind = extractor_structure(network.extractors[0])["kind"]
        mine = isinstance(network.extractors[0], ExpandedBackbone) and bool(self.tasks)
        if kind != "backbone" and not mine:
            raise CompositionError(
                f"addon 'lec' adds nodes to a plain backbone, and that of {name} is '{kind}'; "
                f"compose it with a method that leaves its backbone as it is, as 'dark'."
            )

    @property
    def tasks(self) -> int:
        """How many tasks have brought nodes."""
        # Before the buffer is there nothing was learned.
        return int(getattr(self, "expanded", 0))

    def begin_task(self, task: Task) -> None:
        """Adds nodes, from the second task on."""
        self.check(self.method)
        if task.first:
            return
        config, network = self.config, self.method.network
        expanded = expanded_backbone(network)
        if expanded is None:
            expanded = ExpandedBackbone(network.extractors[0], "sum", config.gamma)
            network.extractors[0] = expanded
        expanded.expand(config.layer, config.expansion, config.tau)
        self.expanded += 1

    def stages(self, task: Task, stages: list[Stage]) -> list[Stage]:
        """The method's stages, those that learn the new data with L_R and sharper indicators."""
        primary = self.primary("lec", stages)
        expanded = expanded_backbone(self.method.network)
        if expanded is None:
            return stages
        for stage in stages:
            stage.parameters = partial(self._without_settled, stage.parameters)
        for stage in primary:
            stage.before_epoch.insert(0, self._sharpen)
            if self.config.expansion != "ne":
                self._press(stage)
        finish = primary[-1].finish

        def finished() -> None:
            if finish is not None:
                finish()
            self._compress(task)

        primary[-1].finish = finished
        return stages

    def _grown(self) -> ExpandedBackbone:
        expanded = expanded_backbone(self.method.network)
        assert expanded is not None
        return expanded

    def _without_settled(self, parameters: Callable[[], Iterable[nn.Parameter]]) -> list[Any]:
        """What a stage trains, but for nodes of earlier tasks."""
        return without_settled(parameters(), self._grown(), self.config.learn_tau)

    def _sharpen(self, epoch: int) -> None:
        """Makes indicators sharper (Eq. 6)."""
        self._grown().newest.beta.fill_(1.0 + epoch)

    def _press(self, stage: Stage) -> None:
        """Adds L_R to whatever a stage's step minimises."""
        step = stage.step

        def pressed(batches: Sequence[Batch], stepper: Stepper) -> Losses:
            pressing = _Pressing(stepper, partial(self._pressure, batches[0].images))
            return {**step(batches, pressing), **pressing.losses}

        stage.step = pressed  # type: ignore[method-assign]

    def _pressure(self, images: Tensor) -> Tensor:
        """lambda_2 L_R."""
        expanded = self._grown()
        with evaluating(expanded.backbone), torch.no_grad():
            maps = expanded.own_maps(images)
        loss = expanded.newest.compression(maps, self.config.price)
        return self.config.compression_weight * loss

    def _compress(self, task: Task) -> None:
        """Removes the nodes that the task doesn't need."""
        expanded = self._grown()
        newest = expanded.newest
        with evaluating(self.method):
            use = self.context.scan(
                lambda images: newest.use(expanded.own_maps(images)), task.examples
            )
        compress(self.method.network, nodes_in_use(newest, use, self.config.removal))

    def retained(self) -> list[Retained]:
        """The nodes that tasks have added."""
        expanded = expanded_backbone(getattr(self.method, "network", None))
        return [] if expanded is None else [Retained("expansions", "network", expanded.added())]

    def records(self) -> list[Record]:
        """Nodes kept, and tau, by task."""
        expanded = expanded_backbone(getattr(self.method, "network", None))
        return [] if expanded is None else [Record("curve", *retention_curve(expanded.each()))]


class _Pressing:
    """A Stepper that adds a term to every loss.

    Args:
        stepper: The one that it stands for.
        pressure: Gives the term.
    """

    def __init__(self, stepper: Stepper, pressure: Callable[[], Tensor]) -> None:
        self.stepper = stepper
        self.pressure = pressure
        self.losses: Losses = {}

    @property
    def lr(self) -> float:
        """The learning rate of this epoch."""
        return self.stepper.lr

    def update(self, loss: Tensor) -> None:
        """Back-propagates the loss and the term, and steps."""
        term = self.pressure()
        self.losses = {"compression": term.detach()}
        self.stepper.update(loss + term.to(loss.dtype))
