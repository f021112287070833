"""What is timed: an op on a certain input, ours beside other ways to the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2
import torch

OURS = "fastcil"
Step = Callable[[], Any]


@dataclass(frozen=True)
class Group:
    """Cases whose ratios are taken together.

    Attributes:
        name: What they have in common.
        peers: Ways of which the fastest in each case counts.
        aim: What the geometric mean of its time in times of ours should be at least.
    """

    name: str
    peers: tuple[str, ...]
    aim: float


@dataclass(frozen=True)
class OpCase:
    """One input of an op.

    Attributes:
        op: Its name in ``fastcil.ops``, or that of what is timed.
        name: What is done, and to what.
        ways: Names of what is timed, `OURS` first.
        make: The named way as a step to time, of full or of small size; its result has been
            compared with the truth by then (AssertionError where it is wrong). None where the way
            cannot be had here.
        threads: How many threads each way may use.
        aims: How many times as long as ours another way should take at least.
        most_ms: How many milliseconds ours should take at most.
        device: Where it is timed, "cpu" or "cuda".
        note: How ours does it, to be shown behind the name.
        group: Which it belongs to.
    """

    op: str
    name: str
    ways: tuple[str, ...]
    make: Callable[[str, bool], Step | None]
    threads: int = 2
    aims: Mapping[str, float] = field(default_factory=dict)
    most_ms: float | None = None
    device: str = "cpu"
    note: Callable[[], str] | None = None
    group: Group | None = None

    def __str__(self) -> str:
        return f"{self.op}, {self.name}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Both libraries that have threads of their own use so many within it."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(count)
    cv2.setNumThreads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
