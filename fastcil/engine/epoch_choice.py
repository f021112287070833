"""Which epoch of a few-shot session is kept: by images held out, by test images, or the last.

A handful of images is fitted in a few epochs, and forgetting goes on with every further one. So
published few-shot learners train for long and keep an epoch in the middle, which the released code
of Tao et al. (2020) finds on the test images. Here that is ``paper`` mode; the default holds out
one image of each class as it arrives, and ``last`` chooses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcil.contract import Addon, Method, Record, Stage, Task, evaluating
from fastcil.data import Examples
from fastcil.data.ranks import rank_in_class
from fastcil.engine.context import EngineContext
from fastcil.engine.events import Listener
from fastcil.engine.metrics import harmonic_mean
from fastcil.engine.seeds import generator
from fastcil.errors import FastcilError

RULES = {
    "held-out": "images held out, one of each class",
    "paper": "test images (paper mode)",
    "last": "nothing: the last one",
}
"""Rule -> what an epoch is chosen on, as tables call it."""

PAPER_MODE = " (paper mode)"
"""What tables put behind the name of a method whose epochs were chosen on test images."""

_LARGEST = 1e30
_HOLD = 4

Figures = dict[str, Any]
"""``epoch`` from 0; accuracies in percent ``new`` and ``old``, None without old classes; ``loss``,
the mean of the cross-entropies of new and of old classes' images."""


def held_out(labels: Tensor, seed: int, task: int) -> Tensor:
    """Which of a task's images are held out: one of each class.

    A class of which there is a single image keeps it.

    Args:
        labels: Of what the task brings, int64 [N].
        seed: Of the draw, ``engine.data_seed`` or else the run's.
        task: Its number.

    Returns:
        bool [N].

    Example:
        >>> labels = torch.tensor([3, 3, 3, 4, 4, 5])
        >>> labels[held_out(labels, seed=0, task=1)].tolist()
        [3, 4]
    """
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=generator(_HOLD, seed, task))
    rank = torch.empty_like(order)
    rank[order] = rank_in_class(labels[order])
    return (rank == 0) & (labels.bincount()[labels] > 1)


def _score(figures: Figures) -> float:
    """The accuracy on new classes, or its harmonic mean with that on old ones, if there are any."""
    new, old = figures["new"], figures["old"]
    return float(new if old is None else harmonic_mean(np.array([new]), np.array([old]))[0])


def _rank(figures: Figures) -> tuple[float, float, float]:
    """What is compared first, second and third; the larger is better."""
    return _score(figures), figures["new"] + (figures["old"] or 0.0), -figures["loss"]


def prefers(rule: str, figures: Figures, best: Figures | None) -> bool:
    """Whether an epoch is chosen before the best one so far.

    - ``held-out``: a higher accuracy is better, of new and old classes their harmonic mean; of
      equal ones, such as 0 where no new image is right, the higher sum of both; of equal ones the
      lower loss; of equal ones the earlier epoch.
    - ``paper``: the first epoch whose accuracy on the new classes exceeds that on the old ones;
      from there on each that has both higher (``select_best2`` of Tao et al.'s released code).

    Args:
        rule: ``held-out`` or ``paper``.
        figures: Of the epoch.
        best: Of the best one before it; None while there is none.

    Example:
        >>> curve = [(40, 50), (52, 48), (60, 40), (55, 49), (54, 49.5)]  # new, old
        >>> chosen = None
        >>> for epoch, (new, old) in enumerate(curve):
        ...     figures = {"epoch": epoch, "new": new, "old": old, "loss": 0.0}
        ...     chosen = figures if prefers("paper", figures, chosen) else chosen
        >>> chosen["epoch"]
        3
    """
    new, old = figures["new"], figures["old"]
    if rule == "paper":
        if old is None:
            return False
        if best is None:
            return bool(new > old)
        return bool(new > best["new"] and old > best["old"])
    if best is None:
        return True
    return _rank(figures) > _rank(best)


