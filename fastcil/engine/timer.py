"""When something is due that all ranks do together, by the clock of the first."""

from __future__ import annotations

import time

from fastcil.nn.ranks import current


class Timer:
    """Says to all ranks alike that a time has passed.

    What takes long on one rank, such as writing a checkpoint, the others must wait for outside of
    a collective, which would give up; so they must know that it begins, and clocks differ. Asked
    between any two steps, ranks ask the first one only now and then: next when half of what is left
    will have passed, going by how often they were asked so far.

    Args:
        seconds: The time.

    Example:
        >>> Timer(0.0).is_due(), Timer(60.0).is_due()
        (True, False)
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Begins anew, on all ranks."""
        self._began = self._met = time.monotonic()
        self._asked, self._next = 0, 1

    def is_due(self) -> bool:
        """Whether the time has passed; every rank asks as often as the others."""
        self._asked += 1
        if self._asked < self._next:
            return False
        now, ranks = time.monotonic(), current()
        left = self.seconds - (now - self._began)
        if ranks.size == 1:
            return left <= 0
        each = max(1e-6, (now - self._met) / self._asked)
        self._next = int(ranks.texts(str(max(1, int(left / 2 / each)) if left > 0 else 0))[0])
        self._met, self._asked = now, 0
        return self._next == 0
