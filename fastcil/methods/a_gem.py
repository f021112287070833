"""Averaged gradient episodic memory: steps that memory as a whole does not oppose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastcil.contract import (
    Batch,
    Context,
    Losses,
    Method,
    Recipe,
    Stage,
    Task,
    check_choices,
    check_positive,
)
from fastcil.memory.replay import replay_streams
from fastcil.methods.constrained_stage import ConstrainedStage, MemoryNorms
from fastcil.methods.recipes import FINETUNING, PYCIL_FIRST, PYCIL_REPLAY, online
from fastcil.nn import TaskOutputs, remove_opposing
from fastcil.nn.lifecycle import linear_head, start_network


class AGEM(Method):
    r"""Averaged gradient episodic memory, A-GEM (Chaudhry et al. 2019).

    With g the gradient of the cross-entropy on a batch of new data and r that on a random batch of
    all exemplars, each step goes along

    .. math:: \tilde g = g \ \text{ if } g^\top r \ge 0, \quad \text{else} \quad
        g - \frac{g^\top r}{r^\top r} \, r

    (Sec. 4; `fastcil.nn.remove_opposing`): `GEM` with a single constraint, no margin and no ridge.
    Exemplars are chosen at random, and a step's are drawn without replacement until all had their
    turn.

    Example:
        >>> AGEM.Config().memory_batch, AGEM.selection
        (256, 'random')
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of A-GEM.

        ``PRESETS["online"]`` are those of the released code for Split CIFAR-100: online, one head
        for each task. The default are the epochs that the offline literature gives replay, as in
        `ExperienceReplay.Config`.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            head: ``all`` known classes share one softmax, or each ``task`` has its own.
            memory_batch: Exemplars of a step, 256 in the released code; all where there are fewer.
            memory_norms: Whether memory's pass ``move``s the running statistics of batch norms,
                or ``keep``s them as new data have set them; see `GEM.Config`.
        """

        first: Recipe = PYCIL_FIRST
        later: Recipe = PYCIL_REPLAY
        head: Literal["all", "task"] = "all"
        memory_batch: int = 256
        memory_norms: MemoryNorms = "move"

        def __post_init__(self) -> None:
            check_positive("memory_batch", self.memory_batch)
            check_choices(self)

    PRESETS: ClassVar[dict[str, Config]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING),
        "online": Config(first=online(0.03), later=online(0.03), head="task"),
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
        """One stage with two streams, or one stream while memory is empty."""
        config = self.config
        recipe = config.first if task.first else config.later
        new, *memory = replay_streams(task, recipe.batch_size)
        memory = [replace(stream, batch_size=config.memory_batch) for stream in memory]
        return [
            ConstrainedStage(
                name="a-gem",
                method=self,
                objective=self._loss,
                streams=(new, *memory),
                recipe=recipe,
                parameters=self.network.trained_parameters,
                primary=True,
                logits=self.logits,
                project=_project,
                memory_norms=config.memory_norms,
            )
        ]

    def _loss(self, batch: Batch) -> Losses:
        """Cross-entropy over all known classes, or over those of each image's task."""
        logits = self.network(batch.images)  # [B, K]
        return {"classification": self.outputs.cross_entropy(logits, batch.labels)}


def _project(gradient: Tensor, references: Tensor) -> Tensor:
    """Removes what opposes the one reference, [1, P]."""
    return remove_opposing(gradient, references[0])
