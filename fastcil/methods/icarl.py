"""iCaRL: distillation through sigmoids, classification by the nearest mean of exemplars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    Retained,
    Stage,
    Stepper,
    Stream,
    Task,
    check_choices,
    check_not_negative,
    check_positive,
)
from fastcil.memory.means import NearestMean
from fastcil.memory.one_each import OneEach
from fastcil.memory.replay import replay_streams
from fastcil.memory.task_means import TaskMeans
from fastcil.methods.recipes import BASE_SESSION, PYCIL_FIRST, online, session
from fastcil.nn import Network, TaskOutputs, distillation, masked_mean
from fastcil.nn.lifecycle import frozen_copy, linear_head, start_network
from fastcil.nn.sessions import Trains, session_parameters

_CIFAR = Recipe(
    epochs=70, lr=2.0, schedule="step", milestones=(49, 63), gamma=0.2, weight_decay=2e-5
)
_IMAGENET = Recipe(
    epochs=60, lr=2.0, schedule="step", milestones=(20, 30, 40, 50), gamma=0.2, weight_decay=1e-5
)
_PYCIL_LATER = Recipe(epochs=170, lr=0.1, schedule="step", milestones=(80, 120), weight_decay=2e-4)
_FEW_SHOT: Any = {"form": "few-shot", "trains": "last-block", "normalised": True}


class ICaRL(Method):
    r"""Incremental classifier and representation learning (Rebuffi et al. 2017).

    ``loss="sigmoid"`` is the paper's (Alg. 3): with g = sigmoid(z) [B, K] and q the previous
    network's outputs on the same images,

        L = -1/(B S) sum over images and classes y of  t_y log g_y + (1 - t_y) log(1 - g_y) ,
        t_y = q_y for old classes and [y = label] for the task's own.

    The paper writes a sum over classes; its code takes the mean over the batch and all outputs of
    a head that has those of every class to come from the start, with target 0 until it comes.
    Here the head grows, and the terms of classes unseen are absent; but S is still that number of
    outputs, ``outputs`` (or K, if more are known), for the published learning rate belongs to it:
    with the mean over the first few classes alone it is too large to train.

    ``loss="softmax"`` is PyCIL's (Zhou et al. 2023):

        L = CE(z, label) + KD(z[:, :known], previous z; T) .

    Its own readout is ``nme``, the nearest mean of exemplars (Alg. 1, Eq. 2); ``linear`` is the
    head's. A class of which memory holds no exemplar cannot be nearest: it scores -inf. Without
    any exemplar there is only ``linear``.

    ``form="online"`` is the iCaRL of Lopez-Paz and Ranzato's (2017) released code, for one pass
    over tasks that have heads of their own. With z_t the logits of task t's classes, q_t the
    previous network's softmax over them, x, y the new images of task T and X_t an exemplar of each
    class of task t, drawn anew in every step,

    .. math:: L = \mathrm{CE}(z_T(x), y) + \rho \sum_{t < T} \frac{1}{|X_t|}
        \sum_{x' \in X_t} \mathrm{KL}(q_t(x') \,\|\, \mathrm{softmax}(z_t(x'))) .

    Logits are its features: exemplars are herded by those of their task, of unit norm here, and
    ``nme`` is the nearest mean of logits among a task's classes (`fastcil.memory.task_means`).
    That code sends each X_t through the network by itself; here a step has one forward pass.

    ``form="few-shot"`` is the iCaRL of Tao et al.'s (2020, TOPIC) tables, for sessions of a few
    images of each class: with N the new images of a batch, E its exemplars, of which a
    step takes its batch size, or all there are, and z' the previous network's logits,

    .. math:: L = \frac{1}{|N|} \sum_{x \in N} \mathrm{CE}(z(x), y)
        + \mathrm{KD}(z(E)_{:, known}, z'(E); T) .

    There the linear head classifies: ``linear`` is then its first readout.

    The features of the released CIFAR network are not rectified: it has no ReLU at its end, and
    so it is here, where ``network.last_relu`` leaves it open. PyCIL's has one, and so its preset
    does (``Config.last_relu``).

    Example:
        >>> ICaRL.Config().loss, ICaRL.PRESETS["pycil"].loss
        ('sigmoid', 'softmax')
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of iCaRL; the recipe belongs to the loss.

        The default is the paper's loss with its CIFAR recipe (70 epochs, learning rate 2, divided
        by 5 after epochs 49 and 63; its weight decay of 1e-5 multiplies the sum of squares without
        the half, hence 2e-5 here). ``ICaRL.PRESETS["pycil"]`` is the softmax loss with the recipe
        that goes with it, by which most published comparisons are made; ``PRESETS["imagenet"]``
        the paper's for ImageNet. ``samc-...`` are those of Bai et al. (2023, SAMC, appendix E),
        ``fscil-...`` those of Tao et al. (2020, TOPIC); on CUB-200 the learning rate of its
        script would fall only after the last epoch.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            loss: ``sigmoid`` (paper) or ``softmax`` (PyCIL).
            outputs: S of the sigmoid loss, as long as fewer classes are known; 100 in the
                released code for CIFAR-100 and ImageNet-100.
            temperature: T of the softmax loss's and the few-shot form's distillation.
            flip_means: Whether mirrored exemplars count in the class means, as in the released
                CIFAR code; the paper and the ImageNet code do without.
            form: ``class``, the method proper; ``online`` with heads for tasks, for which
                ``loss`` and the three below it say nothing; or ``few-shot``, for which ``loss``
                and ``outputs`` don't.
            reg: Rho of the online form.
            trains: What later tasks of the few-shot form train: ``all``, or of all convolutions
                those of the ``last-block`` alone.
            normalised: Whether the head reads feature vectors of unit length, as Tao et al.'s
                (2020) does; see `fastcil.nn.LinearHead`.
            last_relu: Whether the network ends with its ReLU, where ``network.last_relu`` is None.
        """

        first: Recipe = _CIFAR
        later: Recipe = _CIFAR
        loss: Literal["sigmoid", "softmax"] = "sigmoid"
        outputs: int = 100
        temperature: float = 2.0
        flip_means: bool = True
        form: Literal["class", "online", "few-shot"] = "class"
        reg: float = 1.0
        trains: Literal["all", "last-block"] = "all"
        normalised: bool = False
        last_relu: bool = False

        def __post_init__(self) -> None:
            check_choices(self)
            check_positive("temperature", self.temperature)
            check_not_negative("outputs", self.outputs)
            check_not_negative("reg", self.reg)

    PRESETS: ClassVar[dict[str, Config]] = {
        "imagenet": Config(first=_IMAGENET, later=_IMAGENET, flip_means=False),
        "pycil": Config(
            first=PYCIL_FIRST,
            later=_PYCIL_LATER,
            loss="softmax",
            flip_means=False,
            last_relu=True,
        ),
        "samc-cifar10": Config(first=online(0.1), later=online(0.1), form="online"),
        "samc-cifar100": Config(first=online(1.0), later=online(1.0), form="online"),
        "samc-mini": Config(first=online(1.0), later=online(1.0), form="online"),
        "fscil-cifar100": Config(BASE_SESSION, session(70, drop=60), **_FEW_SHOT),
        "fscil-mini": Config(BASE_SESSION, session(100, drop=90), **_FEW_SHOT),
        "fscil-cub": Config(BASE_SESSION, session(100, lr=0.01), **_FEW_SHOT),
    }

    config: Config

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.teacher: Network | None = None
        self.outputs = TaskOutputs()
        self.draw = OneEach()
        self.nearest: NearestMean | TaskMeans = (
            TaskMeans(self.outputs) if config.form == "online" else NearestMean(config.flip_means)
        )

    @classmethod
    def published_network(cls, config: Any) -> dict[str, bool]:
        """The last ReLU as the Config has it."""
        return {"last_relu": config.last_relu}

    def begin_task(self, task: Task) -> None:
        """Keeps a copy of the network as teacher and adds the new classes to its head."""
        if task.first:
            backbone, normalised = self.context.make_backbone(), self.config.normalised
            self.network = start_network(backbone, task.total, normalised=normalised)
        else:
            self.teacher = frozen_copy(self.network)
            linear_head(self.network).grow(task.total)
        self.outputs.add(len(task.new_classes))
        self.nearest.reserve(self.network, task.total)
        if self.config.form == "online":
            self.draw.begin()

    def stages(self, task: Task) -> list[Stage]:
        """One stage on new data and exemplars."""
        recipe = self.config.first if task.first else self.config.later
        if self.config.form == "online":
            return [_OnlineStage(self, recipe, task)]
        if self.config.form == "few-shot":
            trains: Trains = "all" if task.first else self.config.trains
            return [
                Stage(
                    name="icarl",
                    method=self,
                    objective=self._few_shot,
                    streams=replay_streams(task, recipe.batch_size),
                    recipe=recipe,
                    parameters=lambda: session_parameters(self.network, trains),
                    primary=True,
                    logits=self.logits,
                )
            ]
        own = torch.zeros(task.total, dtype=torch.bool)
        own[list(task.classes)] = True
        own = own.to(linear_head(self.network).weight.device)
        return [
            Stage(
                name="icarl",
                method=self,
                objective=partial(self._sigmoid, own)
                if self.config.loss == "sigmoid"
                else self._softmax,
                streams=(Stream((task.examples, task.exemplars), recipe.batch_size),),
                recipe=recipe,
                parameters=self.network.trained_parameters,
                primary=True,
                logits=self.logits,
            )
        ]

    def _sigmoid(self, own: Tensor, batch: Batch) -> Losses:
        """Binary cross-entropies with the old network's outputs as targets (Alg. 3).

        Of the task's own classes, ``own`` [K], new images have the label as target: also of those
        that were known before and come again.
        """
        logits = self.network(batch.images)  # [B, K]
        targets = F.one_hot(batch.labels, logits.shape[1]).to(logits.dtype)  # [B, K]
        old = self._teach(batch.images)
        known = 0 if old is None else old.shape[1]
        if old is not None:
            taught = torch.cat([old.sigmoid().to(targets.dtype), targets[:, known:]], dim=1)
            targets = torch.where((batch.part == 0)[:, None] & own, targets, taught)
        terms = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        terms = terms / (len(logits) * max(logits.shape[1], self.config.outputs))
        if old is None:
            return {"classification": terms.sum()}
        return {
            "classification": terms[:, known:].sum(),
            "distillation": terms[:, :known].sum(),
        }

    def _softmax(self, batch: Batch) -> Losses:
        """Cross-entropy and distillation on the old classes' logits (PyCIL)."""
        logits = self.network(batch.images)  # [B, K]
        losses = {"classification": F.cross_entropy(logits, batch.labels)}
        old = self._teach(batch.images)
        if old is not None:
            losses["distillation"] = distillation(
                logits[:, : old.shape[1]], old, self.config.temperature
            )
        return losses

    def _few_shot(self, batch: Batch) -> Losses:
        """Cross-entropy of new images, and distillation of exemplars (Tao et al. 2020)."""
        logits, new = self.network(batch.images), batch.part == 0  # [B, K], [B]
        terms = F.cross_entropy(logits, batch.labels, reduction="none")  # [B]
        losses = {"classification": masked_mean(terms, new)}
        old = self._teach(batch.images)
        if old is not None:
            losses["distillation"] = distillation(
                logits[:, : old.shape[1]], old, self.config.temperature, ~new
            )
        return losses

    def online(self, batch: Batch) -> Losses:
        """The online form's loss on a joined batch, of which part 1 are exemplars."""
        logits = self.network(batch.images)  # [B, K]
        terms = self.outputs.cross_entropy(logits, batch.labels, reduction="none")  # [B]
        old = self._teach(batch.images)
        if old is None:
            return {"classification": terms.mean()}
        replayed = batch.part == 1
        # New images have no place among the old outputs; what stands there for them is left out.
        labels = torch.where(replayed, batch.labels, 0)
        own = self.outputs.own(labels, logits.shape[1])[:, : old.shape[1]]  # [B, known]
        taught = old.masked_fill(~own, -torch.inf).log_softmax(1)
        found = logits[:, : old.shape[1]].masked_fill(~own, -torch.inf).log_softmax(1)
        divergence = (taught.exp() * (taught - found).masked_fill(~own, 0.0)).sum(1)  # [B]
        beside = (own & replayed[:, None]).sum(0)[labels].clamp(min=1)  # exemplars of its task
        return {
            "classification": masked_mean(terms, ~replayed),
            "distillation": self.config.reg * torch.where(replayed, divergence / beside, 0.0).sum(),
        }

    def embed(self, images: Tensor) -> Tensor:
        """Features; in the online form the logits of the task's classes, 0 for the others."""
        if self.config.form != "online":
            return self.network.features(images)
        logits = self.network(images)  # [B, K]
        newest = torch.tensor([logits.shape[1] - 1], device=logits.device)
        own = self.outputs.own(newest, logits.shape[1])
        # A task that brings no class has no outputs of its own: all are looked at.
        none = self.outputs.brought[-1:].to(logits.device) == 0
        return torch.where(own | none, logits, 0.0)

    def _teach(self, images: Tensor) -> Tensor | None:
        """The previous network's logits, or None in the first task.

        Its weights are frozen; images that depend on something learned (a mask) are not.
        """
        return None if self.teacher is None else self.teacher(images)

    def end_task(self, task: Task) -> None:
        """Takes the class means of the new exemplars, and lets the teacher go."""
        self.teacher = None
        self.nearest.take(self, task)

    def retained(self) -> list[Retained]:
        """The class means: the readout's weights, made anew from the exemplars in each task."""
        return [self.nearest.retained()]

    def readouts(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """``nme``, the method's own, and ``linear``; without exemplars only ``linear``.

        In the few-shot form ``linear`` comes first.
        """
        seen = self.logits if self.config.form == "online" else self.network.features
        means = self.nearest.readouts(seen)
        if self.config.form == "few-shot":
            return {"linear": self.logits, **means}
        return {**means, "linear": self.logits}


class _OnlineStage(Stage):
    """New data, and in each step another exemplar of every old class."""

    def __init__(self, icarl: ICaRL, recipe: Recipe, task: Task) -> None:
        streams = [Stream((task.examples,), recipe.batch_size)]
        if len(task.exemplars):
            streams.append(icarl.draw.stream(task))
        super().__init__(
            name="icarl",
            method=icarl,
            objective=icarl.online,
            streams=tuple(streams),
            recipe=recipe,
            parameters=icarl.network.trained_parameters,
            primary=True,
            logits=icarl.logits,
        )
        self._draw = icarl.draw

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """One step, after which other exemplars are drawn."""
        losses = super().step(batches, stepper)
        self._draw.go_on()
        return losses
