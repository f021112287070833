"""What `fastcil.engine.profile` measured, as a table and as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastcil.engine.state import write_atomically
from fastcil.nn.phases import OTHER, PHASES

_IN_STEPS = ("data", "forward", "backward", "optimiser", "addon", OTHER)
_WIDTH = 120


@dataclass
class OpTime:
    """One operator in the traced steps of a stage.

    Args:
        name: The operator's, or the kernel's.
        seconds: By itself, in a step.
        share: Of all operators' time.
        calls: In a step.
    """

    name: str
    seconds: float
    share: float
    calls: float


@dataclass
class LaneProfile:
    """A stage, or one of its companions.

    Args:
        name: The stage's.
        steps: Of an epoch of the real run, or after each of its epochs.
        images: Images of a step.
        seconds: Phase -> seconds of a step.
        ops: Operators that take most of the traced steps.
        trace: Name of the trace's file; None where none was written.
    """

    name: str
    steps: int
    images: int
    seconds: dict[str, float] = field(default_factory=dict)
    ops: list[OpTime] = field(default_factory=list)
    trace: str | None = None

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


@dataclass
class StageProfile:
    """One stage of a task.

    Args:
        name: The stage's.
        epochs: Of the real run.
        lanes: The stage itself, and its companions.
        before: Seconds of what comes before each epoch.
    """

    name: str
    epochs: int
    lanes: list[LaneProfile]
    before: dict[str, float] = field(default_factory=dict)

    def epoch(self) -> dict[str, float]:
        """Phase -> seconds of an epoch of the real run.

        Example:
            >>> lanes = [LaneProfile("main", 10, 8, {"forward": 0.5}),
            ...          LaneProfile("masks", 2, 8, {"addon": 1.0})]
            >>> StageProfile("main", 3, lanes).epoch()
            {'forward': 5.0, 'addon': 2.0}
        """
        sums = dict(self.before)
        for lane in self.lanes:
            for name, seconds in lane.seconds.items():
                sums[name] = sums.get(name, 0.0) + seconds * lane.steps
        return sums


@dataclass
class TaskProfile:
    """One task.

    Args:
        index: Its number, from 0.
        images: New training images.
        tests: Test images it was evaluated on.
        once: Phase -> seconds, of what is done once.
        stages: In order, those that refine exemplars last.
    """

    index: int
    images: int
    tests: int
    once: dict[str, float]
    stages: list[StageProfile]


@dataclass
class Profile:
    """Where the time of a run goes.

    Args:
        config: The run's.
        environment: Device, versions, commit.
        steps: Steps of each stage that were timed.
        traced: Steps of each stage that were traced.
        tasks: What was found.
    """

    config: dict[str, Any]
    environment: dict[str, Any]
    steps: int
    traced: int
    tasks: list[TaskProfile]

    def save(self, folder: Path) -> None:
        """Writes ``profile.json`` and ``profile.txt``, each atomically."""
        write_atomically(folder / "profile.json", json.dumps(asdict(self), indent=1).encode())
        write_atomically(folder / "profile.txt", str(self).encode())

    def __str__(self) -> str:
        console = Console(width=_WIDTH, record=True, file=io.StringIO())
        for task in self.tasks:
            console.print(_phases(self.config["method"], task))
            for stage in task.stages:
                for lane in stage.lanes:
                    if lane.ops:
                        console.print(_ops(task, stage, lane))
        facts = self.environment
        device = facts["processor"] if facts["device"] == "cpu" else facts["device"]
        console.print(
            f"{device}, {facts['threads']} threads, torch {facts['torch']}, commit "
            f"{facts['commit']}; {self.steps} steps of each stage timed, {self.traced} traced.",
            soft_wrap=True,
        )
        return console.export_text()


def _phases(method: str, task: TaskProfile) -> Table:
    """Milliseconds of a step by phase, seconds of an epoch and of what is done once."""
    table = Table(title=f"{method}, task {task.index + 1}: {task.images:,} new images")
    table.add_column("stage")
    for name in (*_IN_STEPS, "ms a step", "images/s", "epoch, s", "addon"):
        table.add_column(name, justify="right")
    for stage in task.stages:
        whole = stage.epoch()
        for place, lane in enumerate(stage.lanes):
            cells = [_milli(lane.seconds.get(name, 0.0)) for name in _IN_STEPS]
            rate = lane.images / lane.step if lane.step else 0.0
            cells += [_milli(lane.step), f"{rate:,.0f}"]
            total = sum(whole.values())
            addon = whole.get("addon", 0.0) / total if total else 0.0
            cells += [f"{total:.1f}", f"{addon:.0%}"] if place == 0 else ["", ""]
            table.add_row(lane.name if place == 0 else f"+ {lane.name}", *cells)
    names = {name: name for name in PHASES} | {OTHER: "what begins and ends stages and tasks"}
    once = ", ".join(f"{n} {task.once[k]:.2f} s" for k, n in names.items() if k in task.once)
    table.caption = f"once: {once}; {task.tests:,} test images"
    return table


def _ops(task: TaskProfile, stage: StageProfile, lane: LaneProfile) -> Table:
    """The operators that take most time."""
    name = stage.name if lane.name == stage.name else f"{stage.name}, {lane.name}"
    table = Table(title=f"task {task.index + 1}, {name}: operators of a traced step")
    table.add_column("operator")
    for title in ("ms", "share", "calls"):
        table.add_column(title, justify="right")
    for op in lane.ops:
        table.add_row(op.name[:70], _milli(op.seconds), f"{op.share:.1%}", f"{op.calls:,.0f}")
    return table


def _milli(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds else ""
