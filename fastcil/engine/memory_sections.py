"""The report's sections on memory: what it holds, how that looks, what methods left to show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastcil.engine.compare import Comparison
from fastcil.engine.gallery import TITLE
from fastcil.engine.markup import Html, details, format_bytes, image, plot, table, tag
from fastcil.engine.plots import held_amounts, plot_exemplars, plot_memory, plot_record
from fastcil.engine.result import Result
from fastcil.engine.sections import method_name
from fastcil.errors import FastcilError
from fastcil.memory import Budget

_SUMS = ("budgeted", "all")
_WORKING = {"working_bytes": "working_bytes: exemplars decoded for training, not kept"}
_HELD = "Left: the seed that holds most. Right: mean over seeds."
_READING = f"{_HELD} Methods that hold the same lie on one line."


def memory_section(comparison: Comparison) -> Html:
    """Bytes against the limit, exemplars of each class, and every entry."""
    results = comparison.results
    rows = [row for method in results for row in _entries(comparison, method)]
    columns = ["", "bytes", "counted by the budget", "limit", "most used at any task", "in all"]
    return Html(
        tag("div", plot(plot_memory(results), "Held after each task"), class_="plots")
        + tag("p", _READING if len(results) > 1 else _HELD, class_="note")
        + tag("h3", "Exemplars of each class, after the last task")
        + tag("div", plot(plot_exemplars(results), "Exemplars of each class"), class_="plots")
        + tag("h3", "Every entry, after the last task")
        + table(columns, rows)
        + tag(
            "p",
            "Summed from the buffers themselves, of the seed that holds most. In all: with "
            "networks beyond the first and curvature, which a budget counts only if it says so.",
            class_="note",
        )
    )


def _entries(comparison: Comparison, method: str) -> list[list[Any]]:
    """A method's row, and one for each of its entries."""
    result = comparison.results[method]
    unit = Budget.parse(result.config["memory"]).unit
    last = max((o.tasks[-1] for o in result.outcomes), key=lambda task: task.nbytes["budgeted"])
    limit = "none"
    if last.limit is not None:
        limit = format_bytes(last.limit) if unit == "bytes" else f"{last.limit:,.0f} raw images"
    counted, everything = (f"{last.nbytes[name]:,}" for name in _SUMS)
    head = [method_name(comparison, method), "", counted, limit, _most_used(result, unit)]
    entries = [
        [tag("span", _WORKING.get(name, name), class_="sub"), f"{count:,}", "", "", "", ""]
        for name, count in last.nbytes.items()
        if name not in _SUMS
    ]
    return [[*head, everything], *entries]


def _most_used(result: Result, unit: str) -> str:
    """The largest share of the limit held at any task boundary of any seed."""
    held = held_amounts(result, unit).max(0)
    pairs = zip(held, (task.limit for task in result.outcomes[0].tasks), strict=True)
    shares = [amount / limit for amount, limit in pairs if limit]
    # Rounded down: 100 % must mean that the budget was kept.
    return f"{int(max(shares) * 1000 + 1e-6) / 10:.1f} %" if shares else "–"


def gallery_section(comparison: Comparison) -> Html:
    """Exemplars beside their originals; open for the first method that compresses them."""
    found = {}
    for method, result in comparison.results.items():
        records = [r for task in result.outcomes[0].tasks for r in task.records if is_gallery(r)]
        shares = [s for r in records for s in r["payload"].get("shares", [])]
        if shares:
            found[method] = records, sum(shares) / len(shares)
    if not found:
        return Html()
    smallest = [m for m, (_, share) in found.items() if share < 1] or list(found)
    note = (
        "Left: the original, with the box that is kept at full resolution where there is one. "
        "Right: the same image as memory remembers it. Bytes are those of the exemplar and of the "
        "raw image, both with their metadata; a few per task, of the first seed, as thumbnails."
    )
    parts = [tag("p", note, class_="note")]
    for method, (records, share) in found.items():
        kept = "kept raw" if share >= 1 else f"{100 * share:.0f} % of the raw bytes"
        shown = [part for r in records for part in (tag("h3", r["title"]), _pictures(r["payload"]))]
        parts.append(details(f"{method}: {kept}", *shown, shown=method == smallest[0]))
    return Html("".join(parts))


def is_gallery(record: Mapping[str, Any]) -> bool:
    """Whether a record was made by `fastcil.engine.gallery`."""
    return bool(record["kind"] == "images" and record["title"].startswith(TITLE))


def records_section(comparison: Comparison) -> Html:
    """What methods and addons left for the report: of each title the last, of the first seed."""
    parts: list[Html] = []
    for method, result in comparison.results.items():
        latest = {
            record["title"]: record
            for task in result.outcomes[0].tasks
            for record in task.records
            if not is_gallery(record)
        }
        if not latest:
            continue
        plots, others = [], []
        for name, record in latest.items():
            shown = show_record(record, f"{method}: {name}")
            if record["kind"] in ("curve", "matrix", "scatter"):
                plots.append(shown)
            else:
                others += [tag("h3", name), shown]
        content = [tag("div", *plots, class_="plots"), *others] if plots else others
        parts.append(details(method, *content, shown=not parts))
    return Html("".join(parts))


def show_record(record: Mapping[str, Any], description: str) -> Html:
    """A record as HTML; one that is not of its kind's form says so, and the report goes on.

    Args:
        record: In the plain form that results hold.
        description: What a screen reader says of a plot.
    """
    payload = record["payload"]
    try:
        if record["kind"] == "images":
            return _pictures(payload)
        if record["kind"] == "table":
            return table(payload["columns"], payload["rows"])
        return plot(plot_record(record), description, record["title"])
    except (FastcilError, KeyError, TypeError) as error:
        return tag("p", f"{record['title']} can't be shown: {error}", class_="note")


def _pictures(payload: Mapping[str, Any]) -> Html:
    """Images and their captions."""
    captions = payload.get("captions") or [""] * len(payload["images"])
    figures = [
        tag("figure", image(source, caption), tag("figcaption", caption))
        for source, caption in zip(payload["images"], captions, strict=False)
    ]
    return tag("div", *figures, class_="pictures")
