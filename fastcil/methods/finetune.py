"""Finetuning: every task trains on its own data alone, the lower bound."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

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
)
from fastcil.methods.recipes import BASE_SESSION, FINETUNING, PYCIL_FIRST, online, session
from fastcil.nn import TaskOutputs, outputs_of, rows_of_others
from fastcil.nn.lifecycle import linear_head, start_network

_LATER = Recipe(epochs=80, lr=0.1, schedule="step", milestones=(40, 70), weight_decay=2e-4)


class Finetune(Method):
    """Cross-entropy on the new data only; keeps nothing.

    L = mean over the batch of -log softmax(z)_y, with z [B, K] the logits of all classes so far;
    with ``head="task"`` of those that arrived with y (Lopez-Paz and Ranzato 2017, Sec. 5). PyCIL's
    ``finetune`` normalises over the task's own classes instead, which is easier on the old ones;
    the lower bound of the literature is usually the form used here.

    Example:
        >>> Finetune.Config().later.epochs
        80
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of finetuning; the recipes are those of PyCIL (Zhou et al. 2023).

        ``PRESETS["finetuning"]`` goes on from a pre-trained network (Shon et al. 2022); the
        ``samc-...`` ones are Bai et al.'s (2023, SAMC, appendix E), the ``fscil-...`` ones the
        Ft-CNN of Tao et al. (2020, TOPIC).

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            head: ``all`` known classes share one softmax, or each ``task`` has its own.
            normalised: Whether the head reads feature vectors of unit length, as Tao et al.'s
                (2020) does; see `fastcil.nn.LinearHead`.
        """

        first: Recipe = PYCIL_FIRST
        later: Recipe = _LATER
        head: Literal["all", "task"] = "all"
        normalised: bool = False

        def __post_init__(self) -> None:
            check_choices(self)

    PRESETS: ClassVar[dict[str, Config]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING),
        "samc-cifar10": Config(first=online(0.1), later=online(0.1), head="task"),
        "samc-cifar100": Config(first=online(1.0), later=online(1.0), head="task"),
        "samc-mini": Config(first=online(1.0), later=online(1.0), head="task"),
        "fscil-cifar100": Config(BASE_SESSION, session(70, drop=60), normalised=True),
        "fscil-mini": Config(BASE_SESSION, session(50), normalised=True),
        "fscil-cub": Config(BASE_SESSION, session(100), normalised=True),
    }

    config: Config
    keeps = "nothing"

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.outputs = TaskOutputs(config.head)

    def begin_task(self, task: Task) -> None:
        """Starts the network, or adds the new classes to its head."""
        if task.first:
            backbone, normalised = self.context.make_backbone(), self.config.normalised
            self.network = start_network(backbone, task.total, normalised=normalised)
        else:
            linear_head(self.network).grow(task.total)
        self.outputs.add(len(task.new_classes))

    def stages(self, task: Task) -> list[Stage]:
        """One stage on the new data."""
        recipe = self.config.first if task.first else self.config.later
        head, unmoved = linear_head(self.network), None
        if self.config.head == "task":
            own = outputs_of(task.classes, task.total).to(head.weight.device)
            unmoved = partial(rows_of_others, head, own)
        return [
            Stage(
                name="finetune",
                method=self,
                objective=self._loss,
                streams=(Stream((task.examples,), recipe.batch_size),),
                recipe=recipe,
                parameters=self.network.trained_parameters,
                primary=True,
                logits=self.logits,
                unmoved=unmoved,
            )
        ]

    def _loss(self, batch: Batch) -> Losses:
        """Cross-entropy over all known classes, or over those of each image's task."""
        logits = self.network(batch.images)  # [B, K]
        return {"classification": self.outputs.cross_entropy(logits, batch.labels)}
