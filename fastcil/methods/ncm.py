"""NCM as few-shot tables have it: features of exemplars are held by their direction."""

from __future__ import annotations

from dataclasses import dataclass
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
    Stage,
    Task,
    check_choices,
    check_not_negative,
)
from fastcil.memory.replay import replay_streams
from fastcil.methods.recipes import BASE_SESSION, session
from fastcil.nn import Network, masked_mean
from fastcil.nn.lifecycle import frozen_copy, linear_head, start_network
from fastcil.nn.sessions import Trains, scores_keeping, session_parameters
from fastcil.nn.unit import unit_vectors

_CIFAR = session(70, drop=60)


class NCM(Method):
    r"""The "NCM" of the tables of few-shot class-incremental learning (Tao et al. 2020, TOPIC).

    There it stands for Hou et al. (2019, see `lucir`), cut down in the authors' code to

    .. math:: L = \frac{1}{|N|} \sum_{x \in N} \mathrm{CE}(z(x), y)
        + w \, \frac{1}{|E|} \sum_{x \in E} (1 - \cos(f(x), f^*(x)))

    with N the new images of a batch, E its exemplars, and :math:`f^*` the features of the network
    before the task. No nearest mean classifies: the readout is the linear head's.

    Example:
        >>> NCM.PRESETS["fscil-cifar100"].weight, NCM.PRESETS["fscil-cub"].weight
        (50.0, 1.0)
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of NCM; the default is the released CIFAR-100 configuration's.

        The ``fscil-...`` ones are for the three data sets of Tao et al. (2020). On CUB-200 their
        script's learning rate falls only after its last epoch, on mini-ImageNet never.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task; each step takes its batch size of
                exemplars too, or all there are.
            weight: w.
            trains: What later tasks train: ``all``, or of all convolutions those of the
                ``last-block`` alone.
            old_rows: Whether the loss's gradient reaches the classifier's rows of old classes:
                ``kept`` out of it, or ``trained``.
            normalised: Whether the head reads feature vectors of unit length; see
                `fastcil.nn.LinearHead`.
        """

        first: Recipe = BASE_SESSION
        later: Recipe = _CIFAR
        weight: float = 50.0
        trains: Literal["all", "last-block"] = "last-block"
        old_rows: Literal["kept", "trained"] = "kept"
        normalised: bool = False

        def __post_init__(self) -> None:
            check_choices(self)
            check_not_negative("weight", self.weight)

    PRESETS: ClassVar[dict[str, Config]] = {
        "fscil-cifar100": Config(normalised=True),
        "fscil-mini": Config(later=session(100), weight=1.0, normalised=True),
        "fscil-cub": Config(later=session(100, lr=0.01), weight=1.0, normalised=True),
    }

    config: Config

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.teacher: Network | None = None

    def begin_task(self, task: Task) -> None:
        """Keeps a copy of the network as teacher and adds the new classes to its head."""
        if task.first:
            backbone, normalised = self.context.make_backbone(), self.config.normalised
            self.network = start_network(backbone, task.total, normalised=normalised)
        else:
            self.teacher = frozen_copy(self.network)
            linear_head(self.network).grow(task.total)

    def stages(self, task: Task) -> list[Stage]:
        """One stage on new data and exemplars."""
        config = self.config
        recipe = config.first if task.first else config.later
        trains: Trains = "all" if task.first else config.trains
        keeps = config.old_rows == "kept" and bool(task.new_classes)
        return [
            Stage(
                name="ncm",
                method=self,
                objective=partial(self._loss, task.known if keeps else 0),
                streams=replay_streams(task, recipe.batch_size),
                recipe=recipe,
                parameters=lambda: session_parameters(self.network, trains),
                primary=True,
                logits=self.logits,
            )
        ]

    def _loss(self, kept: int, batch: Batch) -> Losses:
        """Cross-entropy of new images, and how far exemplars have turned."""
        features = self.network.features(batch.images)  # [B, D]
        logits = scores_keeping(linear_head(self.network), features, kept)
        new = batch.part == 0
        terms = F.cross_entropy(logits, batch.labels, reduction="none")
        losses = {"classification": masked_mean(terms, new)}
        if self.teacher is not None:
            # Its weights are frozen; images that depend on something learned (a mask) are not.
            turned = self._turned(features, self.teacher.features(batch.images))
            losses["distillation"] = self.config.weight * masked_mean(turned, ~new)
        return losses

    @staticmethod
    def _turned(features: Tensor, old: Tensor) -> Tensor:
        """1 - cos of each vector's angle, [B]."""
        return 1 - (unit_vectors(features) * unit_vectors(old)).sum(1)

    def end_task(self, task: Task) -> None:
        """Lets the teacher go."""
        self.teacher = None
