"""What a figure was measured with: device, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch

import fastcil
from fastcil.cores import usable_cores
from fastcil.engine.resolve import pick_device
from fastcil.nn.ranks import current
from fastcil.ops import extension_available


def environment(device: str) -> dict[str, Any]:
    """Versions, device and commit, for result files.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``: what the run was asked to use.
    """
    place = pick_device(device)
    return {
        "fastcil": fastcil.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        **({"ranks": current().size} if current().size > 1 else {}),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "extension": extension_available(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def together(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The environment of figures that several gave: what differs is named one after the other.

    Args:
        found: Of the sittings of a run, or of its seeds; the command is that of the first.

    Example:
        >>> old, new = ({"commit": c, "command": f"fastcil {c}"} for c in ("aaaa", "bbbb"))
        >>> together([old, old, new])
        {'commit': 'aaaa, then bbbb', 'command': 'fastcil aaaa'}
    """
    made = dict(found[0])
    for name in dict.fromkeys(name for facts in found for name in facts if name != "command"):
        values = list(dict.fromkeys(facts.get(name) for facts in found))
        if len(values) > 1:
            made[name] = ", then ".join(map(str, values))
    return made


@cache
def _commit() -> str | None:
    """The commit of the working tree fastcil was imported from, with + if it was changed.

    As it was when first asked: later commits are not what this process imported. Where a tree
    travelled without its repository, ``FASTCIL_COMMIT`` may say.
    """
    root = Path(fastcil.__file__).parent.parent
    if not (root / ".git").exists():
        return os.environ.get("FASTCIL_COMMIT")
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _processor() -> str:
    """The CPU's name and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {len(usable_cores())} cores, {torch.backends.cpu.get_cpu_capability()}"
