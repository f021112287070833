"""Experience replay: each step joins a batch of new data and one of exemplars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from fastcil.contract import Batch, Losses, Method, Recipe, Stage, Task
from fastcil.memory.replay import replay_streams
from fastcil.methods.recipes import FINETUNING
from fastcil.nn.lifecycle import linear_head, start_network

_FIRST = Recipe(epochs=200, lr=0.1, schedule="step", milestones=(60, 120, 170), weight_decay=5e-4)
_LATER = Recipe(epochs=70, lr=0.1, schedule="step", milestones=(30, 50), weight_decay=2e-4)
_ONLINE = Recipe(
    epochs=1, lr=0.03, schedule="constant", momentum=0.0, weight_decay=0.0, batch_size=10
)


class ExperienceReplay(Method):
    """Experience replay (Chaudhry et al. 2019, Alg. 1).

    Each step draws B_n from the new data and B_M from memory, as many, and minimises the
    cross-entropy of the joined batch,

        L = 1 / |B_n ∪ B_M|  sum over (x, y) in B_n ∪ B_M of  -log softmax(z(x))_y ,

    so new data and memory weigh the same unless memory holds less than a batch. While it is empty
    only B_n is there. Exemplars are chosen at random, once per task: the paper's reservoir fills
    while the stream passes, to the same distribution where all classes are equally frequent.

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

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task; its ``batch_size`` is that of B_n and of B_M.
        """

        first: Recipe = _FIRST
        later: Recipe = _LATER

    PRESETS: ClassVar[dict[str, Config]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING),
        "online": Config(first=_ONLINE, later=_ONLINE),
    }

    config: Config
    selection = "random"

    def begin_task(self, task: Task) -> None:
        """Starts the network, or adds the new classes to its head."""
        if task.first:
            self.network = start_network(self.context.make_backbone(), task.total)
        else:
            linear_head(self.network).grow(task.total)

    def stages(self, task: Task) -> list[Stage]:
        """One stage with two streams, or one stream while memory is empty."""
        recipe = self.config.first if task.first else self.config.later
        streams = replay_streams(task, recipe.batch_size)
        return [
            Stage(
                name="replay",
                method=self,
                objective=self._loss,
                streams=streams,
                recipe=recipe,
                parameters=self.network.trained_parameters,
                primary=True,
                logits=self.logits,
            )
        ]

    def _loss(self, batch: Batch) -> Losses:
        """Cross-entropy of the joined batch."""
        return {"classification": F.cross_entropy(self.network(batch.images), batch.labels)}
