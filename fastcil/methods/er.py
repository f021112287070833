"""Experience replay: each step joins a batch of new data and one of exemplars."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

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
from fastcil.methods.recipes import FINETUNING, PYCIL_FIRST, PYCIL_REPLAY, online
from fastcil.nn import TaskOutputs
from fastcil.nn.lifecycle import linear_head, start_network


class ExperienceReplay(Method):
    """Experience replay (Chaudhry et al. 2019, Alg. 1).

    Each step draws B_n from the new data and B_M from memory, as many, and minimises the
    cross-entropy of the joined batch,

        L = 1 / |B_n ∪ B_M|  sum over (x, y) in B_n ∪ B_M of  -log softmax(z(x))_y ,

    so new data and memory weigh the same unless memory holds less than a batch, or ``replay_batch``
    says otherwise. While it is empty only B_n is there. With ``head="task"`` each image's softmax
    is over the classes that arrived with its own (Lopez-Paz and Ranzato 2017, Sec. 5).

    Exemplars are chosen at random, once per task, as many of each class. The paper's reservoir
    fills while the stream passes, and has as many of each class on average alone: `Dark` and `MER`
    have one.

    Example:
        >>> ExperienceReplay.selection
        'random'
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of experience replay.

        The paper trains online, in a single pass with batches of 10; ``PRESETS["online"]`` does
        so, by plain SGD. The default are the epochs that the offline literature gives replay
        (PyCIL's ``replay``; Zhou et al. 2023), to be compared with the other methods here.

        The ``samc-...`` presets are Bai et al.'s (2023, SAMC, appendix E), alike for their three
        data sets; that 20 exemplars are replayed in a step is their released code's.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            head: ``all`` known classes share one softmax, or each ``task`` has its own.
            replay_batch: Images of B_M; 0 for as many as of B_n.
        """

        first: Recipe = PYCIL_FIRST
        later: Recipe = PYCIL_REPLAY
        head: Literal["all", "task"] = "all"
        replay_batch: int = 0

        def __post_init__(self) -> None:
            check_not_negative("replay_batch", self.replay_batch)
            check_choices(self)

    PRESETS: ClassVar[dict[str, Config]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING),
        "online": Config(first=online(0.03), later=online(0.03)),
        **dict.fromkeys(
            ("samc-cifar10", "samc-cifar100", "samc-mini"),
            Config(first=online(0.1), later=online(0.1), head="task", replay_batch=20),
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
        """One stage with two streams, or one stream while memory is empty."""
        recipe = self.config.first if task.first else self.config.later
        new, *memory = replay_streams(task, recipe.batch_size)
        if self.config.replay_batch:
            memory = [replace(stream, batch_size=self.config.replay_batch) for stream in memory]
        return [
            Stage(
                name="replay",
                method=self,
                objective=self._loss,
                streams=(new, *memory),
                recipe=recipe,
                parameters=self.network.trained_parameters,
                primary=True,
                logits=self.logits,
            )
        ]

    def _loss(self, batch: Batch) -> Losses:
        """Cross-entropy of the joined batch."""
        logits = self.network(batch.images)  # [B, K]
        return {"classification": self.outputs.cross_entropy(logits, batch.labels)}
