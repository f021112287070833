"""A few timed steps of every stage of a run's first two tasks, on networks of their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fastcil.contract import Stage, Task
from fastcil.data import Examples
from fastcil.data.ranks import rank_in_class
from fastcil.engine.lesson import Lesson
from fastcil.engine.online import leading, taken
from fastcil.engine.parts import Parts
from fastcil.engine.plan import Plan
from fastcil.engine.resolve import pick_device
from fastcil.engine.scenario import Arrival, positions
from fastcil.engine.state import random_state, set_random_state
from fastcil.memory import Budget

STEPS = 3  # of each stage; the first of them warms up
_KEPT = 2  # exemplars of each class in the rehearsal's memory
_SMALL = 64


@dataclass
class RehearsedStage:
    """What a rehearsal found out of a stage.

    Args:
        name: The stage's.
        epochs: Of the real run.
        batch: Images of the first stream in each step.
        new: Share of the task's new images that the first stream holds.
        old: Share of memory's images that it holds.
        balanced: Whether it holds as many new images of a class as memory has of an old one.
        companions: Name -> steps after each epoch.
        batches: Name -> images of all streams in a step of the real run.
        timed: Name -> of the rehearsal's steps.
        seconds: Name -> of a step of the real run; the stage's and its companions'.
    """

    name: str
    epochs: int
    batch: int
    new: float
    old: float
    balanced: bool
    companions: dict[str, int]
    batches: dict[str, int]
    timed: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)

    def images(self, new: float, old: float, quota: float, classes: int) -> float:
        """Images of the first stream in a task of the real run.

        Args:
            new: New images.
            old: Exemplars.
            quota: Exemplars of each class.
            classes: New classes.
        """
        return (min(new, quota * classes) if self.balanced else self.new * new) + self.old * old


@dataclass
class RehearsedTask:
    """What a rehearsal found out of a task.

    Args:
        stages: In order, those that refine exemplars included.
        extractors: How many the method has once the task is learned.
        readouts: In how many ways it classifies.
    """

    stages: list[RehearsedStage]
    extractors: int
    readouts: int


def rehearse(plan: Plan) -> list[RehearsedTask]:
    """Trains the first two tasks on a few images for `STEPS` steps of each stage, and times them.

    The network, the images' size and the device are those of the run, the images some of its
    training images: on CUDA as many as a full batch. Random generators are put back.

    Args:
        plan: The run.

    Returns:
        The first task, and the second if there is one.
    """
    before = random_state()
    engine = replace(plan.settings.engine, compile=False, progress=False, epoch_choice="last")
    settings = replace(plan.settings, groups={**plan.settings.groups, "engine": engine})
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    images = plan.dataset.train.images
    budget = Budget(_KEPT, "images", growing=True) if plan.budget.amount else Budget(0)
    device = pick_device(plan.device)
    parts = Parts.for_images(images, settings, budget, device, plan.backbone)
    try:
        return [
            _rehearse_task(plan, parts, replace(settings), number)
            for number in range(min(2, len(plan.scenario.arrivals)))
        ]
    finally:
        set_random_state(before)


def _rehearse_task(plan: Plan, parts: Parts, settings: Any, number: int) -> RehearsedTask:
    clock = _Clock(parts.device)
    lesson = _Rehearsal(parts, settings, plan.seeds[0], clock)
    lesson.run(_task(plan, parts, number))
    for stage, seconds in zip(lesson.found, clock.seconds(), strict=True):
        for name, spent in seconds.items():
            stage.seconds[name] = spent * stage.batches[name] / max(1, stage.timed[name])
    method = parts.method
    found = RehearsedTask(
        lesson.found, len(getattr(method.network, "extractors", ())), len(method.readouts())
    )
    method.release()
    return found


class _Clock:
    """Hears a trainer's events, and times its steps; waits for the device, which a run does not."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()
        self._steps: list[dict[str, list[float]]] = []

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if event == "stage":
            self._steps.append({})
        elif event == "step":
            self._steps[-1].setdefault(fields["stage"], []).append(now - self._last)
        self._last = time.perf_counter()

    def seconds(self) -> list[dict[str, float]]:
        """For every stage: name of it or of a companion -> seconds of a step."""
        return [
            {name: fmean(spent[1:] or spent) for name, spent in lanes.items()}
            for lanes in self._steps
        ]


@dataclass
class _Rehearsal(Lesson):
    """A lesson that notes what its stages are, and cuts them short."""

    found: list[RehearsedStage] = field(default_factory=list)
    task: Task | None = None

    def run(self, task: Task, resume: dict[str, Any] | None = None) -> None:
        """Notes the task too."""
        self.task = task
        super().run(task, resume)

    def _train(
        self, stages: Sequence[Stage], key: tuple[int, ...], resume: dict[str, Any] | None
    ) -> None:
        for stage in stages:
            self.found.append(self._look(stage))
            stage.recipe = replace(stage.recipe, epochs=min(1, stage.recipe.epochs))
            for part in (stage, *stage.companions):
                part.steps = min(STEPS, part.steps) if part.steps else STEPS
        super()._train(stages, key, resume)

    def _look(self, stage: Stage) -> RehearsedStage:
        """The stage before it is cut short."""
        assert self.task is not None
        read = {part.name: part.streams for part in (stage, *stage.companions)}
        lead = leading(stage)
        new = old = 0
        balanced = False
        if lead is not None:
            fresh = torch.tensor([part is self.task.examples for part in lead.parts])
            counts = taken(lead)
            new, old = int(counts[fresh].sum()), int(counts[~fresh].sum())
            balanced = isinstance(lead.subset, Tensor) and 0 < new < len(self.task.examples)
        return RehearsedStage(
            stage.name,
            stage.recipe.epochs,
            lead.batch_size if lead is not None else 1,
            new / max(1, len(self.task.examples)),
            old / max(1, len(self.parts.memory)),
            balanced,
            {companion.name: companion.steps for companion in stage.companions},
            {name: sum(s.batch_size for s in streams) for name, streams in read.items()},
            {
                name: sum(min(len(s), s.batch_size) for s in streams)
                for name, streams in read.items()
            },
        )


def _task(plan: Plan, parts: Parts, number: int) -> Task:
    """A task of the run with a few of its images, labelled in learning order."""
    arrival = plan.scenario.arrivals[number]
    small = parts.augmentation.size <= _SMALL
    wanted = 256 if parts.device.type == "cuda" else 128 if small else 32
    wanted = min(wanted, plan.settings.engine.batch_size or wanted)
    per_class = max(_KEPT + 1, -(-wanted // len(arrival.classes)))
    first = Arrival(arrival.classes, few(plan.dataset.train, arrival, per_class))
    return plan.scenario.task(number, plan.dataset.train, parts.memory.examples(), first)


def few(examples: Examples, arrival: Arrival, per_class: int) -> Tensor:
    """Positions of the first images of each class that arrives, ascending, int64.

    Args:
        examples: All training images.
        arrival: Which classes, and which of their images.
        per_class: How many of each; all of a class that has fewer.
    """
    index = positions(examples, arrival)
    return index[rank_in_class(examples.labels.cpu()[index]) < per_class]
