"""DER: one more feature extractor per task, then a balanced classifier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

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
    check_not_negative,
    check_positive,
)
from fastcil.errors import FastcilError
from fastcil.memory.balance import balanced_subset
from fastcil.nn import LinearHead, Network
from fastcil.nn.lifecycle import channels, linear_head, new_head, start_network, successor

_CIFAR = Recipe(epochs=170, lr=0.1, schedule="step", milestones=(100, 120), warmup=10)
_IMAGENET = Recipe(
    epochs=220,
    lr=0.1,
    schedule="step",
    milestones=(60, 120, 160, 180),
    warmup=20,
    batch_size=256,
)
_CLASSIFIER = Recipe(epochs=30, lr=0.1, schedule="step", milestones=(15,))


class DER(Method):
    """Dynamically expandable representation (Yan et al. 2021), without channel masks.

    Task t adds an extractor F_t, a copy of F_{t-1} that goes on training, while all older ones are
    frozen, batch-norm statistics included. The features are u = [F_1(x), ..., F_t(x)] (Eq. 1).

    Stage ``representation`` (Eqs. 3, 4):

        L = CE(H u, y) + lambda_a CE(H_a F_t(x), y_a) ,
        y_a = 0 for every old class and y - known + 1 for a new one;

    the auxiliary term from the second task on. The heads have no bias, are fresh in each task,
    and are drawn anew when the warm-up ends. (The paper copies the old block of H; the released
    code, which the published figures come from, does not, and the reset would undo it.)

    Stage ``classifier``, from the second task on: H is drawn anew and trained alone, the network
    in evaluation mode, on a class-balanced subset, by CE(H u / T, y). The subset holds of each
    class as many images as the smallest one has, drawn with a generator seeded by the task.

    The extractors beyond the first are `Retained` networks.

    Example:
        >>> DER.Config().temperature, DER.PRESETS["imagenet"].temperature
        (5.0, 1.0)
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of DER; the default is the released CIFAR-100 configuration.

        ``DER.PRESETS["imagenet"]`` is the ImageNet-100 one. Milestones count from the end of the
        warm-up, as in the released scheduler: 100 and 120 fall at epochs 110 and 130.

        Args:
            representation: Recipe of the first stage, in every task; at the end of its
                ``warmup`` epochs the heads are drawn anew.
            classifier: Recipe of the second stage. With ``engine.epoch_scale`` it shrinks too,
                to too few steps for a fresh head soon; a short run wants more epochs here.
            aux_weight: lambda_a (Yan et al. 2021, Eq. 4).
            temperature: T by which the second stage divides the logits: 5 for CIFAR-100, 1 for
                ImageNet-100.
        """

        representation: Recipe = _CIFAR
        classifier: Recipe = _CLASSIFIER
        aux_weight: float = 1.0
        temperature: float = 5.0

        def __post_init__(self) -> None:
            check_positive("temperature", self.temperature)
            check_not_negative("aux_weight", self.aux_weight)
            if self.classifier.epochs < 1:
                raise FastcilError(
                    f"classifier.epochs is {self.classifier.epochs}; it must be at least 1, since "
                    f"the stage starts from a fresh head."
                )

    PRESETS: ClassVar[dict[str, Config]] = {
        "imagenet": Config(
            representation=_IMAGENET,
            classifier=replace(_CLASSIFIER, batch_size=256),
            temperature=1.0,
        )
    }

    config: Config
    adds_extractors = True

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.aux_head: LinearHead | None = None

    def begin_task(self, task: Task) -> None:
        """Adds an extractor, freezes the others, and draws fresh heads."""
        if task.first:
            self.network = start_network(self.context.make_backbone(), task.total, bias=False)
            return
        old = list(self.network.extractors)
        new = successor(old[-1])
        head = new_head(new, sum(map(channels, [*old, new])), task.total, bias=False)
        self.network = Network([*old, new], head)
        self.network.freeze(*range(len(old)))
        self.aux_head = new_head(new, channels(new), len(task.new_classes) + 1, bias=False)

    def stages(self, task: Task) -> list[Stage]:
        """``representation`` and, from the second task on, ``classifier``."""
        everything = (task.examples, task.exemplars)
        recipe = self.config.representation
        stages = [
            Stage(
                name="representation",
                method=self,
                objective=partial(self._representation, task.known),
                streams=(Stream(everything, recipe.batch_size),),
                recipe=recipe,
                parameters=self._trained,
                primary=True,
                logits=self.logits,
                before_epoch=[self._end_warmup],
            )
        ]
        if task.first:
            return stages
        labels = torch.cat([part.labels.cpu() for part in everything])
        recipe = self.config.classifier
        stages.append(
            Stage(
                name="classifier",
                method=self,
                objective=self._classifier,
                streams=(
                    Stream(everything, recipe.batch_size, balanced_subset(labels, task.index)),
                ),
                recipe=recipe,
                parameters=lambda: self.network.head.parameters(),
                begin=self._begin_classifier,
            )
        )
        return stages

    def _trained(self) -> list[torch.nn.Parameter]:
        """Parameters of the newest extractor and of the heads."""
        modules = [self.network.extractors[-1], self.network.head, self.aux_head]
        return [p for module in modules if module is not None for p in module.parameters()]

    def _representation(self, known: int, batch: Batch) -> Losses:
        """Cross-entropy over all classes and the auxiliary one (Eqs. 3, 4)."""
        features = self.network.features(batch.images)  # [B, D]
        losses = {"classification": F.cross_entropy(self.network.head(features), batch.labels)}
        if self.aux_head is not None:
            newest = features[:, -self.aux_head.in_features :]
            labels = (batch.labels - known + 1).clamp(min=0)
            losses["auxiliary"] = self.config.aux_weight * F.cross_entropy(
                self.aux_head(newest), labels
            )
        return losses

    def _classifier(self, batch: Batch) -> Losses:
        """Cross-entropy of the logits divided by the temperature."""
        logits = self.network(batch.images) / self.config.temperature
        return {"classification": F.cross_entropy(logits, batch.labels)}

    def _end_warmup(self, epoch: int) -> None:
        """Draws the heads anew in the first epoch after the warm-up."""
        if epoch and epoch == self.config.representation.warmup:
            redraw(linear_head(self.network))
            if self.aux_head is not None:
                redraw(self.aux_head)

    def _begin_classifier(self) -> None:
        """Freezes every extractor and draws the head anew."""
        self.network.freeze(*range(len(self.network.extractors)))
        redraw(linear_head(self.network))
        self.aux_head = None

    def retained(self) -> list[Retained]:
        """Every extractor but the first."""
        return [
            Retained(f"extractor {i}", "network", dict(extractor.state_dict()))
            for i, extractor in enumerate(self.network.extractors)
            if i
        ]


def redraw(head: LinearHead) -> None:
    """Gives a head fresh weights, in place: optimisers keep hold of its parameters."""
    fresh = LinearHead(head.in_features, head.classes, bias=head.bias is not None)
    head.load_state_dict(fresh.state_dict())
