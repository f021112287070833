"""Learning without forgetting: distillation on the new data, without any exemplar."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

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
    evaluating,
)
from fastcil.methods.recipes import FINETUNING, PYCIL_FIRST, online
from fastcil.nn import (
    Network,
    TaskOutputs,
    cross_entropy_among,
    distillation_by_layer,
    outputs_of,
)
from fastcil.nn.lifecycle import frozen_copy, linear_head, start_network

_LATER = Recipe(
    epochs=250, lr=0.1, schedule="step", milestones=(60, 120, 180, 220), weight_decay=2e-4
)
_WARMUP = Recipe(epochs=20, lr=0.1, schedule="constant", weight_decay=0.0)
_CIFAR10 = Recipe(epochs=50, lr=0.01, schedule="constant", momentum=0.0, batch_size=32)
_MNIST = replace(_CIFAR10, epochs=1, lr=0.03, batch_size=10)
_TINY = replace(_CIFAR10, epochs=100)


def _no_warmup() -> Recipe:
    """No warm-up."""
    return replace(_WARMUP, epochs=0)


def _warm(recipe: Recipe) -> Recipe:
    """A warm-up as long as the training itself, without weight decay."""
    return replace(recipe, weight_decay=0.0)


class LwF(Method):
    r"""Learning without forgetting (Li and Hoiem 2016).

    On the new data alone, with z the logits and z' those of the network as it was before the task,

    .. math:: L = \mathrm{CE}(z, y) + \alpha \sum_h \mathrm{KD}_T(z_h, z'_h), \qquad
        \mathrm{KD}_T(z, z') = -\sum_c \mathrm{softmax}(z'/T)_c \log \mathrm{softmax}(z/T)_c

    batch means. With ``head="all"`` there is one h, all classes known before the task, and CE is
    over all known ones: one head for class-incremental use, as in Buzzega et al.'s released code.
    With ``head="task"`` every task has a head of its own, as in the paper: CE is over the classes
    in the task, and h runs over the classes that each earlier task brought. A task without new
    classes is distilled on all of them.

    Before a task's main stage its new outputs are trained alone, everything else frozen (the
    paper's warm-up). Nothing is kept between tasks but the network.

    Example:
        >>> LwF.Config().temperature, LwF.PRESETS["mnist"].alpha
        (2.0, 1.0)
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of learning without forgetting.

        The default recipes and alpha are PyCIL's (Zhou et al. 2023), the temperature the paper's,
        whose warm-up goes on until it converges: its length is ours. ``PRESETS`` are those of
        Buzzega et al.'s released code for Seq-CIFAR-10, Seq-Tiny-ImageNet and Seq-MNIST, which
        warms up for as long as it trains, and records the old logits. The ``samc-...`` ones follow
        the protocol of Bai et al. (2023, SAMC), who don't tell LwF's settings: these are ours,
        with their EWC's learning rates, a weight of 1 and no warm-up.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            warmup: Recipe of the new outputs' warm-up, on frozen features; 0 epochs for none.
                Weight decay would shrink the old outputs meanwhile.
            alpha: Weight of the distillation.
            temperature: T.
            head: ``all`` known classes share one softmax, or each ``task`` has its own.
            teacher: ``augmented``: the old network looks at the augmented batch. ``recorded``: its
                logits are taken once, of the unaugmented images, before the task.
        """

        first: Recipe = PYCIL_FIRST
        later: Recipe = _LATER
        warmup: Recipe = _WARMUP
        alpha: float = 3.0
        temperature: float = 2.0
        head: Literal["all", "task"] = "all"
        teacher: Literal["augmented", "recorded"] = "augmented"

        def __post_init__(self) -> None:
            check_not_negative("alpha", self.alpha)
            check_positive("temperature", self.temperature)
            check_choices(self)

    PRESETS: ClassVar[dict[str, Config]] = {
        "finetuning": Config(FINETUNING, FINETUNING, _no_warmup(), alpha=1.0),
        "finetuning-task": Config(FINETUNING, FINETUNING, _no_warmup(), alpha=1.0, head="task"),
        "cifar10": Config(_CIFAR10, _CIFAR10, _warm(_CIFAR10), teacher="recorded"),
        "tiny-imagenet": Config(_TINY, _TINY, _warm(_TINY), alpha=1.0, teacher="recorded"),
        "mnist": Config(_MNIST, _MNIST, _warm(_MNIST), alpha=1.0, teacher="recorded"),
        "samc-cifar10": Config(online(0.1), online(0.1), _no_warmup(), alpha=1.0, head="task"),
        "samc-cifar100": Config(online(1.0), online(1.0), _no_warmup(), alpha=1.0, head="task"),
        "samc-mini": Config(online(1.0), online(1.0), _no_warmup(), alpha=1.0, head="task"),
    }

    config: Config
    keeps = "nothing"
    recorded: Tensor  # [N, K]

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.teacher: Network | None = None
        self.register_buffer("recorded", torch.empty(0, 0))
        self.outputs = TaskOutputs()

    def begin_task(self, task: Task) -> None:
        """Keeps what the old network says and adds the new classes to its head."""
        if task.first:
            self.network = start_network(self.context.make_backbone(), task.total)
        else:
            teacher = frozen_copy(self.network)
            if self.config.teacher == "recorded":
                with evaluating(teacher):
                    self.recorded = self.context.scan(teacher, task.examples)
            else:
                self.teacher = teacher
            linear_head(self.network).grow(task.total)
        self.outputs.add(len(task.new_classes))

    def stages(self, task: Task) -> list[Stage]:
        """``warmup`` of the new outputs, then ``lwf``."""
        config = self.config
        recipe = config.first if task.first else config.later
        # A new class alone has no other that it could be told apart from.
        warm = config.warmup.epochs > 0 and len(task.new_classes) > 1 and not task.first
        heads = self.outputs.brought.tolist()
        main = Stage(
            name="lwf",
            method=self,
            objective=partial(
                self._loss,
                self._mask(task.classes, task.total) if config.head == "task" else None,
                # The last task's outputs are new; where it brought none, all are old.
                [n for n in heads[:-1] if n] if config.head == "task" else [task.known],
            ),
            streams=(Stream((task.examples,), recipe.batch_size),),
            recipe=recipe,
            parameters=self.network.trained_parameters,
            primary=True,
            logits=self.logits,
            begin=(lambda: self.network.thaw(0)) if warm else None,
        )
        if not warm:
            return [main]
        new = self._mask(task.new_classes, task.total)
        images = torch.isin(task.examples.labels.cpu(), torch.tensor(task.new_classes)).nonzero()
        return [
            Stage(
                name="warmup",
                method=self,
                objective=partial(self._warmup, new),
                streams=(
                    Stream((task.examples,), config.warmup.batch_size, subset=images.flatten()),
                ),
                recipe=config.warmup,
                parameters=lambda: self.network.head.parameters(),
                begin=lambda: self.network.freeze(0),
            ),
            main,
        ]

    def _mask(self, classes: tuple[int, ...], known: int) -> Tensor:
        """Which outputs belong to some classes, bool [K], beside the network."""
        return outputs_of(classes, known).to(linear_head(self.network).weight.device)

    def _warmup(self, new: Tensor, batch: Batch) -> Losses:
        """Cross-entropy over the new classes [K]; the others get no gradient."""
        return {
            "classification": cross_entropy_among(self.network(batch.images), batch.labels, new)
        }

    def _loss(self, own: Tensor | None, heads: list[int], batch: Batch) -> Losses:
        """Cross-entropy over ``own`` [K] or all outputs, and distillation head by head."""
        logits = self.network(batch.images)  # [B, K]
        losses = {"classification": cross_entropy_among(logits, batch.labels, own)}
        old = self._teach(batch)
        if old is not None:
            mine = logits[:, : old.shape[1]]
            taught = distillation_by_layer(mine, old, heads, self.config.temperature)
            losses["distillation"] = self.config.alpha * taught
        return losses

    def _teach(self, batch: Batch) -> Tensor | None:
        """The old network's logits [B, K], or None in the first task.

        Its weights are frozen; images that depend on something learned are not.
        """
        if len(self.recorded):
            return self.recorded[batch.index]
        return None if self.teacher is None else self.teacher(batch.images)

    def end_task(self, task: Task) -> None:
        """Lets the old network go, and what it said."""
        self.teacher = None
        self.recorded = self.recorded.new_empty(0, 0)
