"""FOSTER: boost the features with a second extractor, then compress both into one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

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
    check_not_negative,
    check_positive,
)
from fastcil.errors import FastcilError
from fastcil.nn import (
    LinearHead,
    Network,
    alignment_weights,
    balanced_distillation,
    distillation,
)
from fastcil.nn.lifecycle import linear_head, new_head, start_network, successor

_FIRST = Recipe(epochs=200, lr=0.1)
_BOOSTING = Recipe(epochs=170, lr=0.1)
_COMPRESSION = Recipe(epochs=130, lr=0.1, weight_decay=0.0)


class Foster(Method):
    """Feature boosting and compression (Wang et al. 2022).

    The first task is plain cross-entropy. Every later one has two stages.

    ``boosting`` (Wang et al. 2022, Secs. 4.1, 4.2): the network so far is frozen, batch-norm
    statistics included, and a copy of its extractor is trained beside it, to fit what the frozen
    one leaves over. With z [B, C] the logits of the joint head over both extractors' features
    (the old block and bias are copied from the old head), a those of an auxiliary head over the
    new features alone, z_o [B, C_o] the old network's, and w [C] the alignment weights,

        L = CE(z / w, y) + CE(a, y) + lambda KD(z[:, :C_o], z_o; T) ,
        w_c proportional to (1 - beta1) / (1 - beta1^n_c), with mean 1 ,

    n_c being the number of training images of class c.

    ``compression`` (Sec. 4.3): the two-extractor network is the teacher, a student with one
    extractor, copied from the old network, learns by

        L = KD of softmax(z_teacher / T) * w(beta2), renormalised, at the student's z / T .

    Afterwards ``network`` is the student, the FOSTER of the paper, from which the next task
    starts; ``teacher`` (which the released code evaluates, herds with and plots) stays until
    ``release``, and both are read out. During boosting ``network`` is the two-extractor network.

    The weights of the old classes on the new features and of the new classes on the old ones all
    train, as in every released configuration. The released augmentation, AutoAugment (and Cutout
    on CIFAR, which the paper does not mention), is worth nine points on CIFAR-100: the method
    asks for it by ``auto_augment``.

    Example:
        >>> Foster.PRESETS["cifar-b0"].beta1_at(3)
        0.97
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of FOSTER; the default is the released ImageNet-100 one with batches of 128.

        ``Foster.PRESETS`` holds the released ``cifar-b0``, ``cifar-b50`` and ``imagenet``, and
        ``food101``, the baseline of Luo et al. (2023, CIM) there. (Their author's answer to a
        reader who could not repeat its figure is a beta1 of 0.99.)

        Args:
            first: Recipe of the first task.
            boosting: Recipe of the boosting stage.
            compression: Recipe of the compression stage, without weight decay.
            beta1: beta of the alignment weights in the second task.
            beta1_step: What is added to it in each task after that. For CIFAR-100 B0 with ten
                tasks, where it falls evenly from 0.98 to 0.94, -0.005; with n tasks, the distance
                between last and first over n - 2.
            beta2: beta of the weights in the compression stage.
            distillation_weight: lambda.
            temperature: T of both distillations.
            nominal_memory: If positive, n_c of old classes is floor(nominal_memory / C_o), as in
                the released code under a fixed total, also when compression keeps more than
                that. 0: their true mean count.
            nominal_per_class: If positive, n_c of old classes is this, as in the released code
                under a growing memory (20).
            bias: Whether heads have a bias; not in the released code of Luo et al. (2023, CIM).
        """

        first: Recipe = _FIRST
        boosting: Recipe = _BOOSTING
        compression: Recipe = _COMPRESSION
        beta1: float = 0.97
        beta1_step: float = 0.0
        beta2: float = 0.97
        distillation_weight: float = 1.0
        temperature: float = 2.0
        nominal_memory: int = 0
        nominal_per_class: int = 0
        bias: bool = True

        def __post_init__(self) -> None:
            for name in ("beta1", "beta2"):
                if not 0 < getattr(self, name) < 1:
                    raise FastcilError(
                        f"{name} is {getattr(self, name)}; it must be between 0 and 1."
                    )
            check_positive("temperature", self.temperature)
            for name in ("distillation_weight", "nominal_memory", "nominal_per_class"):
                check_not_negative(name, getattr(self, name))

        def beta1_at(self, index: int) -> float:
            """beta1 in task ``index`` (from 1), kept between 0 and 1."""
            beta = self.beta1 + self.beta1_step * (index - 1)
            return min(max(round(beta, 12), 1e-9), 1.0 - 1e-9)

    PRESETS: ClassVar[dict[str, Config]] = {
        "cifar-b0": Config(beta1=0.98, beta1_step=-0.005),
        "cifar-b50": Config(beta1=0.94),
        "imagenet": Config(
            first=replace(_FIRST, batch_size=256),
            boosting=replace(_BOOSTING, batch_size=256),
            compression=replace(_COMPRESSION, batch_size=256),
        ),
        "food101": Config(
            first=replace(_FIRST, batch_size=256),
            boosting=replace(_BOOSTING, batch_size=256),
            compression=replace(_COMPRESSION, batch_size=256),
            beta1=0.95,
        ),
    }

    config: Config
    auto_augment = True
    adds_extractors = True

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.teacher: Network | None = None
        self.old_head: LinearHead | None = None
        self.aux_head: LinearHead | None = None

    def begin_task(self, task: Task) -> None:
        """Puts a second extractor beside the student, and a joint head over both."""
        if task.first:
            backbone = self.context.make_backbone()
            self.network = start_network(backbone, task.total, bias=self.config.bias)
            return
        (old,), head = self.network.extractors, linear_head(self.network)
        new, width = successor(old), head.in_features
        self.old_head = successor(head).requires_grad_(False)
        head.grow(task.total, in_features=2 * width)
        self.network = Network([old, new], head)
        self.network.freeze(0)
        self.aux_head = new_head(new, width, task.total, bias=self.config.bias)

    def stages(self, task: Task) -> list[Stage]:
        """Plain training in the first task, then ``boosting`` and ``compression``."""
        config = self.config
        everything = (task.examples, task.exemplars)
        if task.first:
            return [
                Stage(
                    name="first",
                    method=self,
                    objective=self._plain,
                    streams=(Stream(everything, config.first.batch_size),),
                    recipe=config.first,
                    parameters=lambda: self.network.parameters(),
                    primary=True,
                    logits=self.logits,
                )
            ]
        counts = self._counts(task).to(linear_head(self.network).weight.device)
        w1 = alignment_weights(counts, config.beta1_at(task.index))
        w2 = alignment_weights(counts, config.beta2)
        return [
            Stage(
                name="boosting",
                method=self,
                objective=partial(self._boosting, w1),
                streams=(Stream(everything, config.boosting.batch_size),),
                recipe=config.boosting,
                parameters=self._boosted,
                primary=True,
                logits=self.logits,
            ),
            Stage(
                name="compression",
                method=self,
                objective=partial(self._compression, w2),
                streams=(Stream(everything, config.compression.batch_size),),
                recipe=config.compression,
                parameters=lambda: self.network.parameters(),
                begin=self._begin_compression,
            ),
        ]

    def _counts(self, task: Task) -> Tensor:
        """Training images n_c of each class, float64 [C]; the old ones' mean, or nominal."""
        counts = task.examples.labels.cpu().bincount(minlength=task.total).double()
        if self.config.nominal_per_class > 0:
            old = float(self.config.nominal_per_class)
        elif self.config.nominal_memory > 0:
            old = float(self.config.nominal_memory // task.known)
        else:
            old = len(task.exemplars) / task.known
        counts[: task.known] += old
        # A class without images would have an infinite weight.
        return counts.clamp(min=1.0)

    def _boosted(self) -> list[torch.nn.Parameter]:
        """Parameters of the new extractor and of the two heads that train."""
        modules = [self.network.extractors[-1], self.network.head, self.aux_head]
        return [p for module in modules if module is not None for p in module.parameters()]

    def _plain(self, batch: Batch) -> Losses:
        """Cross-entropy of the first task."""
        return {"classification": F.cross_entropy(self.network(batch.images), batch.labels)}

    def _boosting(self, weights: Tensor, batch: Batch) -> Losses:
        """Logits alignment, feature enhancement and distillation (Secs. 4.1, 4.2)."""
        assert self.old_head is not None and self.aux_head is not None
        features = self.network.features(batch.images)  # [B, 2 D]
        logits = self.network.head(features)  # [B, C]
        width = self.aux_head.in_features
        # The frozen extractor within `network` is the old network's: one pass serves both. Its
        # weights have no gradient; images that depend on something learned (a mask) have.
        old_logits = self.old_head(features[:, :width])  # [B, C_o]
        return {
            "classification": F.cross_entropy(logits / weights, batch.labels),
            "enhancement": F.cross_entropy(self.aux_head(features[:, width:]), batch.labels),
            "distillation": self.config.distillation_weight
            * distillation(logits[:, : old_logits.shape[1]], old_logits, self.config.temperature),
        }

    def _begin_compression(self) -> None:
        """Makes the boosted network the teacher of a student that starts from the old one."""
        assert self.old_head is not None
        teacher, head = self.network, self.old_head
        teacher.freeze(0, 1)
        head.grow(linear_head(teacher).classes)
        self.teacher = teacher
        self.network = Network([successor(teacher.extractors[0])], head)
        self.old_head = self.aux_head = None

    def _compression(self, weights: Tensor, batch: Batch) -> Losses:
        """Balanced distillation (Sec. 4.3)."""
        assert self.teacher is not None
        with torch.no_grad():
            taught = self.teacher(batch.images)  # [B, C]
        student = self.network(batch.images)  # [B, C]
        loss = balanced_distillation(student, taught, weights, self.config.temperature)
        return {"distillation": loss}

    def release(self) -> None:
        """Drops the two-extractor teacher."""
        self.teacher = None

    def localiser(self) -> Network:
        """The two-extractor network where there is one."""
        return self.network if self.teacher is None else self.teacher

    def embed(self, images: Tensor) -> Tensor:
        """Features of the two-extractor network where there is one, [B, D]."""
        return self.localiser().features(images)

    def readouts(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The student, and the teacher while it is there."""
        if self.teacher is None:
            return {"student": self.logits}
        return {"student": self.logits, "teacher": self.teacher}
