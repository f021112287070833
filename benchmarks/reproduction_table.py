"""The Markdown table of a kept comparison: its rows, what is to be said of them, where they ran."""

from __future__ import annotations

from typing import Any

from fastcil.engine.compare import SESSION_MEASURES, Row

MEASURES = ("average", "last", "bwt")
COLUMNS = ("method", "average", "last", "BWT", "FWT", "difference", "exemplars", "bytes")
COLUMNS += ("with networks", "time")


def table(content: dict[str, Any]) -> str:
    """The Markdown table of a kept comparison, and a line that says where it comes from."""
    rows = [Row(**row) for row in content["rows"]]
    measures = [measure for measure in MEASURES if measure in rows[0].measures]
    transfer = any(row.transfer for row in rows)
    told = {"BWT": "bwt" in measures, "FWT": transfer}
    columns = [column for column in COLUMNS if told.get(column, True)]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    seen: set[str] = set()
    for row in rows:
        first = row.method not in seen
        seen.add(row.method)
        cells = [
            f"`{row.method}`" if first else f"&emsp;{row.readout}",
            *(plus_minus(*row.measures[measure]) for measure in measures),
            *[plus_minus(*row.transfer) if row.transfer else ""] * transfer,
            plus_minus(*row.differences["average"], sign=True) if row.differences else "",
        ]
        if first:
            cells += [f"{row.exemplars:,.0f}", f"{row.nbytes:,}", f"{row.all_nbytes:,}"]
            cells.append(_time(row.seconds))
        cells += [""] * (len(columns) - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    if rows[0].sessions:
        lines += ["", *_sessions(rows, content["curves"])]
    if content.get("notes"):
        lines += ["", " ".join(content["notes"])]
    if poor := _poor(content):
        lines += ["", f"First tasks below three times chance, which say nothing: {poor}."]
    if content.get("missing"):
        lines += ["", f"Seeds that have not been run yet: {_lacking(content)}."]
    where = "; ".join([f"`{content['command']}`", *_places(content["environments"])]) + "."
    return "\n".join([*lines, "", where])


def plus_minus(mean: float, half: float | None, sign: bool = False) -> str:
    """A mean and half of its 95 % interval, if there are seeds enough for one."""
    text = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    return text if half is None else f"{text} ± {half:.1f}"


def _lacking(content: dict[str, Any]) -> str:
    """The seeds that are missing, once where all methods lack the same."""
    missing = content["missing"]
    (first, *others) = missing.values()
    if len(missing) == len(content["config"]["methods"]) and all(s == first for s in others):
        return f"{', '.join(map(str, first))} of every row"
    return ", ".join(f"`{method}` {seeds}" for method, seeds in missing.items())


def _poor(content: dict[str, Any]) -> str:
    """Methods that hardly learned the first task, and how well, in the mean of their seeds."""
    found = []
    for method, chance in content.get("chance", {}).items():
        learned = content["first_task"][method][0]  # later entries: what was left of it
        if learned < 3 * chance <= 100:
            found.append(f"`{method}` {learned:.1f} % (chance {chance:.1f} %)")
    return ", ".join(found)


def _sessions(rows: list[Row], curves: dict[str, Any]) -> list[str]:
    """The lines of a table of few-shot sessions: accuracy after each, and what came of the last."""
    count = len(next(iter(curves.values()))[rows[0].readout])
    heads = ["after session", *map(str, range(count)), *SESSION_MEASURES.values()]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    own = {row.method: row for row in reversed(rows)}
    for method, row in reversed(own.items()):
        cells = [f"{accuracy:.1f}" for accuracy in curves[method][row.readout]]
        cells += [plus_minus(*row.sessions[measure]) for measure in SESSION_MEASURES]
        lines.append("| " + " | ".join([f"`{method}`", *cells]) + " |")
    return lines


def _places(environments: list[dict[str, Any]]) -> list[str]:
    """Where figures were taken: every machine once, with the commits that ran there."""
    commits: dict[str, list[str]] = {}
    for facts in environments:
        machine = (
            f"{facts['processor']}, {facts['threads']} thread(s), torch {facts['torch']}, "
            f"Python {facts['python']}"
        )
        commits.setdefault(machine, []).extend(facts["commit"].split(", then "))
    return [f"{where}, commit {', '.join(dict.fromkeys(k))}" for where, k in commits.items()]


def _time(seconds: float) -> str:
    """Seconds below two minutes, else h:mm:ss."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