class EpochChoice:
    """Judges epochs of a session's primary stages and puts the chosen one's state back.

    An epoch is judged by `Method.logits` over all known classes: readouts of other kinds, such as
    nearest means, may know of the new classes only when the task is done. What is put back is
    every tensor of the method and its addons, in place, before the stage's ``finish``; each
    primary stage is chosen by itself. Where ``paper`` finds no epoch, the last one stays.

    Args:
        rule: ``held-out`` or ``paper``; see `prefers`.
        every: Epochs from one that is judged to the next; the last one always is.
        learners: The method, then its addons.
        context: Reads the images.
        images: What it judges by: images of the session's classes and of earlier ones.
        classes: The session's classes; all other images are of old ones.
        tell: Hears ``chosen`` as a stage ends.
    """

    def __init__(
        self,
        rule: str,
        every: int,
        learners: Sequence[Method | Addon],
        context: EngineContext,
        images: Examples,
        classes: Sequence[int],
        tell: Listener,
    ) -> None:
        self.rule = rule
        self.every = every
        self.tell = tell
        self._learners = list(learners)
        self._context = context
        self._images = images
        fresh = torch.isin(images.labels.cpu(), torch.tensor(list(classes)))
        sides = torch.stack([fresh, ~fresh])  # [2, N]: new, old
        self._counts: list[int] = sides.sum(1).tolist()
        self._sides = sides.to(context.device, torch.float64)
        self._judged: list[Figures] = []
        self._best: Figures | None = None
        # None: the chosen state is the one that is there.
        self._kept: list[dict[str, Tensor]] | None = None
        self._settled: list[dict[str, Any]] = []

    def judge(self, stage: Stage, epoch: int) -> None:
        """Looks at the method as an epoch, counted from 0, has left it."""
        last = epoch + 1 == stage.recipe.epochs
        if not last and (epoch + 1) % self.every:
            return
        figures = {"epoch": epoch, **self._measure()}
        self._judged.append(figures)
        if prefers(self.rule, figures, self._best):
            self._best = figures
            self._kept = None if last else self._snapshot()

    def settle(self, stage: Stage) -> None:
        """Puts the chosen epoch's state back, says which it is, and is ready for another stage."""
        if not self._judged:
            return
        if self._kept is not None:
            for part, tensors in zip(self._learners, self._kept, strict=True):
                part.load_tensors(tensors)
        chosen = self._best or self._judged[-1]
        self.tell(
            "chosen",
            {"stage": stage.name, "rule": self.rule, "epochs": stage.recipe.epochs, **chosen},
        )
        self._settled.append(
            {"stage": stage.name, "chosen": chosen["epoch"], "judged": self._judged}
        )
        self._judged, self._best, self._kept = [], None, None

    def state(self) -> dict[str, Any]:
        """What resuming needs: what was judged, and the state that is best so far."""
        return {
            "judged": self._judged,
            "best": self._best,
            "kept": self._kept,
            "settled": self._settled,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`."""
        self._judged, self._settled = list(state["judged"]), list(state["settled"])
        self._best, self._kept = state["best"], state["kept"]

    def records(self) -> list[Record]:
        """The accuracies by epoch of each stage, and which was chosen."""
        return [_record(self.rule, **settled) for settled in self._settled]

    def _snapshot(self) -> list[dict[str, Tensor]]:
        """Copies of all tensors of the method and its addons."""
        return [
            {name: value.detach().clone() for name, value in part.tensors().items()}
            for part in self._learners
        ]

    def _measure(self) -> Figures:
        """Accuracies and loss of the method as it is; waits for the device, once."""
        method: Any = self._learners[0]

        def look(images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            scores = method.logits(images).float()  # [B, K]
            losses = F.cross_entropy(scores, labels, reduction="none")
            # A class of which nothing is known may score -inf.
            losses = losses.double().nan_to_num(_LARGEST, _LARGEST, _LARGEST)
            return (scores.argmax(1) == labels).double(), losses

        with evaluating(method):
            found = self._context.scan_labelled(look, self._images, look="centre")
        sums = (self._sides @ torch.stack(found, 1)).tolist()  # [2, 2]
        means = [
            (100.0 * hits / count, loss / count) if count else None
            for (hits, loss), count in zip(sums, self._counts, strict=True)
        ]
        new, old = means
        losses = [mean[1] for mean in means if mean]
        return {
            "new": new[0] if new else 0.0,
            "old": old[0] if old else None,
            "loss": min(sum(losses) / len(losses), _LARGEST),
        }


def plan_choice(
    task: Task,
    rule: str,
    every: int,
    learners: Sequence[Method | Addon],
    context: EngineContext,
    seed: int,
    judges: Examples | None,
    tell: Listener,
) -> tuple[EpochChoice | None, Task]:
    """How a task's epochs are chosen, and the task that the method is to see.

    Nothing is chosen outside the sessions of a few-shot stream, nor where no class can spare a
    shot, nor for a method that keeps all images: it is no session's few shots that it is trained
    on, and begun anew it has no old classes to lose. Without ``judges``, as in `Learner.learn`,
    which is handed one task and no other, shots are held out here, and old classes are judged by
    what memory holds of them.

    Args:
        task: The task.
        rule: ``engine.epoch_choice``.
        every: ``engine.epoch_choice_every``.
        learners: The method, then its addons.
        context: Reads images.
        seed: Of the draw of what is held out.
        judges: Images of the classes known with this task to choose epochs on: those held out of
            it and of earlier tasks, or test images; none of them is in the task.
        tell: Hears which epochs are chosen.

    Raises:
        FastcilError: ``paper`` without test images.
    """
    if not task.few_shot or rule == "last" or getattr(learners[0], "keeps", "") == "everything":
        return None, task
    if judges is None and rule == "paper":
        raise FastcilError(
            "engine.epoch_choice is 'paper', which chooses epochs on test images, and there "
            "are none here; use 'held-out' or 'last', or train on a few-shot scenario."
        )
    if judges is None:
        mask = held_out(task.examples.labels, seed, task.index)
        rest, held = (task.examples.select(m.nonzero().flatten()) for m in (~mask, mask))
        task = replace(task, examples=rest)
        again = torch.isin(task.exemplars.labels.cpu(), torch.tensor(task.classes))
        old = task.exemplars.select((~again).nonzero().flatten())
        judges = Examples.cat([held, old]) if len(old) else held
    if not torch.isin(judges.labels.cpu(), torch.tensor(task.classes)).any():
        return None, task
    return EpochChoice(rule, every, learners, context, judges, task.classes, tell), task


def choice_notes(rules: Mapping[str, str | None]) -> list[str]:
    """How the epochs of few-shot sessions were chosen, a sentence for each rule.

    Args:
        rules: Method -> rule; None where there is no such session.

    Example:
        >>> choice_notes({"lecnet": "paper", "finetune": "paper", "er": None})
        ['Epochs of sessions were chosen on test images (paper mode).']
        >>> choice_notes({"a": "held-out", "b": "last"})[1]
        'Epochs of sessions were chosen on nothing: the last one (b).'
    """
    by_rule: dict[str, list[str]] = {}
    for method, rule in rules.items():
        if rule is not None:
            by_rule.setdefault(rule, []).append(method)
    return [
        f"Epochs of sessions were chosen on {RULES[rule]}"
        + (f" ({', '.join(methods)})." if len(by_rule) > 1 else ".")
        for rule, methods in by_rule.items()
    ]


def _record(rule: str, stage: str, chosen: int, judged: Sequence[Figures]) -> Record:
    """Accuracies by epoch, the chosen one marked; epochs count from 1."""
    lines = {
        f"{name} classes": [figures[name] for figures in judged]
        for name in ("new", "old")
        if judged[0][name] is not None
    }
    return Record(
        "curve",
        f"Epochs of '{stage}' in the last session, chosen on {RULES[rule]}",
        {
            "x": [figures["epoch"] + 1 for figures in judged],
            "y": lines,
            "marks": {f"chosen: {chosen + 1}": chosen + 1},
            "xlabel": "epoch",
            "ylabel": "accuracy, %",
        },
    )
