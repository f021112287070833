"""What every script for a GPU ends with: a short table, and JSON with device, versions, commit."""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping
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


def run_parts(
    script: str,
    parts: Mapping[str, Callable[[], list[dict[str, Any]]]],
    given: argparse.Namespace,
) -> None:
    """Runs the parts of a script, keeping the rows so far after each, and prints them as a table.

    A part that fails is named at the end, and the others run: time on a GPU may be short.

    Args:
        script: Name of the script's file.
        parts: What is measured -> what gives its rows.
        given: What `arguments` gave.

    Raises:
        SystemExit: A part failed; its traceback was printed.
    """
    rows: list[dict[str, Any]] = []
    failed = []
    for name, part in parts.items():
        try:
            rows += part()
        except Exception:
            traceback.print_exc()
            failed.append(name)
        else:
            path = keep(script, rows, given)
            print(f"{name}: kept in {path}", flush=True)
    if rows:
        show(rows)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; their tracebacks are above.")


def show(rows: list[dict[str, Any]]) -> None:
    """Prints rows, title -> value, as a table."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    cells = [titles, *([_shown(row.get(title)) for title in titles] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def keep(script: str, rows: list[dict[str, Any]], given: argparse.Namespace) -> Path:
    """Writes rows, with where they come from.

    Args:
        script: Name of the script's file.
        rows: Title -> value, alike in all.
        given: What `arguments` gave.

    Returns:
        The JSON's path.
    """
    facts = environment(given.device)
    facts = {name: facts[name] for name in FACTS}
    device = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    name = re.sub(r"[^a-z0-9]+", "-", f"{Path(script).stem} {device}".lower()).strip("-")
    path: Path = given.out / f"{name}.json"
    command = " ".join([Path(script).name, *sys.argv[1:]])
    content = {"command": command, "environment": facts, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
