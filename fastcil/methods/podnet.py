"""PODNet: several proxies for each class, and pooled maps held where they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    check_positive,
    evaluating,
)
from fastcil.memory.balance import BalancedSet
from fastcil.memory.means import NearestMean
from fastcil.nn import Network, ProxyHead, margin_nca, nca, pod_flat, pod_spatial
from fastcil.nn.clusters import cluster_centres
from fastcil.nn.lifecycle import channels, frozen_copy, trained_with_new_rows, with_head
from fastcil.nn.unit import unit_vectors

_CIFAR = Recipe(epochs=160, lr=0.1, clip_value=5.0)
_IMAGENET = Recipe(epochs=90, lr=0.05, batch_size=64, clip_value=5.0)
_FINETUNING = Recipe(epochs=20, lr=0.05, schedule="constant", clip_value=5.0)


class PODNet(Method):
    r"""Pooled outputs distillation (Douillard et al. 2020).

    The classifier is a `fastcil.nn.ProxyHead` over the features f, and, h being the maps after
    each stage of the network, and old ones those of the network before the task,

    .. math:: L = L_{NCA}(z, y) + \sqrt{C / C_n} \,
        \big( \lambda_f \, L_{flat}(f, f^{old}) + \lambda_c \, L_{spatial}(h, h^{old}) \big)

    (Secs. 3.1, 3.2; `fastcil.nn.nca`, `pod_flat`, `pod_spatial`), C being all classes known once
    the task is learned and C_n its new ones. Stage ``podnet`` trains everything but the proxies
    of old classes. Those of new classes start at the k-means centres of the class's unit-norm
    features; a class with fewer images than proxies has some of them several times, which stay
    equal. From the second task on stage ``finetune`` trains all proxies, and nothing else, on all
    exemplars and as many new images of each class, those that herding picks; without exemplars
    there is none. The scale eta stays then, and batch norms go on taking statistics, as in the
    released code. How many that is, memory says as it was before the task, as in PyCIL; the
    released code has made room for the new classes by then, and takes fewer. The features have no
    last ReLU, and batch norms that end a residual branch start at zero (``network.last_relu``,
    ``network.zero_init_residual``). In the released networks no residual block ends in a ReLU
    (CIFAR), or no stage (ImageNet), and a fourth map is compared on CIFAR, that before the last
    block: here it is three maps, and the last alone has no ReLU.

    A task that brings no new class, but new images of known ones, trains all proxies in both
    stages, and its C_n is the number of classes it has images of.

    Readouts are ``linear``, the classifier's ("CNN" in the paper), and ``nme``, the nearest mean
    of exemplars and their mirror images.

    Example:
        >>> PODNet.Config().spatial_weight, PODNet.PRESETS["imagenet"].spatial_weight
        (3.0, 8.0)
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of PODNet; the default is the released CIFAR-100 configuration.

        ``PODNet.PRESETS["imagenet"]`` is that of ImageNet-100, and ``PRESETS["pycil"]`` what PyCIL
        (Zhou et al. 2023) trains CIFAR-100 with, but that shortcuts have 1x1 convolutions there.

        Args:
            train: Recipe of the first stage, in every task.
            finetune: Recipe of the second; without epochs there is none.
            finetunes: What the second trains: all ``proxies``, or as PyCIL ``everything`` but those
                of old classes, with the distillation too.
            proxies: Proxies of each class.
            flat_weight: lambda_f: 1 for CIFAR, 10 for ImageNet.
            spatial_weight: lambda_c: 3 for CIFAR, 8 for ImageNet.
            nca: ``released``: as the code computes it, and the published figures were made, where
                the margin cancels out; ``margin``: the paper's.
            margin: delta, of the paper's form alone.
            zero_init_residual: Whether batch norms that end a residual branch start at zero; not in
                PyCIL.
        """

        train: Recipe = _CIFAR
        finetune: Recipe = _FINETUNING
        finetunes: Literal["proxies", "everything"] = "proxies"
        proxies: int = 10
        flat_weight: float = 1.0
        spatial_weight: float = 3.0
        nca: Literal["released", "margin"] = "released"
        margin: float = 0.6
        zero_init_residual: bool = True

        def __post_init__(self) -> None:
            check_choices(self)
            check_positive("proxies", self.proxies)
            for name in ("flat_weight", "spatial_weight", "margin"):
                check_not_negative(name, getattr(self, name))

    PRESETS: ClassVar[dict[str, Config]] = {
        "imagenet": Config(
            train=_IMAGENET,
            finetune=replace(_FINETUNING, lr=0.01, batch_size=64),
            flat_weight=10.0,
            spatial_weight=8.0,
        ),
        "pycil": Config(
            train=replace(_CIFAR, clip_value=0.0),
            finetune=replace(_FINETUNING, lr=0.005, schedule="cosine", clip_value=0.0),
            finetunes="everything",
            spatial_weight=5.0,
            zero_init_residual=False,
        ),
    }

    config: Config

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.teacher: Network | None = None
        self.nearest = NearestMean(flip=True)
        self.balanced = BalancedSet()

    @classmethod
    def published_network(cls, config: Any) -> dict[str, bool]:
        """Features without a last ReLU, residual branches that start as the Config has it."""
        return {"last_relu": False, "zero_init_residual": config.zero_init_residual}

    @property
    def head(self) -> ProxyHead:
        """The classifier."""
        head = self.network.head
        assert isinstance(head, ProxyHead)
        return head

    def begin_task(self, task: Task) -> None:
        """Keeps a copy of the network as teacher and adds the new classes' proxies."""
        if task.first:
            backbone = self.context.make_backbone()
            head = ProxyHead(channels(backbone), task.total, self.config.proxies)
            self.network = with_head(backbone, head)
        else:
            self.teacher = frozen_copy(self.network)
            self.head.grow(task.total)
            if task.new_classes:
                self.head.imprint(self._centres(task))
        self.nearest.reserve(self.network, task.total)

    def _centres(self, task: Task) -> Tensor:
        """k-means centres of each new class's unit-norm features, [C_n, P, D]; 0 without images."""
        seed = int(torch.randint(2**31, (), device="cpu"))
        labels = task.examples.labels
        new = (labels >= task.known).nonzero().flatten()
        with evaluating(self.network):
            features = self.context.scan(self.network.features, task.examples.select(new))
        features, labels = unit_vectors(features), labels[new].to(features.device)
        centres = torch.zeros_like(self.head.new)
        for place, label in enumerate(task.new_classes):
            mine = features[labels == label]
            if len(mine):
                centres[place] = cluster_centres(mine, self.config.proxies, seed)
        return centres

    def stages(self, task: Task) -> list[Stage]:
        """``podnet`` and, from the second task on, ``finetune``."""
        config = self.config
        everything = (task.examples, task.exemplars)
        new = len(task.new_classes) or len(task.classes)
        loss = partial(self._loss, math.sqrt(task.total / max(new, 1)))
        stages = [
            Stage(
                name="podnet",
                method=self,
                objective=loss,
                streams=(Stream(everything, config.train.batch_size),),
                recipe=config.train,
                parameters=lambda: trained_with_new_rows(self.network),
                primary=True,
                logits=self.logits,
            )
        ]
        if config.finetune.epochs and not task.first and len(task.exemplars):
            stages.append(
                Stage(
                    name="finetune",
                    method=self,
                    objective=loss if config.finetunes == "everything" else self._finetune,
                    streams=(self.balanced.stream(task, config.finetune.batch_size),),
                    recipe=config.finetune,
                    parameters=self._finetuned,
                    begin=partial(self.balanced.choose, self, task),
                )
            )
        return stages

    def _finetuned(self) -> list[nn.Parameter]:
        """What the second stage trains."""
        if self.config.finetunes == "everything":
            return list(trained_with_new_rows(self.network))
        return [self.head.old, self.head.new]

    def _finetune(self, batch: Batch) -> Losses:
        """Classification alone."""
        return self._classify(self.network(batch.images), batch)

    def _loss(self, factor: float, batch: Batch) -> Losses:
        """Classification, and what keeps maps and features where they were."""
        config = self.config
        maps = self.network.levels(batch.images)  # each [B, C, h, w]
        features = maps[-1].mean((2, 3))  # [B, D]
        losses = self._classify(self.network.head(features), batch)
        if self.teacher is not None:
            # Its weights are frozen; images that depend on something learned (a mask) are not.
            old = self.teacher.levels(batch.images)
            flat = pod_flat(features, old[-1].mean((2, 3)))
            losses["flat"] = config.flat_weight * factor * flat
            losses["spatial"] = config.spatial_weight * factor * pod_spatial(maps, old)
        return losses

    def _classify(self, logits: Tensor, batch: Batch) -> Losses:
        """The form of NCA that the config asks for."""
        if self.config.nca == "released":
            return {"classification": nca(logits, batch.labels)}
        margin = self.head.scale * self.config.margin
        return {"classification": margin_nca(logits, batch.labels, margin)}

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
