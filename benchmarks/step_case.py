"""A run brought to the main stage of its second task, whose epochs are then timed one by one."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastcil.contract import Stage, Task
from fastcil.engine.compiling import compile_alone
from fastcil.engine.lesson import Lesson
from fastcil.engine.online import leading
from fastcil.engine.parts import Parts
from fastcil.engine.placement import place_images
from fastcil.engine.plan import Plan, make_plan
from fastcil.engine.resolve import pick_device
from fastcil.engine.trainer import Trainer
from fastcil.nn.phases import PhaseClock

# Precision, and whether objectives are compiled; networks and batches are channels_last in all.
MODES = {"fp32": ("fp32", False), "bf16": ("bf16", False), "bf16 compiled": ("bf16", True)}
BEST = "bf16 compiled"
_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Work:
    """What is learned, and on what network.

    Attributes:
        name: As tables call it.
        data: What `fastcil.train` takes.
        scenario: New classes in each task.
        memory: Budget of the exemplars.
        batch: Images of a step.
        options: Dotted option names -> values, for augmentation and network.
    """

    name: str
    data: Any
    scenario: str = "b0-inc10"
    memory: str = "2000 images"
    batch: int = 128
    options: dict[str, Any] = field(default_factory=dict)

    def plan(self, method: str, device: str) -> Plan:
        """A run of one seed."""
        plain = {
            "augment.policy": "none",
            "augment.cutout": 0,
            "engine.progress": False,
            "engine.epoch_choice": "last",
            "engine.batch_size": self.batch,
            **self.options,
        }
        plan = make_plan(
            method, self.data, self.scenario, self.memory, None, (0,), device, None, plain
        )
        place_images([plan])
        return plan


@dataclass
class Epoch:
    """What an epoch took.

    Attributes:
        seconds: Of the whole, companions included.
        images: Training images seen in it.
        phases: Phase -> seconds.
        peak: Bytes that were in use at most beyond those before it; None where nobody tells.
    """

    seconds: float
    images: int
    phases: dict[str, float]
    peak: int | None

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds


@dataclass
class _Prepared(Lesson):
    """A lesson whose stages are handed over instead of trained, or are a single step long."""

    def stages_of(self, task: Task) -> list[Stage]:
        """Begins a task; its stages."""
        task = self._begin(self._plan_choice(task))
        self.parts.to_device()
        return self._stages(task)

    def remember(self, task: Task) -> None:
        """Updates memory."""
        self._remember(task)

    def _train(
        self, stages: Sequence[Stage], key: tuple[int, ...], resume: dict[str, Any] | None
    ) -> None:
        for stage in stages:
            shorten(stage, 1)
        super()._train(stages, key, resume)


def shorten(stage: Stage, steps: int) -> None:
    """Leaves a stage one epoch of so many steps, and companions their share of these."""
    lead = leading(stage)
    whole = stage.steps or (lead.steps if lead is not None else 0)
    for part in stage.companions:
        own = leading(part)
        full = part.steps or (own.steps if own is not None else 0)
        part.steps = max(1, round(full * steps / max(1, whole)))
    stage.steps = steps
    stage.recipe = replace(stage.recipe, epochs=min(1, stage.recipe.epochs))


class Run:
    """A run of fastcil in its second task.

    Args:
        method: The composition.
        work: What it learns.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, method: str, work: Work, device: str) -> None:
        self.plan = work.plan(method, device)
        settings = self.plan.settings
        images, place = self.plan.dataset.train.images, pick_device(device)
        self.parts = Parts.for_images(images, settings, self.plan.budget, place, self.plan.backbone)
        self.lesson = _Prepared(self.parts, settings, 0, lambda *_: None)
        self.lesson.run(self._task(0))
        self.parts.method.release()
        self.task = self._task(1)
        stages = self.lesson.stages_of(self.task)
        self.stage = next(stage for stage in stages if stage.primary)
        self._steps = [part.steps for part in self._parts]
        if self.stage.begin is not None:
            self.parts.method.train()
            self.stage.begin()
        self.stage.begin = self.stage.finish = None
        self._compiled = compile_alone(self.stage.objective)

    @property
    def _parts(self) -> list[Any]:
        return [self.stage, *self.stage.companions]

    def _task(self, number: int) -> Task:
        """A task of the run, whole."""
        train, exemplars = self.plan.dataset.train, self.parts.memory.examples()
        return self.plan.scenario.task(number, train, exemplars)

    def epoch(self, steps: int, mode: str = "fp32") -> Epoch:
        """An epoch of so many steps of the main stage, and of its companions in proportion."""
        precision, compiled = MODES[mode]
        self.stage.compiled = self._compiled if compiled else None
        for part, whole in zip(self._parts, self._steps, strict=True):
            part.steps = whole
        shorten(self.stage, steps)
        seen: dict[str, Any] = {}

        def hear(event: str, fields: dict[str, Any]) -> None:
            if event == "epoch":
                seen.update(fields)

        parts = self.parts
        trainer = Trainer(
            parts.method,
            parts.augmentation,
            parts.device,
            (0, 0, 1),
            hear,
            precision=precision,
        )
        clock = PhaseClock(parts.device)
        with peak_of(parts.device) as peak, clock:
            trainer.run([self.stage])
        images = round(seen["rate"] * seen["seconds"])
        return Epoch(seen["seconds"], images, clock.seconds(), peak())

    def extractor_parameters(self) -> int:
        """Parameters of one extractor."""
        return sum(p.numel() for p in self.parts.method.network.extractors[-1].parameters())

    def remember(self, mode: str = "fp32") -> tuple[float, int]:
        """Seconds to update memory after the task, and how many exemplars it then holds."""
        memory = self.parts.memory
        self.parts.context.scanned = None if mode == "fp32" else torch.bfloat16
        before = memory.state()
        synchronise(self.parts.device)
        started = time.perf_counter()
        self.lesson.remember(self.task)
        synchronise(self.parts.device)
        seconds, held = time.perf_counter() - started, len(memory)
        memory.restore(before)
        return seconds, held

    def read(self, steps: int) -> float:
        """Images a second of the loader alone."""
        from fastcil.engine.loader import Loader

        parts = self.parts
        loader = Loader(self.stage.streams, parts.augmentation, parts.device, (0, 0, 1))
        images = 0
        started = time.perf_counter()
        for step in range(steps):
            images += sum(len(batch) for batch in loader.batches(0, step))
        synchronise(parts.device)
        return images / (time.perf_counter() - started)


def synchronise(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_of(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """What is in use at most within it, beyond what was before, in bytes.

    On the CPU the process's resident memory as Linux counts it, after freed memory was given back.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    if not _REFERENCES.exists():
        yield lambda: None
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _REFERENCES.write_text("5")  # Forgets the peak so far.
    held = _resident("VmRSS")
    yield lambda: _resident("VmHWM") - held


def _resident(name: str) -> int:
    """A line of the process's status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0
