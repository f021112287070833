"""What a step costs as tasks go by: flat with one network, linear where each task adds one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from step_case import Work, peak_of, shorten, synchronise

from fastcil.contract import Stage
from fastcil.engine.lesson import Lesson
from fastcil.engine.parts import Parts
from fastcil.engine.resolve import pick_device

METHODS = ("finetune", "icarl", "foster", "der")
WARM = 2


@dataclass
class Point:
    """A task.

    Attributes:
        ms: Median milliseconds of a step of its main stage.
        peak: Bytes in use at most in the main stage, beyond those before it.
        trained: Numbers that the main stage trains.
        held: Numbers of the method's networks, frozen ones included.
    """

    ms: float
    peak: int | None
    trained: int
    held: int


@dataclass
class _Lesson(Lesson):
    """Stages of a few steps, the main one timed."""

    steps: int = field(kw_only=True)
    taken: list[float] = field(default_factory=list)
    trained: int = 0
    peak: int | None = None
    _main: bool = False
    _last: float = 0.0

    def __post_init__(self) -> None:
        self.tell = self._hear

    def _hear(self, event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            self._main = fields["stage"] in self._primary
            if self._main:
                self.taken, self._use = [], peak_of(self.parts.device)
                self._read = self._use.__enter__()
        if event == "epoch" and self._main:
            self.peak = self._read()
            self._use.__exit__(None, None, None)
        if event in ("stage", "step") and self._main:
            synchronise(self.parts.device)
            now = time.perf_counter()
            if event == "step":
                self.taken.append(now - self._last)
            else:
                self.trained = sum(p.numel() for p in self._primary[fields["stage"]].parameters())
            self._last = now

    def _train(
        self, stages: Sequence[Stage], key: tuple[int, ...], resume: dict[str, Any] | None
    ) -> None:
        self._primary = {stage.name: stage for stage in stages if stage.primary}
        for stage in stages:
            shorten(stage, self.steps + WARM if stage.primary else 1)
        super()._train(stages, key, resume)


def grow(method: str, work: Work, device: str, steps: int, tasks: int = 20) -> list[Point]:
    """Goes through so many tasks, a few steps of each.

    Args:
        method: The composition.
        work: What is learned.
        device: ``cpu`` or ``cuda``.
        steps: Steps of a main stage that are timed.
        tasks: How many tasks.
    """
    plan = work.plan(method, device)
    images, place = plan.dataset.train.images, pick_device(device)
    parts = Parts.for_images(images, plan.settings, plan.budget, place, plan.backbone)
    points = []
    for number in range(min(tasks, len(plan.scenario.arrivals))):
        task = plan.scenario.task(number, plan.dataset.train, parts.memory.examples())
        lesson = _Lesson(parts, plan.settings, 0, lambda *_: None, steps=steps)
        lesson.run(task)
        held = sum(p.numel() for p in parts.method.parameters())
        parts.method.release()
        ms = statistics.median(lesson.taken[WARM:]) * 1e3
        points.append(Point(round(ms, 2), lesson.peak, lesson.trained, held))
    return points


def slope(values: Sequence[float]) -> float:
    """How much a value grows from one task to the next, by least squares over tasks 2 to T."""
    later = list(values)[1:]
    middle = (len(later) - 1) / 2
    spread = sum((k - middle) ** 2 for k in range(len(later)))
    return sum((k - middle) * value for k, value in enumerate(later)) / spread


def row(method: str, work: Work, device: str, steps: int, tasks: int) -> dict[str, Any]:
    """What is kept of a method's growth."""
    points = grow(method, work, device, steps, tasks)
    second = points[1]
    peaks = [point.peak for point in points if point.peak is not None]
    return {
        "method": method,
        "points": [asdict(point) for point in points],
        "ms_slope": round(slope([point.ms for point in points]), 3),
        "ms_slope_share": round(slope([point.ms for point in points]) / second.ms, 4),
        "peak_slope": round(slope(peaks)) if len(peaks) == len(points) else None,
    }
