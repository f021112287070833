"""Gradient episodic memory: steps that no past task's memory opposes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

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
)
from fastcil.methods.constrained_stage import ConstrainedStage, MemoryNorms
from fastcil.methods.recipes import FINETUNING, PYCIL_FIRST, PYCIL_REPLAY, online
from fastcil.nn import TaskOutputs, project_gradient
from fastcil.nn.lifecycle import linear_head, start_network

_CIFAR10 = Recipe(
    epochs=50, lr=0.03, schedule="constant", momentum=0.0, weight_decay=0.0, batch_size=32
)


class GEM(Method):
    r"""Gradient episodic memory (Lopez-Paz and Ranzato 2017).

    With g the gradient of the cross-entropy on a batch of new data and :math:`g_k` that on the
    exemplars of past task k, each step goes along

    .. math:: \tilde g = g \ \text{ if all } \langle g, g_k \rangle \ge 0, \quad \text{else} \quad
        g + G^\top v, \qquad
        v = \arg\min_{v \ge m} \tfrac12 v^\top (G G^\top + \epsilon I) v + (G g)^\top v

    with :math:`g_k` the rows of G (Sec. 3; `fastcil.nn.project_gradient`). With
    :math:`m = \epsilon = 0` it is the gradient nearest to g that, to first order, raises the loss
    of no past task. A margin m favours past tasks. The paper adds its constant to the v of m = 0;
    the released code, by which the published figures were made, bounds v by it, and so it is here.

    An exemplar belongs to the task that brought its class. So a data-incremental stream, whose
    later tasks bring none, has a single past task: the first. Exemplars are chosen at random, as
    many as memory has room for; the paper keeps the last images of each task's stream. It also
    has the current task's images in memory, which constrain nothing.

    Example:
        >>> GEM.Config().margin, GEM.selection
        (0.5, 'random')
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of GEM.

        The paper trains online, one head for each task: ``PRESETS["online"]`` has its settings
        for CIFAR-100. ``PRESETS["cifar10"]`` are Buzzega et al.'s for Seq-CIFAR-10. ``samc-...``
        are those of Bai et al. (2023, SAMC, appendix E), alike for their three data sets. The
        default are the epochs that the offline literature gives replay, as in
        `ExperienceReplay.Config`.

        Past tasks' gradients are passes in training mode. In the released code these move the
        running statistics of batch norms, so that these stand for all tasks, and not only for
        the last one, when the network is evaluated; hence the default.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            margin: m, the paper's memory strength.
            ridge: epsilon, 1e-3 in the released code; 0 in the paper.
            head: ``all`` known classes share one softmax, or each ``task`` has its own.
            memory_batch: Exemplars of each past task in a step; 0 for all, as in the paper.
            memory_norms: Whether past tasks' passes ``move`` running statistics, or ``keep`` them
                as new data have set them.
        """

        first: Recipe = PYCIL_FIRST
        later: Recipe = PYCIL_REPLAY
        margin: float = 0.5
        ridge: float = 1e-3
        head: Literal["all", "task"] = "all"
        memory_batch: int = 0
        memory_norms: MemoryNorms = "move"

        def __post_init__(self) -> None:
            for name in ("margin", "ridge", "memory_batch"):
                check_not_negative(name, getattr(self, name))
            check_choices(self)

    PRESETS: ClassVar[dict[str, Config]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING),
        "cifar10": Config(first=_CIFAR10, later=_CIFAR10),
        **dict.fromkeys(
            ("online", "samc-cifar10", "samc-cifar100", "samc-mini"),
            Config(first=online(0.1), later=online(0.1), head="task"),
        ),
    }

    config: Config
    selection = "random"

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.outputs = TaskOutputs(config.head)

    def begin_task(self, task: Task) -> None:
        """Starts the network, or adds the new classes to its head."""
        if task.first:
            self.network = start_network(self.context.make_backbone(), task.total)
        else:
            linear_head(self.network).grow(task.total)
        self.outputs.add(len(task.new_classes))

    def stages(self, task: Task) -> list[Stage]:
        """One stage: new data, and a stream of exemplars for every past task that has any."""
        config = self.config
        recipe = config.first if task.first else config.later
        return [
            ConstrainedStage(
                name="gem",
                method=self,
                objective=self._loss,
                streams=(Stream((task.examples,), recipe.batch_size), *self._past(task)),
                recipe=recipe,
                parameters=self.network.trained_parameters,
                primary=True,
                logits=self.logits,
                project=partial(project_gradient, margin=config.margin, ridge=config.ridge),
                memory_norms=config.memory_norms,
            )
        ]

    def _past(self, task: Task) -> list[Stream]:
        """Exemplars, a stream for each task that brought their classes."""
        ends = self.outputs.brought.cumsum(0).cpu()
        brought_by = torch.bucketize(task.exemplars.labels.cpu(), ends, right=True)
        streams = []
        for past in brought_by.unique().tolist():
            positions = (brought_by == past).nonzero().flatten()
            streams.append(
                Stream(
                    (task.examples, task.exemplars),
                    self.config.memory_batch or len(positions),
                    subset=len(task.examples) + positions,
                )
            )
        return streams

    def _loss(self, batch: Batch) -> Losses:
        """Cross-entropy over all known classes, or over those of each image's task."""
        logits = self.network(batch.images)  # [B, K]
        return {"classification": self.outputs.cross_entropy(logits, batch.labels)}
