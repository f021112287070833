"""What a run tells while it goes: one call per event, any number of listeners."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Listener = Callable[[str, dict[str, Any]], None]
"""Called with an event's name and its fields (plain numbers and strings)."""


def broadcast(listeners: Sequence[Listener]) -> Listener:
    """One listener that passes events on to several."""

    def tell(event: str, fields: dict[str, Any]) -> None:
        for listener in listeners:
            listener(event, fields)

    return tell


class JsonLines:
    """Appends every event but ``step`` to a file, one JSON object a line.

    Each line carries ``event`` and ``time`` (seconds since the epoch). A resumed run appends to
    the same file; what was done twice stands there twice.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        """Writes one line."""
        if event == "step":
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields})
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


class TensorBoard:
    """Writes losses, learning rates and accuracies as TensorBoard scalars (an extra)."""

    def __init__(self, path: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path))
        self._task = 0

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        """Writes the event's scalars; what a resume repeats falls on the same places."""
        if event == "task":
            self._task = fields["task"]
        elif event == "epoch":
            stage, epoch = f"task {self._task + 1}/{fields['stage']}", fields["epoch"] + 1
            for name, value in fields["losses"].items():
                self._writer.add_scalar(f"{stage}/{name}", value, epoch)
            self._writer.add_scalar(f"{stage}/lr", fields["lr"], epoch)
            self._writer.add_scalar(f"{stage}/images_per_second", fields["rate"], epoch)
        elif event == "evaluated":
            for name, value in fields["accuracy"].items():
                self._writer.add_scalar(f"accuracy/{name}", value, fields["task"])
            self._writer.flush()
