"""How much memory there is left, on a device and beside it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from fastcil.nn.ranks import current

_SPARE = 4  # of what is free, one part of so many may be taken by what can be computed anew


def spare(device: torch.device) -> int:
    """Bytes that may be taken for what is kept only to save time, the same on every rank.

    Example:
        >>> 0 < spare(torch.device("cpu")) < host_free()
        True
    """
    free = device_free(device)
    mine = own_share(host_free()) if free is None else free
    return min(map(int, current().texts(str(mine // _SPARE))))


def own_share(nbytes: int) -> int:
    """A process's share of a machine's memory, where torchrun started several there."""
    return nbytes // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_free(device: torch.device) -> int | None:
    """Bytes free on a CUDA device, those that torch holds unused among them; None on another kind.

    Example:
        >>> device_free(torch.device("cpu")) is None
        True
    """
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def host_free() -> int:
    """Bytes of memory that can be had without swapping, by /proc/meminfo and the container's limit.

    Example:
        >>> host_free() > 0
        True
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):  # another system than Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    held = group_free(Path("/sys/fs/cgroup"))
    return free if held is None else min(free, held)


def group_free(root: Path) -> int | None:
    """Bytes that a container may still take by its control group, or None if it has no limit.

    Args:
        root: Where control groups are mounted; in a container, its own lies there.

    Example:
        >>> group_free(Path("nowhere")) is None
        True
    """
    for limit, used, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        # Where there is no limit there is no such file, or "max" in it.
        with suppress(OSError, ValueError):
            whole, taken = (int((root / name).read_text()) for name in (limit, used))
            parts = dict(line.split() for line in (root / stat).read_text().splitlines())
            # Files' pages that are not in use are given back when memory is asked for.
            return max(0, whole - taken + int(parts.get(cached, 0)))
    return None
