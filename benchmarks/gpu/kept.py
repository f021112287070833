"""What every script for a GPU ends with: a short table, and JSON with device, versions, commit."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from fastcil.engine.environment import environment
from fastcil.engine.state import write_atomically

BENCHMARKS = Path(__file__).parents[1]
FACTS = ("fastcil", "commit", "python", "torch", "numpy", "processor", "device", "threads")


def arguments(what: str, **defaults: Any) -> argparse.Namespace:
    """``--device``, ``--out`` and the given options, each of its default's type.

    Args:
        what: What the script does.
        **defaults: Option -> default.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "gpu")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


def keep(script: str, rows: list[dict[str, Any]], given: argparse.Namespace) -> Path:
    """Prints rows as a table and writes them, with where they come from.

    Args:
        script: Name of the script's file.
        rows: Title -> value, alike in all.
        given: What `arguments` gave.

    Returns:
        The JSON's path.
    """
    titles = list(dict.fromkeys(title for row in rows for title in row))
    cells = [titles, *([_shown(row.get(title)) for title in titles] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    facts = environment(given.device)
    facts = {name: facts[name] for name in FACTS}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    device = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    name = re.sub(r"[^a-z0-9]+", "-", f"{Path(script).stem} {device}".lower()).strip("-")
    path: Path = given.out / f"{name}.json"
    command = " ".join([Path(script).name, *sys.argv[1:]])
    content = {"command": command, "environment": facts, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    print(path)
    return path


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
