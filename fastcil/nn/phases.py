"""Named stretches of a run's time, which a profiler's trace shows and a clock adds up."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

import torch
from torch.autograd.profiler import record_function

PHASES = (
    "data",
    "forward",
    "backward",
    "optimiser",
    "addon",
    "memory update",
    "evaluation",
)
OTHER = "other"
_PREFIX = "fastcil: "

_clock: PhaseClock | None = None


class phase:
    """A stretch of a run, by name; costs next to nothing while nobody measures.

    Under a torch profiler it is a range in the trace, and a `PhaseClock` counts its time. Phases
    may lie within each other: time counts for the innermost, but within ``addon``, which takes all
    of it.

    Args:
        name: One of `PHASES`.
        when: Whether it is one at all.

    Example:
        >>> with PhaseClock() as clock, phase("forward"):
        ...     with phase("backward"):
        ...         pass
        >>> list(clock.seconds())
        ['other', 'forward', 'backward']
    """

    __slots__ = ("_clock", "_name", "_range")

    def __init__(self, name: str, when: bool = True) -> None:
        self._name = name if when else None
        self._clock: PhaseClock | None = None
        self._range: Any = None

    def __enter__(self) -> None:
        if self._name is None:
            return
        if torch.autograd._profiler_enabled():
            self._range = record_function(_PREFIX + self._name)
            self._range.__enter__()
        if _clock is not None and _clock.thread == threading.get_ident():
            self._clock = _clock
            _clock.enter(self._name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._clock is not None:
            self._clock.leave()
        if self._range is not None:
            self._range.__exit__(kind, error, trace)


class PhaseClock:
    """Adds up the time of each phase of this thread while it is entered.

    On CUDA the time is that of the device's stream, between events, without waiting for it: what
    the stream waits for the host counts for the phase the host is in.

    Args:
        device: Where the work is done.

    Example:
        >>> with PhaseClock() as clock:
        ...     with phase("data"):
        ...         time.sleep(0.01)
        >>> clock.seconds()["data"] >= 0.01
        True
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.thread = threading.get_ident()
        self._within: list[str] = []
        self._sums: dict[str, float] = {}
        self._spans: list[tuple[str, Any, Any]] = []
        self._last: Any = None
        self._before: PhaseClock | None = None

    def __enter__(self) -> PhaseClock:
        global _clock
        self._before, _clock = _clock, self
        self._last = self._mark()
        return self

    def __exit__(self, *_: object) -> None:
        global _clock
        self._count()
        _clock = self._before

    def enter(self, name: str) -> None:
        """A phase begins; see `phase`."""
        self._count()
        self._within.append(name)

    def leave(self) -> None:
        """The innermost phase ends."""
        self._count()
        self._within.pop()

    def reset(self) -> None:
        """Forgets what was added up; phases that are under way go on."""
        self._sums, self._spans = {}, []
        self._last = self._mark()

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, ``other`` for what is in none; waits for the device, once."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            for name, start, end in self._spans:
                self._sums[name] = self._sums.get(name, 0.0) + start.elapsed_time(end) / 1e3
            self._spans = []
        return dict(self._sums)

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _count(self) -> None:
        """Gives what has passed since the last change to the phase that it was spent in."""
        name = "addon" if "addon" in self._within else self._within[-1] if self._within else OTHER
        now = self._mark()
        if self._device.type == "cuda":
            self._spans.append((name, self._last, now))
        else:
            self._sums[name] = self._sums.get(name, 0.0) + now - self._last
        self._last = now
