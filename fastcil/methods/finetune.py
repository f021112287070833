"""Finetuning: every task trains on its own data alone, the lower bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from fastcil.contract import Batch, Losses, Method, Recipe, Stage, Stream, Task
from fastcil.methods.recipes import FINETUNING
from fastcil.nn.lifecycle import linear_head, start_network

_FIRST = Recipe(epochs=200, lr=0.1, schedule="step", milestones=(60, 120, 170), weight_decay=5e-4)
_LATER = Recipe(epochs=80, lr=0.1, schedule="step", milestones=(40, 70), weight_decay=2e-4)


class Finetune(Method):
    """Cross-entropy over all known classes, on the new data only; keeps nothing.

    L = mean over the batch of -log softmax(z)_y, with z [B, K] the logits of all classes so far.
    PyCIL's ``finetune`` normalises over the task's own classes instead, which is easier on the old
    ones; the lower bound of the literature is usually the form used here.

    Example:
        >>> Finetune.Config().later.epochs
        80
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of finetuning; the recipes are those of PyCIL (Zhou et al. 2023).

        ``PRESETS["finetuning"]`` goes on from a pre-trained network (Shon et al. 2022).

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
        """

        first: Recipe = _FIRST
        later: Recipe = _LATER

    PRESETS: ClassVar[dict[str, Config]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING),
    }

    config: Config
    keeps = "nothing"

    def begin_task(self, task: Task) -> None:
        """Starts the network, or adds the new classes to its head."""
        if task.first:
            self.network = start_network(self.context.make_backbone(), task.total)
        else:
            linear_head(self.network).grow(task.total)

    def stages(self, task: Task) -> list[Stage]:
        """One stage on the new data."""
        recipe = self.config.first if task.first else self.config.later
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
            )
        ]

    def _loss(self, batch: Batch) -> Losses:
        """Cross-entropy over all known classes."""
        return {"classification": F.cross_entropy(self.network(batch.images), batch.labels)}
