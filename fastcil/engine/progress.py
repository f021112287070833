"""Progress on the terminal: rates, time left, accuracies as they come."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastcil.engine.epoch_choice import RULES
from fastcil.engine.events import Listener


class TerminalProgress:
    """Shows a bar per stage on a terminal, and a line per stage and task anywhere else."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._bar: Any = None
        self._task = ""
        self._run = ""
        self._per_epoch = 1
        self._rate = ""

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        """Shows an event; events it does not know are passed over."""
        show = getattr(self, f"_on_{event}", None)
        if show is not None:
            show(fields)

    def _on_run(self, fields: dict[str, Any]) -> None:
        # A label may hold what would be markup.
        self._run = escape(str(fields.get("called", fields["method"])))

    def _on_task(self, fields: dict[str, Any]) -> None:
        self._task = f"{self._run} task {fields['task'] + 1}/{fields['tasks']}"

    def _on_resumed(self, fields: dict[str, Any]) -> None:
        self._console.print(f"resumed in task {fields['task'] + 1} from {fields['path']}")

    def _on_stage(self, fields: dict[str, Any]) -> None:
        self._close()
        self._per_epoch = max(1, fields["steps"])
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("epochs  {task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
            self._bar = self._progress.add_task(
                f"{self._task} {fields['stage']}", total=fields["epochs"], rate=""
            )

    def _on_epoch(self, fields: dict[str, Any]) -> None:
        self._rate = f"{fields['rate']:,.0f} images/s"
        if self._progress is not None:
            self._progress.update(self._bar, completed=fields["epoch"] + 1, rate=self._rate)
        if fields["epoch"] + 1 == fields["epochs"]:
            self._close()
            losses = ", ".join(f"{name} {value:.3f}" for name, value in fields["losses"].items())
            shares = "".join(
                f", {name} {share:.0%} of the epoch"
                for name, share in fields.get("shares", {}).items()
            )
            once = fields.get("recalled", 0)
            if once:
                shares += f", {once} frozen extractor{'s' * (once > 1)} looked once at each image"
            self._console.print(
                f"{self._task} {fields['stage']}: {fields['epochs']} epochs, {losses}, "
                f"{self._rate}{shares}",
                highlight=False,
                soft_wrap=True,
            )

    def _on_chosen(self, fields: dict[str, Any]) -> None:
        old = "" if fields["old"] is None else f", old classes {fields['old']:.1f} %"
        self._console.print(
            f"{self._task} {fields['stage']}: epoch {fields['epoch'] + 1} of {fields['epochs']} "
            f"chosen on {RULES[fields['rule']]}: new classes {fields['new']:.1f} %{old}",
            highlight=False,
            soft_wrap=True,
        )

    def _on_shared(self, fields: dict[str, Any]) -> None:
        self._console.print(f"{self._task}: as {fields['first_task']} trained it")

    def _on_evaluated(self, fields: dict[str, Any]) -> None:
        self._close()
        accuracies = ", ".join(
            f"{name} {value:.1f} %" for name, value in fields["accuracy"].items()
        )
        self._console.print(
            f"{self._task}: {accuracies} on {fields['classes']} classes; "
            f"{fields['exemplars']} exemplars, {fields['nbytes']:,} bytes",
            highlight=False,
            soft_wrap=True,
        )

    def _on_finished(self, _: dict[str, Any]) -> None:
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _silent(event: str, fields: dict[str, Any]) -> None:
    """Shows nothing."""


def make_progress(enabled: bool) -> Listener:
    """A listener that shows progress, or one that shows nothing."""
    return TerminalProgress() if enabled else _silent
