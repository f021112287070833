"""The processor's cores."""

from __future__ import annotations

import os


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use, which may be fewer than there are.

    Example:
        >>> len(usable_cores()) >= 1
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
