"""WA: distillation, then the weights of new classes made as long as those of old ones."""

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
    check_positive,
)
from fastcil.memory.means import NearestMean
from fastcil.methods.recipes import PYCIL_FIRST
from fastcil.nn import Network, distillation
from fastcil.nn.heads import aligning_factor
from fastcil.nn.lifecycle import frozen_copy, linear_head, start_network

_CIFAR = Recipe(
    epochs=250,
    lr=0.1,
    schedule="step",
    milestones=(100, 150, 200),
    weight_decay=2e-4,
    batch_size=32,
)
_IMAGENET = Recipe(
    epochs=100,
    lr=0.1,
    schedule="step",
    milestones=(30, 60, 80, 90),
    weight_decay=1e-4,
    batch_size=256,
)
_PYCIL_LATER = Recipe(
    epochs=170, lr=0.1, schedule="step", milestones=(60, 100, 140), weight_decay=2e-4
)


class WA(Method):
    r"""Weight aligning (Zhao et al. 2020, "Maintaining discrimination and fairness ...").

    With z [B, K] the logits and z' those of the network as it was before the task,

    .. math:: L = (1 - \lambda)\, \mathrm{CE}(z, y) +
        \lambda\, \mathrm{KD}_T(z_{:C_o}, z'), \qquad \lambda = \frac{C_o}{C_o + C_n}

    with C_o classes known and C_n in the task, KD being `fastcil.nn.distillation`; in the first
    task cross-entropy alone. (A task of known classes, which the paper does not have, then has
    a lambda below 1 too, and its labels count.)

    When the stage is done the head's rows of the new classes are multiplied by

    .. math:: \gamma = \frac{\mathrm{mean}_{c\ \mathrm{old}} \|w_c\|_2}
        {\mathrm{mean}_{c\ \mathrm{new}} \|w_c\|_2}

    and biases are left as they are. The aligned network is the next teacher. For norms to mean
    the same as logits, the paper keeps all weights of the head from falling below 0: they are
    clamped after every step.

    With ``scale="logits"`` the head's rows stay, and the logits of the newest classes are
    multiplied by gamma wherever they are read: at test, and where the network teaches in the next
    task, which goes on training the rows as they were.

    ``linear`` is the method's own readout; ``nme`` that of `ICaRL`, while there are exemplars.

    Attributes:
        gamma: Factor of each known class's logit; ones with ``scale="weights"``.  # [K]

    Example:
        >>> WA.Config().clamp, WA.PRESETS["pycil"].later.milestones
        (True, (60, 100, 140))
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of weight aligning.

        No code of the authors is known. The default is the paper's form; its recipe for CIFAR-100,
        like that of ``PRESETS["imagenet"]``, is that of Wu et al. (2019, BiC), which the paper
        compares with, but for the batch. ``PRESETS["pycil"]`` is that of PyCIL (Zhou et al. 2023).
        The copy in the released code of DER (Yan et al. 2021) has the default's head, ``scale``
        ``logits``, and DER's recipe.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            temperature: T.
            bias: Whether the head has a bias: not in the paper; in PyCIL.
            clamp: Whether the head's weights are kept at 0 or above; likewise the other way round.
            scale: What gamma multiplies: the new rows' ``weights``, or their ``logits``.
        """

        first: Recipe = _CIFAR
        later: Recipe = _CIFAR
        temperature: float = 2.0
        bias: bool = False
        clamp: bool = True
        scale: Literal["weights", "logits"] = "weights"

        def __post_init__(self) -> None:
            check_choices(self)
            check_positive("temperature", self.temperature)

    PRESETS: ClassVar[dict[str, Config]] = {
        "imagenet": Config(first=_IMAGENET, later=_IMAGENET),
        "pycil": Config(first=PYCIL_FIRST, later=_PYCIL_LATER, bias=True, clamp=False),
    }

    config: Config
    gamma: Tensor  # [K]
    taught_gamma: Tensor  # [C_o]

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.teacher: Network | None = None
        self.register_buffer("gamma", torch.empty(0))
        self.register_buffer("taught_gamma", torch.empty(0))
        self.nearest = NearestMean()

    def begin_task(self, task: Task) -> None:
        """Keeps a copy of the network as teacher and adds the new classes to its head."""
        if task.first:
            backbone = self.context.make_backbone()
            self.network = start_network(backbone, task.total, bias=self.config.bias)
        else:
            self.teacher, self.taught_gamma = frozen_copy(self.network), self.gamma
            linear_head(self.network).grow(task.total)
        head = linear_head(self.network)
        self.gamma = head.weight.new_ones(task.total).detach()
        self.nearest.reserve(self.network, task.total)

    def stages(self, task: Task) -> list[Stage]:
        """One stage on new data and exemplars, after which the head is aligned."""
        recipe = self.config.first if task.first else self.config.later
        return [
            _ClampedStage(
                name="wa",
                method=self,
                objective=partial(self._loss, task.known / (task.known + len(task.classes))),
                streams=(Stream((task.examples, task.exemplars), recipe.batch_size),),
                recipe=recipe,
                parameters=self.network.trained_parameters,
                primary=True,
                logits=self.logits,
                finish=partial(self._align, task.known),
                after_step=self._clamp if self.config.clamp else None,
            )
        ]

    def _loss(self, share: float, batch: Batch) -> Losses:
        """Cross-entropy and distillation, of which the second has ``share`` lambda."""
        logits = self.network(batch.images)  # [B, K]
        entropy = F.cross_entropy(logits, batch.labels)
        if self.teacher is None:
            return {"classification": entropy}
        # Its weights are frozen; images that depend on something learned (a mask) are not.
        old = self.teacher(batch.images) * self.taught_gamma  # [B, C_o]
        taught = distillation(logits[:, : old.shape[1]], old, self.config.temperature)
        return {"classification": (1 - share) * entropy, "distillation": share * taught}

    @torch.no_grad()
    def _clamp(self) -> None:
        """Lifts the head's negative weights to 0."""
        linear_head(self.network).weight.clamp_(min=0)

    @torch.no_grad()
    def _align(self, known: int) -> None:
        """Makes the classes from ``known`` on as strong as those before."""
        weight = linear_head(self.network).weight
        if not 0 < known < len(weight):
            return
        gamma = aligning_factor(weight, known)
        if self.config.scale == "weights":
            weight[known:].mul_(gamma)
        else:
            self.gamma[known:] = gamma

    def end_task(self, task: Task) -> None:
        """Lets the teacher go and takes the class means of the new exemplars."""
        self.teacher, self.taught_gamma = None, self.taught_gamma.new_empty(0)
        self.nearest.take(self, task)

    def logits(self, images: Tensor) -> Tensor:
        """Scores of all known classes, aligned, [B, K]."""
        scores: Tensor = self.network(images) * self.gamma
        return scores

    def retained(self) -> list[Retained]:
        """The class means of exemplars, and gamma."""
        return [self.nearest.retained(), Retained("gamma", "network", {"gamma": self.gamma})]

    def readouts(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """``linear``, the method's own, and ``nme`` while there are exemplars."""
        return {"linear": self.logits, **self.nearest.readouts(self.network.features)}


@dataclass
class _ClampedStage(Stage):
    """A stage that does something to the weights after each step."""

    after_step: Callable[[], None] | None = None

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """One training step, and what follows it."""
        losses = super().step(batches, stepper)
        if self.after_step is not None:
            self.after_step()
        return losses
