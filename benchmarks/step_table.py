"""The kept figures of `step_run` as Markdown."""

from __future__ import annotations

import re
from typing import Any

MARKS = ("<!-- steps -->", "<!-- /steps -->")
PHASES = ("data", "forward", "backward", "optimiser", "addon")
_OURS, _THEIRS, _MAMMOTH = "fastcil", "PyCIL", "Mammoth"


def with_table(readme: str, contents: list[dict[str, Any]]) -> str:
    """The README with the kept figures between its marks brought up."""
    start, end = MARKS
    if start not in readme or end not in readme:
        raise SystemExit(f"README.md has no place for the figures: add {start} and {end}.")
    made = "\n\n".join(table(content) for content in contents)
    place = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    return place.sub(lambda _: f"{start}\n{made}\n{end}", readme)


def table(content: dict[str, Any]) -> str:
    """All sections of a device, and a line that says where they come from."""
    makers = {
        "peers": _peers,
        "mammoth": _mammoth,
        "memory": _memory,
        "photos": _photos,
        "methods": _methods,
        "growth": _growth,
        "ranks": _ranks,
    }
    sections = content["sections"]
    made = [makers[name](sections[name]["rows"]) for name in makers if name in sections]
    facts = content["environment"]
    device = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    commits = dict.fromkeys(section["commit"] for section in sections.values())
    commands = dict.fromkeys(section["command"] for section in sections.values())
    threads = dict.fromkeys(str(section["threads"]) for section in sections.values())
    where = (
        f"{', '.join(f'`{c}`' for c in commands)}; {device}, {', '.join(threads)} threads, torch "
        f"{facts['torch']}, Python {facts['python']}, commit {', '.join(map(str, commits))}."
    )
    return "\n\n".join([*made, where])


def _grid(titles: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f}"


def _ways(ways: dict[str, Any], first: str, theirs: str = _THEIRS) -> list[list[str]]:
    base = ways.get(theirs)
    rows = []
    for way, found in ways.items():
        ratio = f"{found['rate'] / base['rate']:.2f}" if base else ""
        rows.append([first, way, f"{found['rate']:,.0f}", ratio, _mib(found["peak"])])
    return rows


def _peers(rows: list[dict[str, Any]]) -> str:
    cells = [cell for row in rows for cell in _ways(row["ways"], f"`{row['method']}`")]
    lines = [_grid(["method", "way", "images/s", "times PyCIL's", "peak, MiB"], cells)]
    read = rows[0]["read"]
    if _THEIRS in read:
        lines.append(
            f"Reading alone: {read[_OURS]:,.0f} images/s, PyCIL's loader {read[_THEIRS]:,.0f}."
        )
    return "\n\n".join(lines)


def _mammoth(rows: list[dict[str, Any]]) -> str:
    cells = [cell for row in rows for cell in _ways(row["ways"], f"`{row['method']}`", _MAMMOTH)]
    return _grid(["method", "way", "images/s", "times Mammoth's", "peak, MiB"], cells)


def _memory(rows: list[dict[str, Any]]) -> str:
    base = next((row["seconds"] for row in rows if row["way"] == _THEIRS), None)
    cells = [
        [
            row["way"],
            f"{row['seconds']:.2f}",
            f"{base / row['seconds']:.1f}" if base else "",
            f"{row['exemplars']:,}",
        ]
        for row in rows
    ]
    return _grid(["memory after a task", "seconds", "PyCIL takes, times", "exemplars"], cells)


def _photos(rows: list[dict[str, Any]]) -> str:
    cells = [cell for row in rows for cell in _ways(row["ways"], "photos at 224, ResNet-18")]
    grid = _grid(["", "way", "images/s", "times PyCIL's", "peak, MiB"], cells)
    read = rows[0]["read"]
    told = ", ".join(f"{way} {rate:,.0f}" for way, rate in read.items())
    return f"{grid}\n\nReading alone, images/s: {told}."


def _methods(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        shares = [f"{row['shares'].get(name, 0.0):.1%}" for name in PHASES]
        first = [f"`{row['method']}`", row["mode"], f"{row['rate']:,.0f}"]
        cells.append([*first, *shares, _mib(row["peak"])])
    return _grid(["method", "mode", "images/s", *PHASES, "peak, MiB"], cells)


def _growth(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        points = row["points"]
        shown = [points[k] for k in (1, len(points) // 2, len(points) - 1)]
        cells.append(
            [
                f"`{row['method']}`",
                *(f"{point['ms']:.0f}" for point in shown),
                f"{row['ms_slope']:+.2f} ({row['ms_slope_share']:+.1%})",
                *(_mib(point["peak"]) for point in (shown[0], shown[-1])),
                f"{points[-1]['trained'] / 1e3:,.0f} of {points[-1]['held'] / 1e3:,.0f}",
            ]
        )
    count = len(rows[0]["points"])
    titles = ["method", *(f"ms, task {k}" for k in (2, count // 2 + 1, count)), "ms a task more"]
    titles += ["peak, MiB, task 2", f"task {count}", "thousand numbers trained, of held"]
    return _grid(titles, cells)


def _ranks(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            str(row["processes"]),
            f"{row['average']:.1f}",
            f"{row['last']:.1f}",
            f"{row['seconds']:.0f}",
            f"{row['efficiency']:.0%}",
        ]
        for row in rows
    ]
    return _grid(
        ["processes that share a run", "average %", "last %", "seconds", "efficiency"], cells
    )
