"""EEIL: one classification layer per task, distilled each by itself; then balanced fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

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
from fastcil.nn import Network, distillation_by_layer
from fastcil.nn.lifecycle import frozen_copy, linear_head, start_network

_TRAINING = Recipe(epochs=40, lr=0.1, schedule="step", milestones=(10, 20, 30), weight_decay=1e-4)
_FINETUNING = Recipe(epochs=30, lr=0.01, schedule="step", milestones=(10, 20), weight_decay=1e-4)


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

    Attributes:
        brought: Classes that each task brought.  # [tasks]

    Example:
        >>> EEIL.Config().finetuning.lr
        0.01
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of EEIL; the default is the paper's.

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
            distillation_weight: Of the sum over layers; 1 in the paper.
            temperature: T.
            finetuning_teacher: What teaches the old layers in the fine-tuning: the ``old``
                network, by Eq. 1, or the one just ``trained``, which teaches the new layer, as in
                the released code.
        """

        first: Recipe = _TRAINING
        later: Recipe = _TRAINING
        finetuning: Recipe = _FINETUNING
        distillation_weight: float = 1.0
        temperature: float = 2.0
        finetuning_teacher: Literal["old", "trained"] = "old"

        def __post_init__(self) -> None:
            check_choices(self)
            check_not_negative("distillation_weight", self.distillation_weight)
            check_positive("temperature", self.temperature)

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
            self.network = start_network(self.context.make_backbone(), task.total)
        else:
            self.teacher = frozen_copy(self.network)
            linear_head(self.network).grow(task.total)
        brought = self.brought.new_tensor([len(task.new_classes)])
        self.brought = torch.cat([self.brought, brought])

    def stages(self, task: Task) -> list[Stage]:
        """``training`` and, where there are exemplars, ``finetuning``."""
        config = self.config
        recipe = config.first if task.first else config.later
        everything = (task.examples, task.exemplars)
        layers = self.brought.tolist()
        training = Stage(
            name="training",
            method=self,
            objective=partial(self._training, [n for n in layers[:-1] if n]),
            streams=(Stream(everything, recipe.batch_size),),
            recipe=recipe,
            parameters=self.network.trained_parameters,
            primary=True,
            logits=self.logits,
        )
        if task.first or not len(task.exemplars):
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

    def _distilled(self, logits: Tensor, taught: Tensor, layers: list[int]) -> Tensor:
        """The weighted sum of the layers' distillations (Eqs. 2, 3)."""
        loss = distillation_by_layer(logits, taught, layers, self.config.temperature)
        return self.config.distillation_weight * loss

    def _begin_finetuning(self, task: Task) -> None:
        """Keeps a copy of the network as it is now, and chooses what the stage reads."""
        self.trained = frozen_copy(self.network)
        self.balanced.choose(self, task)

    def end_task(self, task: Task) -> None:
        """Lets the teachers go, and the choice of images."""
        self.teacher = self.trained = None
        self.balanced.forget()
