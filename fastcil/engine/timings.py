"""Where a run's time went, from its event log."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StageTiming:
    """One stage of one task.

    Args:
        task: Number of the task, from 0.
        stage: The stage's name.
        seconds: Of all its epochs, companions included.
        images: Training images read meanwhile.
        companions: What each companion took of ``seconds``, in seconds.
    """

    task: int
    stage: str
    seconds: float
    images: float
    companions: dict[str, float] = field(default_factory=dict)


def read_timings(log: Path) -> list[StageTiming]:
    """What each stage took, in the order of training.

    A run that was stopped and went on has done some epochs twice: the later one counts. Of an
    epoch that went on in the middle only the second part is known. A line that was cut short is
    passed over; without the log there are no timings.

    Args:
        log: ``events.jsonl`` of one seed.

    Example:
        >>> read_timings(Path("no such file"))
        []
    """
    epochs: dict[tuple[int, str, int, int], dict[str, Any]] = {}
    task = 0
    for event in _events(log):
        if event.get("event") == "task":
            task = event["task"]
        elif event.get("event") == "epoch":
            # Two stages of a task may have one name.
            epochs[task, event["stage"], event.get("number", 0), event["epoch"]] = event
    stages: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for (number, stage, _, _), event in epochs.items():
        stages.setdefault((number, stage), []).append(event)
    return [_timing(*key, own) for key, own in stages.items()]


def _timing(task: int, stage: str, epochs: list[dict[str, Any]]) -> StageTiming:
    """What a stage's epochs took together."""
    companions: dict[str, float] = {}
    for event in epochs:
        for name, share in event.get("shares", {}).items():
            companions[name] = companions.get(name, 0.0) + share * event["seconds"]
    seconds = sum(event["seconds"] for event in epochs)
    images = sum(event["seconds"] * event["rate"] for event in epochs)
    return StageTiming(task, stage, seconds, images, companions)


def _events(log: Path) -> list[dict[str, Any]]:
    """The log's whole lines."""
    if not log.is_file():
        return []
    events = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events
