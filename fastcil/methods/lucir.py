"""LUCIR: a cosine classifier, features held by their direction, and a margin to new classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

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
    Stream,
    Task,
    check_choices,
    check_not_negative,
    check_positive,
    evaluating,
)
from fastcil.errors import FastcilError
from fastcil.memory.balance import BalancedSet
from fastcil.memory.means import NearestMean
from fastcil.nn import CosineHead, Network, distillation, masked_mean, scale_convolutions
from fastcil.nn.lifecycle import channels, frozen_copy, trained_with_new_rows, with_head
from fastcil.nn.nearest_mean import class_means
from fastcil.nn.unit import unit_vectors

_CIFAR = Recipe(epochs=160, lr=0.1, schedule="step", milestones=(80, 120))
_IMAGENET = Recipe(epochs=90, lr=0.1, schedule="step", milestones=(30, 60), weight_decay=1e-4)
_FINETUNING = Recipe(epochs=20, lr=0.01, schedule="step", milestones=(10,))


class LUCIR(Method):
    r"""Learning a unified classifier incrementally via rebalancing (Hou et al. 2019).

    The classifier is a `fastcil.nn.CosineHead` (Eq. 4): with unit features :math:`\bar f` and unit
    rows :math:`\bar w`, logits are :math:`\sigma \langle \bar w_k, \bar f \rangle`. From the second
    task on, :math:`f^*` being the features of the network before the task,

    .. math:: L = \mathrm{CE} + \lambda \, E[1 - \langle \bar f^*, \bar f \rangle]
        + w \, E_{old}\Big[\tfrac1K \sum_{k \in top_K}
        \max(0, \; m - \langle \bar w_y, \bar f \rangle + \langle \bar w_k, \bar f \rangle)\Big],
        \qquad \lambda = \lambda_{base} \sqrt{C_o / C_n}

    (Eqs. 1, 6 to 9). The last mean is over the batch's images of old classes, :math:`top_K` are the
    K new classes that score highest on an image. As in the released code it is the mean over K,
    where Eq. 8 has the sum (``ranking_weight`` times K then), and lambda grows with the number of
    old classes. Rows of old classes stay as they are, sigma goes on from task to task, and the rows
    of new classes start imprinted, which the paper leaves unsaid.

    A task that brings no new class, but new images of known ones, trains all rows; nothing is
    ranked, and :math:`C_n` is the number of classes it has images of.

    Readouts are ``linear``, the classifier's, and ``nme``, the nearest mean of exemplars.

    Example:
        >>> LUCIR.Config().lambda_base, LUCIR.PRESETS["imagenet"].lambda_base
        (5.0, 10.0)
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of LUCIR; the default is the released CIFAR-100 configuration.

        There, shortcuts of the ResNet-32 have 1x1 convolutions, where ours are padded with zeros,
        and brightness does not change (``augment.brightness=0``).

        ``LUCIR.PRESETS["imagenet"]`` is that of ImageNet-100, ``PRESETS["imagenet-1000"]`` the
        same with class-balanced finetuning, and ``PRESETS["mnemonics"]`` what the released code of
        Mnemonics (Liu et al. 2020) trains CIFAR-100 with: distillation of logits, no ranking, and
        a network with weight transfer.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            distillation: What is held of the old network: ``features`` (Eq. 6), or its ``logits``
                by T^2 beta KD(z[:, :known], z*; T), the form that the paper compares with.
            lambda_base: Weight of the features' distillation (Eq. 7): 5 for CIFAR, 10 for ImageNet.
            logits_weight: beta of the logits' distillation.
            temperature: T of the logits' distillation.
            ranking_weight: w, of the margin ranking loss; 0 leaves it out.
            margin: m (Eq. 8).
            hardest: K, the new classes that an image of an old one is ranked with; all, if a task
                brings fewer.
            transfer: Whether, from the second task on, convolutions train by their scales alone
                (`fastcil.nn.scale_convolutions`), the weight transfer of Mnemonics' network, with
                which Luo et al. 2023 (CIM, Table 4) compare.
            finetune: Whether all rows of the classifier, and nothing else, are trained some more on
                as many images of each class, in every later task that has exemplars; in the
                released code only for ImageNet-1000. Its new images are those herding picks.
            finetuning: Recipe of that.
            flip_means: Whether mirrored exemplars count in the means of ``nme``, as in the
                released CIFAR code.
        """

        first: Recipe = _CIFAR
        later: Recipe = _CIFAR
        distillation: Literal["features", "logits"] = "features"
        lambda_base: float = 5.0
        logits_weight: float = 0.25
        temperature: float = 2.0
        ranking_weight: float = 1.0
        margin: float = 0.5
        hardest: int = 2
        transfer: bool = False
        finetune: bool = False
        finetuning: Recipe = _FINETUNING
        flip_means: bool = True

        def __post_init__(self) -> None:
            check_choices(self)
            check_positive("temperature", self.temperature)
            for name in ("lambda_base", "logits_weight", "ranking_weight", "margin"):
                check_not_negative(name, getattr(self, name))
            if self.hardest < 1:
                raise FastcilError(f"hardest is {self.hardest}; it must be at least 1.")

    PRESETS: ClassVar[dict[str, Config]] = {
        "imagenet": Config(_IMAGENET, _IMAGENET, lambda_base=10.0, flip_means=False),
        "imagenet-1000": Config(
            _IMAGENET,
            _IMAGENET,
            lambda_base=10.0,
            finetune=True,
            finetuning=replace(_FINETUNING, weight_decay=1e-4),
            flip_means=False,
        ),
        "mnemonics": Config(distillation="logits", ranking_weight=0.0, transfer=True),
    }

    config: Config

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.teacher: Network | None = None
        self.nearest = NearestMean(config.flip_means)
        self.balanced = BalancedSet()

    @classmethod
    def published_network(cls, config: Any) -> dict[str, bool]:
        """Features without a last ReLU."""
        return {"last_relu": False}

    @property
    def head(self) -> CosineHead:
        """The classifier."""
        head = self.network.head
        assert isinstance(head, CosineHead)
        return head

    def begin_task(self, task: Task) -> None:
        """Keeps a copy of the network as teacher and imprints the new classes in its head."""
        if task.first:
            backbone = self.context.make_backbone()
            self.network = with_head(backbone, CosineHead(channels(backbone), task.total))
        else:
            self.teacher = frozen_copy(self.network)
            if self.config.transfer:
                scale_convolutions(self.network)
            self.head.grow(task.total)
            if task.new_classes:
                self.head.imprint(self._new_means(task))
        self.nearest.reserve(self.network, task.total)

    def _new_means(self, task: Task) -> Tensor:
        """Unit-norm mean of the unit-norm features of each new class, [C_n, D]."""
        new = (task.examples.labels >= task.known).nonzero().flatten()
        examples = task.examples.select(new)
        with evaluating(self.network):
            features = self.context.scan(self.network.features, examples)
        return class_means(features, examples.labels - task.known, len(task.new_classes))

    def stages(self, task: Task) -> list[Stage]:
        """One stage on new data and exemplars, and the classifier's finetuning if wanted."""
        config = self.config
        recipe = config.first if task.first else config.later
        everything = (task.examples, task.exemplars)
        new = len(task.new_classes) or len(task.classes)
        objective = partial(self._loss, config.lambda_base * math.sqrt(task.known / max(new, 1)))
        stages = [
            Stage(
                name="lucir",
                method=self,
                objective=objective,
                streams=(Stream(everything, recipe.batch_size),),
                recipe=recipe,
                parameters=lambda: trained_with_new_rows(self.network),
                primary=True,
                logits=self.logits,
            )
        ]
        if config.finetune and not task.first and len(task.exemplars):
            recipe = config.finetuning
            stages.append(
                Stage(
                    name="finetuning",
                    method=self,
                    objective=objective,
                    streams=(self.balanced.stream(task, recipe.batch_size),),
                    recipe=recipe,
                    parameters=lambda: [self.head.old, self.head.new],
                    begin=partial(self._begin_finetuning, task),
                    finish=lambda: self.network.thaw(0),
                )
            )
        return stages

    def _loss(self, lam: float, batch: Batch) -> Losses:
        """Cross-entropy, distillation and, for images of old classes, ranking (Eq. 9)."""
        config, head = self.config, self.head
        features = self.network.features(batch.images)  # [B, D]
        cosines = head.cosines(features)  # [B, K]
        logits = head.sigma * cosines
        losses = {"classification": F.cross_entropy(logits, batch.labels)}
        if self.teacher is None:
            return losses
        # The teacher's weights are frozen; images that depend on something learned are not.
        if config.distillation == "features":
            old = self.teacher.features(batch.images)  # [B, D]
            cosine = (unit_vectors(features) * unit_vectors(old)).sum(1)  # [B]
            losses["distillation"] = lam * (1 - cosine).mean()
        else:
            old = self.teacher(batch.images)  # [B, known]
            weight = config.logits_weight * config.temperature**2
            losses["distillation"] = weight * distillation(
                logits[:, : old.shape[1]], old, config.temperature
            )
        if len(head.new) and config.ranking_weight:
            losses["ranking"] = config.ranking_weight * self._ranking(cosines, batch.labels)
        return losses

    def _ranking(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """How far old classes are from leading the hardest new ones by the margin (Eq. 8)."""
        known = len(self.head.old)
        hardest = min(self.config.hardest, len(self.head.new))
        rivals = cosines[:, known:].topk(hardest, dim=1).values  # [B, hardest]
        lead = cosines.gather(1, labels[:, None]) - rivals
        return masked_mean((self.config.margin - lead).relu().mean(1), labels < known)

    def _begin_finetuning(self, task: Task) -> None:
        """Freezes the extractor, batch norms included, and chooses a balanced set."""
        self.network.freeze(0)
        self.balanced.choose(self, task)

    def end_task(self, task: Task) -> None:
        """Takes the class means of the new exemplars, and lets the teacher go."""
        self.teacher = None
        self.balanced.forget()
        self.nearest.take(self, task)

    def retained(self) -> list[Retained]:
        """The class means: the readout's weights, made anew from the exemplars in each task."""
        return [self.nearest.retained()]

    def readouts(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """``linear`` and, where there are exemplars, ``nme``."""
        return {"linear": self.logits, **self.nearest.readouts(self.network.features)}
