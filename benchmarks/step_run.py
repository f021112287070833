"""Times whole steps and epochs, beside peers' where their folders are given, and keeps the figures.

python benchmarks/step_run.py time [--data cifar100] [--pycil FOLDER] [--mammoth FOLDER]
    [--photos caltech101-50c.tar]
python benchmarks/step_run.py table                                             # -> README.md

Epochs of all ways are timed in turn, round after round, in one process, and ratios are of medians;
steps are those of the main stage of the second task: in FOSTER's, the boosting stage.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import growth
import step_sections
import torch
from step_table import with_table

from fastcil.engine.environment import environment
from fastcil.engine.state import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "steps"
FACTS = ("fastcil", "python", "torch", "numpy", "processor", "device")
SECTIONS = ("peers", "mammoth", "memory", "methods", "growth", "photos", "ranks")


def file_of(facts: dict[str, Any]) -> Path:
    """Where the figures of this device are kept."""
    name = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def keep(path: Path, section: str, rows: Any, facts: dict[str, Any], command: str) -> None:
    """Writes a section, with the commit that gave it; others stay if the surroundings are alike."""
    plain = {name: facts[name] for name in FACTS}
    content: dict[str, Any] = {"environment": plain, "sections": {}}
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["environment"] == plain:
            content = old
    content["sections"][section] = {
        "command": command,
        "commit": facts["commit"],
        "threads": facts["threads"],
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def time_all(arguments: argparse.Namespace) -> None:
    """Times the sections asked for, and keeps each as it is done."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = environment(arguments.device)
    path = arguments.out or file_of(facts)
    shown = "make bench-steps"
    shown += " PYCIL=..." if arguments.pycil else ""
    shown += " MAMMOTH=..." if arguments.mammoth else ""
    only = list(filter(None, arguments.only.split(","))) or SECTIONS
    if unknown := sorted(set(only) - set(SECTIONS)):
        raise SystemExit(f"--only names {', '.join(unknown)}; there are {', '.join(SECTIONS)}.")
    makers: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "peers": lambda: step_sections.peers(arguments),
        "mammoth": lambda: step_sections.mammoths(arguments),
        "memory": lambda: step_sections.memory(arguments),
        "methods": lambda: step_sections.methods(arguments),
        "growth": lambda: (
            growth.row(
                method, step_sections.stream(arguments), arguments.device, 3, arguments.tasks
            )
            for method in growth.METHODS
        ),
        "photos": lambda: step_sections.photos(arguments),
        "ranks": lambda: step_sections.shared(arguments),
    }
    for section in only:
        rows: list[dict[str, Any]] = []
        for row in makers[section]():
            rows.append(row)
            keep(path, section, rows, facts, shown)
            print(section, json.dumps(row), flush=True)
        torch.compiler.reset()
    print(path)


def main() -> None:
    """Runs one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    timer = commands.add_parser("time", help="time steps and epochs and keep the figures")
    timer.add_argument("--data", default="cifar100", help="CIFAR-100, as fastcil train takes it")
    timer.add_argument("--photos", default="", help="photos, a tar or a folder; none: left out")
    timer.add_argument("--pycil", type=Path, default=None, help="a checkout of PyCIL")
    timer.add_argument("--mammoth", type=Path, default=None, help="a checkout of Mammoth")
    timer.add_argument("--device", default="cpu")
    timer.add_argument("--threads", type=int, default=2)
    timer.add_argument("--only", default="", help="sections, separated by commas")
    timer.add_argument("--rounds", type=int, default=3)
    timer.add_argument("--steps", type=int, default=16, help="of an epoch beside PyCIL's")
    timer.add_argument("--tasks", type=int, default=20, help="of growth")
    timer.add_argument("--processes", default="1,2", help="that share a run, of each in turn")
    timer.add_argument("--epochs", type=float, default=0.05, help="of the published, such a run's")
    timer.add_argument("--batch", type=int, default=128)
    timer.add_argument("--peers", default="foster,icarl,der", help="methods of PyCIL timed")
    timer.add_argument("--methods", default=",".join(step_sections.METHODS))
    timer.add_argument("--compiled", default="", help="methods to compile; all on CUDA")
    timer.add_argument("--out", type=Path, default=None)
    commands.add_parser("table", help="write the kept figures into README.md")
    arguments = parser.parse_args()
    if arguments.command == "time":
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the peers' workers
        time_all(arguments)
        return
    readme = ROOT / "README.md"
    files = sorted(RESULTS.glob("*.json"))
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    write_atomically(readme, with_table(readme.read_text(encoding="utf-8"), contents).encode())


if __name__ == "__main__":
    main()
