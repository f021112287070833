"""What the parts of an epoch take, measured without a wait for the device."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class Laps:
    """Times between marks: the host's, or on CUDA those of the device's stream.

    Args:
        device: Where the work is done.

    Example:
        >>> laps = Laps(torch.device("cpu"))
        >>> for _ in range(3):
        ...     laps.mark()
        >>> len(laps.seconds())
        2
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Ends a lap and begins the next."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The laps so far; on CUDA it waits until the device has come to the last mark."""
        pairs = pairwise(self._marks)
        if self._cuda:
            self._marks[-1].synchronize()
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]
