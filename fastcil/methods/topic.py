"""TOPIC: a neural gas over the features, whose topology few-shot sessions must leave as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcil.contract import (
    Batch,
    Context,
    Losses,
    Method,
    Recipe,
    Record,
    Retained,
    Stage,
    Stepper,
    Stream,
    Task,
    check_choices,
    check_not_negative,
    check_positive,
    evaluating,
)
from fastcil.errors import FastcilError
from fastcil.memory.replay import replay_streams
from fastcil.methods.recipes import BASE_SESSION, session
from fastcil.nn import LinearHead, Network, masked_mean
from fastcil.nn.lifecycle import frozen_copy, linear_head, start_network
from fastcil.nn.neural_gas import NeuralGas
from fastcil.nn.sessions import Trains, scores_keeping, session_parameters
from fastcil.nn.unit import unit_vectors

_SEED = 2020
_CIFAR = session(70, drop=60)


class TOPIC(Method):
    r"""Topology-preserving knowledge incrementer (Tao et al. 2020).

    After the first task a `fastcil.nn.neural_gas.NeuralGas` is laid over the features of its
    images. Of each node the nearest image of its class is an anchor, and memory keeps the anchors
    (``selection = "own"``: those of the fullest nodes, if there is no room for all). In a session,
    N being the new images of a batch, E its anchors, f the features at unit length, :math:`f^*`
    those of the network before the session and D their number,

    .. math:: L = \frac{1}{|N|} \sum_{x \in N} \Big[ \mathrm{CE}(z(x), y)
        + \lambda_{min} \tfrac12 \|f(x) - c_y\|^2
        + \lambda_{max} \max(0, \; \xi - \|f(x) - r(x)\|) \Big]
        + \lambda \frac{1}{|E| D} \sum_{x \in E} \sum_d v_d(x) (f_d(x) - f_d^*(x))^2

    The last term is the anchor loss (Eq. 4), in the form of their code: :math:`v_d` is 1 where the
    variance of coordinate d around the anchor's node is below a threshold, and less where it is
    not, for what varied much before may go on to. Their head reads unit features, and weights and
    margin are of a size that fits these alone; what is left of v then is 1, the threshold being
    above any variance that unit features have. The two before it are the min-max loss (Eqs.
    5, 6), of whose code only the weights were released; its form is ours. "Min" draws new images to
    a centre of their class (Wen et al. 2016, Eq. 2), which starts as their mean and learns by
    plain SGD with a rate of its own, from features in evaluation mode, in a stage that accompanies
    each epoch. "Max" keeps them a margin :math:`\xi` away from :math:`r(x)`, the nearest to f(x)
    of all nodes and centres of other classes: the node it would share an edge with.

    The released code lacks the neural gas too: how nodes adapt and edges come is as in the sources
    that the paper cites, with their schedules. After a session nodes of its classes are inserted,
    over their features then; old nodes stay. Images of classes known before change no node.

    Example:
        >>> TOPIC.Config().anchor_weight, TOPIC.PRESETS["fscil-cub"].loose
        (350.0, 0.8)
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of TOPIC; the default is the released CIFAR-100 configuration's.

        The ``fscil-...`` presets are for the three data sets of Tao et al. (2020).

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task; each step takes its batch size of anchors
                too, or all there are.
            nodes: Of the neural gas after the first task; anchors are as many at most.
            nodes_per_class: Inserted for each class of a later task (ours).
            lifetime: Age beyond which an edge is removed (ours); at most 254.
            anchor_weight: lambda.
            threshold: Variance from which a coordinate is held less.
            loose: v of such a coordinate; it is 1 for the others.
            min_weight: lambda_min.
            centre_lr: Learning rate of the centres.
            max_weight: lambda_max.
            margin: xi.
            trains: What later tasks train: ``all``, or of all convolutions those of the
                ``last-block`` alone.
            old_rows: Whether the loss's gradient reaches the classifier's rows of old classes:
                ``kept`` out of it, or ``trained``.
            normalised: Whether the head reads feature vectors of unit length; see
                `fastcil.nn.LinearHead`.
        """

        first: Recipe = BASE_SESSION
        later: Recipe = _CIFAR
        nodes: int = 400
        nodes_per_class: int = 1
        lifetime: int = 50
        anchor_weight: float = 350.0
        threshold: float = 0.5
        loose: float = 0.9
        min_weight: float = 0.3
        centre_lr: float = 0.1
        max_weight: float = 1e-4
        margin: float = 0.5
        trains: Literal["all", "last-block"] = "last-block"
        old_rows: Literal["kept", "trained"] = "kept"
        normalised: bool = False

        def __post_init__(self) -> None:
            check_choices(self)
            for name in ("anchor_weight", "threshold", "loose", "min_weight", "max_weight"):
                check_not_negative(name, getattr(self, name))
            check_not_negative("margin", self.margin)
            check_positive("centre_lr", self.centre_lr)
            for name in ("nodes", "nodes_per_class"):
                if getattr(self, name) < 1:
                    raise FastcilError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    PRESETS: ClassVar[dict[str, Config]] = {
        "fscil-cifar100": Config(normalised=True),
        "fscil-mini": Config(later=session(100, drop=90), max_weight=1e-5, normalised=True),
        "fscil-cub": Config(
            later=session(120, lr=0.01, drop=110),
            loose=0.8,
            min_weight=5e-5,
            centre_lr=0.5,
            max_weight=1e-6,
            normalised=True,
        ),
    }

    config: Config
    selection = "own"

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.teacher: Network | None = None
        self.gas = NeuralGas(config.lifetime)
        self.centres: LinearHead | None = None
        self._task: Task | None = None

    def begin_task(self, task: Task) -> None:
        """Makes room for the task's classes in the head and in the neural gas."""
        config = self.config
        new, per_class = len(task.new_classes), config.nodes_per_class
        if task.first:
            backbone, normalised = self.context.make_backbone(), config.normalised
            self.network = start_network(backbone, task.total, normalised=normalised)
            count = min(config.nodes, len(task.examples))
        else:
            self.teacher = frozen_copy(self.network)
            linear_head(self.network).grow(task.total)
            labels = task.examples.labels
            sizes = torch.bincount(labels[labels >= task.known] - task.known, minlength=new)
            count = int(sizes.clamp(max=per_class).sum())
            if new and config.min_weight:
                self.centres = self._centres(task)
        # Counted before it is filled: the budget is applied in between.
        self.gas.reserve(count, linear_head(self.network).weight)
        self._task = task

    def _points(self, images: Tensor) -> Tensor:
        """Features at unit length, [B, D]."""
        return unit_vectors(self.network.features(images))

    def _centres(self, task: Task) -> LinearHead:
        """The mean features of each new class, as the rows of a head: one that can be saved."""
        new = (task.examples.labels >= task.known).nonzero().flatten()
        examples = task.examples.select(new)
        with evaluating(self.network):
            features = self.context.scan(self._points, examples)
        labels = (examples.labels - task.known).to(features.device)
        belongs = F.one_hot(labels, len(task.new_classes)).T.to(features)  # [C_n, N]
        means = (belongs @ features) / belongs.sum(1, keepdim=True).clamp(min=1)  # [C_n, D]
        head = linear_head(self.network)
        centres = LinearHead(head.in_features, len(means), bias=False).to(head.weight)
        with torch.no_grad():
            centres.weight.copy_(means)
        return centres

    def stages(self, task: Task) -> list[Stage]:
        """One stage on new images and anchors, which the centres' learning accompanies."""
        # What memory is to keep is asked after them, of a resumed run too, which began elsewhere.
        self._task = task
        config = self.config
        recipe = config.first if task.first else config.later
        trains: Trains = "all" if task.first else config.trains
        keeps = config.old_rows == "kept" and bool(task.new_classes)
        stage = Stage(
            name="topic",
            method=self,
            objective=partial(self._loss, task.known if keeps else 0, task.known),
            streams=replay_streams(task, recipe.batch_size),
            recipe=recipe,
            parameters=lambda: session_parameters(self.network, trains),
            primary=True,
            logits=self.logits,
        )
        if self.centres is not None:
            stage.companions.append(_CentreStage(self, task, recipe.batch_size))
        return [stage]

    def _loss(self, kept: int, known: int, batch: Batch) -> Losses:
        """Cross-entropy and min-max loss of new images, anchor loss of the others."""
        config = self.config
        features = self.network.features(batch.images)  # [B, D]
        logits = scores_keeping(linear_head(self.network), features, kept)
        new = batch.part == 0
        terms = F.cross_entropy(logits, batch.labels, reduction="none")
        losses = {"classification": masked_mean(terms, new)}
        if self.teacher is None:
            return losses
        # Its weights are frozen; images that depend on something learned (a mask) are not.
        old = unit_vectors(self.teacher.features(batch.images))  # [B, D]
        features = unit_vectors(features)
        losses["anchors"] = config.anchor_weight * masked_mean(self._moved(features, old), ~new)
        if self.centres is not None:
            spread = self._spread(features, batch.labels, known)
            losses["min"] = config.min_weight * masked_mean(spread, new & (batch.labels >= known))
        if config.max_weight:
            away = self._away(features, batch.labels, known)
            losses["max"] = config.max_weight * masked_mean((config.margin - away).relu(), new)
        return losses

    def _moved(self, features: Tensor, old: Tensor) -> Tensor:
        """How far features left the old ones: the mean over d of v_d (f_d - f*_d)^2, [B]."""
        with torch.no_grad():
            varied = self.gas.variance[self.gas.nearest(old)] >= self.config.threshold  # [B, D]
            held = torch.where(varied, self.config.loose, 1.0).to(features)
        return (held * (features - old).square()).mean(1)

    def _spread(self, features: Tensor, labels: Tensor, known: int) -> Tensor:
        """Half the squared distance from the centre of the class, for images of new ones, [B]."""
        assert self.centres is not None
        centres = self.centres.weight[(labels - known).clamp(min=0)]  # [B, D]
        return 0.5 * (features - centres).square().sum(1)

    def _away(self, features: Tensor, labels: Tensor, known: int) -> Tensor:
        """Distance from the nearest node or centre of another class, [B]; inf without any."""
        rivals, whose = self.gas.nodes, self.gas.labels  # [R, D], [R]
        if self.centres is not None:
            centres = self.centres.weight.detach()
            own = torch.arange(known, known + len(centres), device=whose.device)
            rivals, whose = torch.cat([rivals, centres]), torch.cat([whose, own])
        with torch.no_grad():
            far = torch.cdist(features.detach(), rivals.to(features))  # [B, R]
            far = far.masked_fill((labels[:, None] == whose) | (whose < 0), torch.inf)
            nearest = far.min(1)
        apart = (features - rivals.to(features)[nearest.indices]).square().sum(1)
        # The root has no slope at 0.
        return torch.where(nearest.values.isinf(), torch.inf, apart.clamp(min=1e-12).sqrt())

    def centre_loss(self, known: int, batch: Batch) -> Losses:
        """The squared distances of the centres' own images, a mean for each class."""
        spread = self._spread(self._points(batch.images), batch.labels, known)
        beside = (batch.labels[:, None] == batch.labels).sum(1)  # images of its class
        return {"centres": torch.where(batch.labels >= known, spread / beside, 0.0).sum()}

    def chosen(self) -> Tensor:
        """The anchors: of new nodes, then those there are, in their order."""
        task = self._task
        assert task is not None
        there = torch.arange(len(task.examples), len(task.examples) + len(task.exemplars))
        return torch.cat([self._settle(task), there])

    def _settle(self, task: Task) -> Tensor:
        """Lets the neural gas learn the task's new classes, once; positions of their anchors."""
        new = (task.examples.labels >= task.known).nonzero().flatten()
        old = len(self.gas.known)
        if not len(new) or old == len(self.gas):
            return torch.empty(0, dtype=torch.int64)
        examples = task.examples.select(new)
        with evaluating(self.network):
            features = self.context.scan(self._points, examples)
        labels = examples.labels.to(features.device)
        generator = torch.Generator().manual_seed(_SEED + task.index)
        if old:
            self.gas.insert(features, labels, self.config.nodes_per_class, generator)
        else:
            self.gas.fit(features, labels, self.config.nodes, generator)
        return new.cpu()[self.gas.anchors(features, labels, self.gas.known[old:])]

    def end_task(self, task: Task) -> None:
        """Lets the neural gas learn the task, unless memory has asked, and the teacher go."""
        if self._task is not None:
            self._settle(self._task)
        self.teacher = None
        self.centres = None
        self._task = None

    def retained(self) -> list[Retained]:
        """The neural gas: like networks it counts under ``count="all"``."""
        return [Retained("neural gas", "network", dict(self.gas.named_buffers()))]

    def records(self) -> list[Record]:
        """What the neural gas looks like."""
        if not len(self.gas.known):
            return []
        edges, labels = self.gas.edges(), self.gas.labels
        across = int((labels[edges[:, 0]] != labels[edges[:, 1]]).sum())
        pieces = len(self.gas.components()[self.gas.known].unique())
        columns = ["nodes", "edges", "of these between classes", "components"]
        row = [len(self.gas.known), len(edges), across, pieces]
        return [Record("table", "Neural gas", {"columns": columns, "rows": [row]})]


class _CentreStage(Stage):
    """The centres' learning, beside each epoch of the session's stage."""

    def __init__(self, topic: TOPIC, task: Task, batch_size: int) -> None:
        lr = topic.config.centre_lr
        super().__init__(
            name="centres",
            method=topic,
            objective=partial(topic.centre_loss, task.known),
            streams=(Stream((task.examples,), batch_size),),
            recipe=Recipe(1, lr, "constant", momentum=0.0, weight_decay=0.0, batch_size=batch_size),
            parameters=lambda: topic.centres.parameters() if topic.centres is not None else (),
        )
        self._network = topic.network

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """One step by features in evaluation mode, whose batch norms learn from it nothing."""
        with evaluating(self._network):
            return super().step(batches, stepper)
