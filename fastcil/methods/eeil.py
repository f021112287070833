"""EEIL: one classification layer per task, distilled each by itself; then balanced fine-tuning."""

from __future__ import annotations

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
    Stage,
    Stream,
    Task,
    check_choices,
    check_not_negative,
    check_positive,
)
from fastcil.memory.balance import BalancedSet
from fastcil.memory.replay import replay_streams
from fastcil.methods.recipes import BASE_SESSION, session
from fastcil.nn import Network, distillation_by_layer, masked_mean
from fastcil.nn.lifecycle import frozen_copy, linear_head, start_network
from fastcil.nn.sessions import Trains, session_parameters

_TRAINING = Recipe(epochs=40, lr=0.1, schedule="step", milestones=(10, 20, 30), weight_decay=1e-4)
_FINETUNING = Recipe(epochs=30, lr=0.01, schedule="step", milestones=(10, 20), weight_decay=1e-4)
_FEW_SHOT: Any = {"form": "few-shot", "trains": "last-block", "normalised": True}


class EEIL(Method):
    r"""End-to-end incremental learning (Castro et al. 2018).

    The classes that a task brings are a classification layer. With z_f the logits of layer f and
    z'_f those of the network as it was before the task, the cross-distilled loss is

    .. math:: L = \mathrm{CE}(z, y) + \sum_{f=1}^{F} L_{D_f}, \qquad
        L_{D_f} = -\frac{1}{B} \sum_i \sum_{c \in f}
        \mathrm{softmax}(z'_f / T)_{ic} \log \mathrm{softmax}(z_f / T)_{ic}

    (Eqs. 1-3), CE being over all classes and the sum over the layers that were there before.

    Stage ``training``: new images and exemplars, as many as there are (Sec. 3.3).

    Stage ``finetuning``, from the second task on: all exemplars and, of each class of the task, as
    many new images, which herding picks with the network just trained (`herded_subset`; Sec. 3.3).
    The new layer is distilled too, from the network as it was when the stage began: that target
    is there for this stage only. Without exemplars there is nothing to balance, and no such stage.

    ``form="few-shot"`` is the EEIL of Tao et al.'s (2020, TOPIC) tables, for sessions of a few
    images of each class: with N the new images of a batch, E its exemplars, of which a
    step takes its batch size, or all there are, and weights a and b,

    .. math:: L = \mathrm{CE}(z(N), y) + a \, \mathrm{CE}(z(E), y) + b \sum_f L_{D_f}(E) ,

    each term a mean, and no fine-tuning.

    Attributes:
        brought: Classes that each task brought.  # [tasks]

    Example:
        >>> EEIL.Config().finetuning.lr
        0.01
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of EEIL; the default is the paper's, the ``fscil-...`` presets Tao et al.'s.

        Its epochs are longer: the paper writes out twelve versions of every image beforehand
        (brightness, contrast, crops and their mirror images), so that one of its epochs is twelve
        of these, which draw a version anew each time; ``engine.epoch_scale=12`` makes them as
        long. Its random noise on the gradients is left out.

        FACIL (Masana et al. 2022) differs: it lowers the rate by a validation loss, draws the
        new images of the fine-tuning at random, distils by binary cross-entropy and never the
        new layer; its distillation has a weight.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task's training.
            finetuning: Recipe of the balanced fine-tuning.
            distillation_weight: Of the sum over layers (b); 1 in the paper.
            temperature: T.
            finetuning_teacher: What teaches the old layers in the fine-tuning: the ``old``
                network, by Eq. 1, or the one just ``trained``, which teaches the new layer, as in
                the released code.
            form: ``class``, the method proper, or ``few-shot``, which has no fine-tuning.
            exemplar_weight: Of the exemplars' cross-entropy in the few-shot form (a).
            trains: What later tasks of the few-shot form train: ``all``, or of all convolutions
                those of the ``last-block`` alone.
            normalised: Whether the head reads feature vectors of unit length, as Tao et al.'s
                (2020) does; see `fastcil.nn.LinearHead`.
        """

        first: Recipe = _TRAINING
        later: Recipe = _TRAINING
        finetuning: Recipe = _FINETUNING
        distillation_weight: float = 1.0
        temperature: float = 2.0
        finetuning_teacher: Literal["old", "trained"] = "old"
        form: Literal["class", "few-shot"] = "class"
        exemplar_weight: float = 0.004
        trains: Literal["all", "last-block"] = "all"
        normalised: bool = False

        def __post_init__(self) -> None:
            check_choices(self)
            check_not_negative("distillation_weight", self.distillation_weight)
            check_not_negative("exemplar_weight", self.exemplar_weight)
            check_positive("temperature", self.temperature)

    PRESETS: ClassVar[dict[str, Config]] = {
        "fscil-cifar100": Config(BASE_SESSION, session(70, drop=60), **_FEW_SHOT),
        "fscil-mini": Config(
            BASE_SESSION, session(100, drop=90), exemplar_weight=0.01, **_FEW_SHOT
        ),
        "fscil-cub": Config(
            BASE_SESSION, session(100, 0.01, batch_size=64), distillation_weight=0.8, **_FEW_SHOT
        ),
    }

    config: Config
    brought: Tensor  # [tasks]

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.teacher: Network | None = None
        self.trained: Network | None = None
        self.balanced = BalancedSet()
        self.register_buffer("brought", torch.empty(0, dtype=torch.int64))

    def begin_task(self, task: Task) -> None:
        """Keeps a copy of the network as teacher and adds a layer."""
        if task.first:
            backbone, normalised = self.context.make_backbone(), self.config.normalised
            self.network = start_network(backbone, task.total, normalised=normalised)
        else:
            self.teacher = frozen_copy(self.network)
            linear_head(self.network).grow(task.total)
        brought = self.brought.new_tensor([len(task.new_classes)])
        self.brought = torch.cat([self.brought, brought])

    def stages(self, task: Task) -> list[Stage]:
        """``training`` and, where there are exemplars, ``finetuning``."""
        config, few = self.config, self.config.form == "few-shot"
        recipe = config.first if task.first else config.later
        trains: Trains = config.trains if few and not task.first else "all"
        everything = Stream((task.examples, task.exemplars), recipe.batch_size)
        layers = self.brought.tolist()
        objective = self._few_shot if few else self._training
        training = Stage(
            name="training",
            method=self,
            objective=partial(objective, [n for n in layers[:-1] if n]),
            streams=replay_streams(task, recipe.batch_size) if few else (everything,),
            recipe=recipe,
            parameters=lambda: session_parameters(self.network, trains),
            primary=True,
            logits=self.logits,
        )
        if few or task.first or not len(task.exemplars):
            return [training]
        tune = config.finetuning
        return [
            training,
            Stage(
                name="finetuning",
                method=self,
                objective=partial(self._finetuning, task.known, [n for n in layers if n]),
                streams=(self.balanced.stream(task, tune.batch_size),),
                recipe=tune,
                parameters=self.network.trained_parameters,
                begin=partial(self._begin_finetuning, task),
            ),
        ]

    def _training(self, layers: list[int], batch: Batch) -> Losses:
        """Cross-entropy over all classes, and the old layers' distillation (Eq. 1)."""
        logits = self.network(batch.images)  # [B, K]
        losses = {"classification": F.cross_entropy(logits, batch.labels)}
        if self.teacher is not None:
            # Its weights are frozen; images that depend on something learned (a mask) are not.
            old = self.teacher(batch.images)  # [B, C_o]
            losses["distillation"] = self._distilled(logits[:, : old.shape[1]], old, layers)
        return losses

    def _few_shot(self, layers: list[int], batch: Batch) -> Losses:
        """The cross-entropies of new images and exemplars, and these's distillation."""
        logits, new = self.network(batch.images), batch.part == 0  # [B, K], [B]
        terms = F.cross_entropy(logits, batch.labels, reduction="none")  # [B]
        losses = {"classification": masked_mean(terms, new)}
        if self.teacher is not None:
            old = self.teacher(batch.images)  # [B, C_o]
            losses["exemplars"] = self.config.exemplar_weight * masked_mean(terms, ~new)
            found = logits[:, : old.shape[1]]
            losses["distillation"] = self._distilled(found, old, layers, ~new)
        return losses

    def _finetuning(self, known: int, layers: list[int], batch: Batch) -> Losses:
        """The same, with a distillation of the new layer."""
        assert self.teacher is not None and self.trained is not None
        logits = self.network(batch.images)  # [B, K]
        taught = self.trained(batch.images)  # [B, K]
        if self.config.finetuning_teacher == "old":
            taught = torch.cat([self.teacher(batch.images), taught[:, known:]], dim=1)
        return {
            "classification": F.cross_entropy(logits, batch.labels),
            "distillation": self._distilled(logits, taught, layers),
        }

    def _distilled(
        self, logits: Tensor, taught: Tensor, layers: list[int], rows: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of the layers' distillations (Eqs. 2, 3)."""
        loss = distillation_by_layer(logits, taught, layers, self.config.temperature, rows)
        return self.config.distillation_weight * loss

    def _begin_finetuning(self, task: Task) -> None:
        """Keeps a copy of the network as it is now, and chooses what the stage reads."""
        self.trained = frozen_copy(self.network)
        self.balanced.choose(self, task)

    def end_task(self, task: Task) -> None:
        """Lets the teachers go, and the choice of images."""
        self.teacher = self.trained = None
        self.balanced.forget()
