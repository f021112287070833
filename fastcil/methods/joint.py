"""Joint training: every task trains on all data so far, the upper bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from fastcil.contract import Batch, Losses, Method, Recipe, Stage, Stream, Task
from fastcil.methods.recipes import BASE_SESSION, FINETUNING
from fastcil.nn.lifecycle import linear_head, start_network

_RECIPE = Recipe(epochs=200, lr=0.1, schedule="step", milestones=(60, 120, 170), weight_decay=5e-4)


class Joint(Method):
    """Cross-entropy on all data of all tasks, which it keeps.

    L = mean over the batch of -log softmax(z)_y, with the batch drawn uniformly from everything
    seen so far.

    Example:
        >>> Joint.keeps
        'everything'
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of joint training.

        The ``fscil-...`` presets train every session as the base session of few-shot streams.

        Args:
            recipe: Recipe of every task (PyCIL's first-task recipe; Zhou et al. 2023).
            fresh: Whether each task starts from a new network, as the upper bound of the
                literature does, or goes on from the one it has.
            normalised: Whether the head reads feature vectors of unit length, as Tao et al.'s
                (2020) does; see `fastcil.nn.LinearHead`.
        """

        recipe: Recipe = _RECIPE
        fresh: bool = True
        normalised: bool = False

    PRESETS: ClassVar[dict[str, Config]] = {
        "finetuning": Config(recipe=FINETUNING),
        **dict.fromkeys(
            ("fscil-cifar100", "fscil-mini", "fscil-cub"), Config(BASE_SESSION, normalised=True)
        ),
    }

    config: Config
    keeps = "everything"

    def begin_task(self, task: Task) -> None:
        """Starts a network for all classes so far, or adds the new ones to the one it has."""
        if task.first or self.config.fresh:
            backbone, normalised = self.context.make_backbone(), self.config.normalised
            self.network = start_network(backbone, task.total, normalised=normalised)
        else:
            linear_head(self.network).grow(task.total)

    def stages(self, task: Task) -> list[Stage]:
        """One stage on all data."""
        recipe = self.config.recipe
        return [
            Stage(
                name="joint",
                method=self,
                objective=self._loss,
                streams=(Stream((task.examples, task.exemplars), recipe.batch_size),),
                recipe=recipe,
                parameters=self.network.trained_parameters,
                primary=True,
                logits=self.logits,
            )
        ]

    def _loss(self, batch: Batch) -> Losses:
        """Cross-entropy over all known classes."""
        return {"classification": F.cross_entropy(self.network(batch.images), batch.labels)}
