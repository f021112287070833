"""The same run by one process and by more: what is learned, and how long it takes.

Each process computes with one thread, or has a GPU of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "method": "foster",
    "scenario": "lfs-2",
    "memory": "200 images",
    "augment.policy": "none",  # which so short a run has no time to learn through
    "seeds": "0",
    "engine.threads": "1",
    "engine.progress": "false",
}


def rows(
    counts: list[int], data: str, device: str, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Runs by so many processes each.

    Args:
        counts: Numbers of processes; on GPUs those that the machine has GPUs for are run.
        data: As ``fastcil train`` takes it.
        device: ``cpu`` or ``cuda``.
        options: Further ones, by their dotted names.

    Yields:
        Number of processes, average and last accuracy in percent, seconds of learning and
        evaluation, and the efficiency: seconds of the first run's processes by those of this one's.
    """
    first = None
    for count in counts:
        if device != "cpu" and count > torch.cuda.device_count():
            continue
        summary = learn(count, {**SETTINGS, "data": data, "device": device, **options})
        spent = count * summary["seconds"]
        first = first or spent
        yield {
            "processes": count,
            "average": round(summary["average_accuracy"], 2),
            "last": round(summary["last_accuracy"], 2),
            "seconds": round(summary["seconds"], 1),
            "efficiency": round(first / spent, 3),
        }


def learn(count: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a run by so many processes."""
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={count}", "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        told = [f"--{name}={value}" for name, value in settings.items()]
        subprocess.run(
            [
                *(sys.executable, *(start if count > 1 else [])),
                *("-m", "fastcil", "train", *told, f"--run_dir={folder}/run"),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        result = json.loads(Path(folder, "run", "result.json").read_text(encoding="utf-8"))
    summary: dict[str, Any] = result["summary"]
    return summary


def python_path() -> str:
    """Where this checkout's package is found, before what else the user named."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
