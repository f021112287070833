"""The report's sections on accuracy, time and set-up; those on memory are in `memory_sections`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fastcil.engine.compare import Comparison, Row
from fastcil.engine.epoch_choice import RULES
from fastcil.engine.finding import exceeds_budget, finding
from fastcil.engine.markup import (
    Html,
    definitions,
    details,
    format_bytes,
    format_figure,
    format_seconds,
    plot,
    table,
    tag,
)
from fastcil.engine.options import flatten
from fastcil.engine.plot_style import method_colour
from fastcil.engine.plots import (
    plot_curves,
    plot_first_task,
    plot_forgetting,
    plot_matrix,
    plot_seconds,
)
from fastcil.engine.result import Result
from fastcil.engine.scenario import without_online
from fastcil.engine.sweeps import find_sweeps, plot_sweep
from fastcil.engine.timings import read_timings

_MEASURES = ("average", "last", "forgetting", "bwt")
_OPEN = 3


def title(comparison: Comparison) -> str:
    """What the page is called: the methods, or how many they are."""
    methods = list(comparison.results)
    return " vs ".join(methods) if len(methods) <= 3 else f"{len(methods)} methods compared"


def header(comparison: Comparison) -> Html:
    """Title, what was run, what came out."""
    result = next(iter(comparison.results.values()))
    tasks = result.outcomes[0].tasks
    facts = {
        "data": result.config["data"],
        "scenario": f"{result.config['scenario']}, {len(tasks)} tasks, "
        f"{sum(task.classes for task in tasks)} classes",
        "memory": ", ".join(comparison.memories),
        "seeds": ", ".join(str(outcome.seed) for outcome in result.outcomes),
        "device": result.environment.get("device", "unknown"),
    }
    rules = {result.epoch_choice for result in comparison.results.values()}
    if rules == {"paper"}:
        facts["epochs"] = f"chosen on {RULES['paper']}"
    shown = [Html(f"{name} {tag('b', value)}") for name, value in facts.items()]
    several = "a comparison at equal memory" if len(comparison.memories) == 1 else "a comparison"
    kind = "a run" if len(comparison.results) == 1 else several
    return Html(
        tag("p", f"fastcil · {kind}", class_="kind")
        + tag("h1", title(comparison))
        + tag("p", Html(" · ".join(shown)), class_="facts")
        + tag("p", finding(comparison), class_="lead")
        + _tiles(comparison)
    )


def _tiles(comparison: Comparison) -> Html:
    """The headline's figures."""
    results = comparison.results
    if len(results) == 1:
        (result,) = results.values()
        tiles = [
            ("average accuracy", f"{result.average_accuracy:.1f} %", "first task included"),
            ("last accuracy", f"{result.last_accuracy:.1f} %", "all classes"),
            ("forgetting", f"{result.forgetting:.1f}", "points per earlier task"),
            ("exemplars", f"{result.exemplars:,.0f}", "after the last task"),
            ("held", format_bytes(result.nbytes), f"of {result.config['memory']}"),
            ("wall time", format_seconds(result.seconds), "per seed"),
        ]
    else:
        named = {comparison.label(m): r for m, r in results.items()}
        fair = {m: r for m, r in named.items() if not exceeds_budget(r)} or named
        tiles = [
            _leaders(
                "highest average accuracy",
                "{:.1f} %",
                {m: r.average_accuracy for m, r in fair.items()},
            ),
            _leaders(
                "highest last accuracy", "{:.1f} %", {m: r.last_accuracy for m, r in fair.items()}
            ),
            _leaders("most exemplars", "{:,.0f}", {m: r.exemplars for m, r in fair.items()}),
        ]
    return tag(
        "div",
        *(
            tag("div", tag("span", name), tag("b", value), tag("span", note), class_="tile")
            for name, value, note in tiles
        ),
        class_="tiles",
    )


def _leaders(name: str, form: str, values: Mapping[str, float]) -> tuple[str, str, str]:
    """The largest value, and every method that has it."""
    largest = max(values.values())
    return name, form.format(largest), ", ".join(m for m, v in values.items() if v == largest)


def method_name(comparison: Comparison, method: str) -> Html:
    """A method with the colour that it has in every plot."""
    colour = method_colour(list(comparison.results).index(method))
    name = tag("b", comparison.label(method))
    return Html(tag("span", class_="dot", style=f"background:{colour}") + name)


def results_section(comparison: Comparison) -> Html:
    """The table of the comparison, and how to read it."""
    rows = comparison.rows()
    several = len(comparison.results) > 1
    columns = ["method", "average %", "last %", "forgetting", "BWT"]
    columns += ["FWT"] if any(row.transfer for row in rows) else []
    columns += ["difference"] if several else []
    columns += ["memory"] if len(comparison.memories) > 1 else []
    columns += ["exemplars", "bytes counted", "bytes in all", "time per seed"]
    seeds = rows[0].seeds
    base = next(iter(comparison.results))
    notes = [
        "Average: mean over tasks, the first included, of the accuracy on all classes known. "
        "Last: accuracy on all classes after the last task. Forgetting: mean over earlier tasks "
        "of the best past accuracy minus the last, in points (Chaudhry et al. 2018). BWT, backward "
        "transfer: mean over the T - 1 earlier tasks of the last accuracy minus that right after "
        "the task (Lopez-Paz and Ranzato 2017); where it is averaged over all T, the last with its "
        "0, it is (T - 1) / T of this.",
        *_transfer_notes(rows),
        *_stream_notes(comparison),
        f"Means over {seeds} seeds; ± is the half-width of the 95 % interval (Student's t)."
        if seeds > 2
        else f"{'One seed' if seeds == 1 else 'Means over two seeds'}: no intervals below three.",
    ]
    if several:
        notes.append(f"Difference: average accuracy minus {base}'s, paired seed by seed.")
    return Html(
        table(columns, [_row(comparison, row, columns) for row in rows])
        + tag("p", " ".join(notes), class_="note")
    )


def _transfer_notes(rows: list[Row]) -> list[str]:
    """What forward transfer is, where it was measured."""
    if not any(row.transfer for row in rows):
        return []
    return [
        "FWT, forward transfer: mean over later tasks of the accuracy before the task was trained "
        "minus chance, by the outputs made for its classes; of outputs drawn at random it is 0 but "
        "for luck, if only these are compared."
    ]


def _stream_notes(comparison: Comparison) -> list[str]:
    """What the figures of a stream that is not class-incremental stand for."""
    result = next(iter(comparison.results.values()))
    notes = []
    if result.task_aware:
        notes.append(
            "Task-incremental: the task of each test image is known, and its scores are compared "
            "only among that task's classes."
        )
    if result.data_incremental:
        notes.append(
            "Data-incremental: every task brings images of the classes that the first one brought, "
            "so that all accuracies are on the same test images, and forgetting is of these."
        )
    if result.few_shot:
        notes.append(
            "Few-shot: every task after the first brings a few images of each of its classes; base "
            "and novel classes stand apart below."
        )
    if without_online(name := str(result.config["scenario"])) != name:
        notes.append("Online: each stage passes over a task's images once.")
    return notes + comparison.notes


def _row(comparison: Comparison, row: Row, columns: list[str]) -> list[Any]:
    own = row.readout == comparison.results[row.method].readouts[0]
    name = method_name(comparison, row.method) if own else tag("span", row.readout, class_="sub")
    cells = [name, *(format_figure(*row.measures[measure]) for measure in _MEASURES)]
    if "FWT" in columns:
        cells.append(format_figure(*row.transfer) if row.transfer else "")
    if "difference" in columns:
        difference = row.differences.get("average")
        cells.append(format_figure(*difference, sign=True) if difference else "")
    if "memory" in columns:
        cells.append(str(comparison.results[row.method].config["memory"]) if own else "")
    shared = [f"{row.exemplars:,.0f}", f"{row.nbytes:,}", f"{row.all_nbytes:,}"]
    return [*cells, *([*shared, format_seconds(row.seconds)] if own else [""] * 4)]


def accuracy_section(comparison: Comparison) -> Html:
    """Curves over classes known, top-1 and, where it says something, top-5."""
    results = comparison.results
    shown = [plot(plot_curves(results), "Accuracy on all classes known, after each task")]
    if any(sum(t.classes for t in r.outcomes[0].tasks) > 5 for r in results.values()):
        figure = plot_curves(results, top=5, legend=False)
        shown.append(plot(figure, "Top-5 accuracy on all classes known, after each task"))
    band = any(len(result.outcomes) > 1 for result in results.values())
    note = "Lines are means over seeds, bands reach from the lowest seed to the highest. "
    note = (note if band else "") + (
        "Dashed: the method's other ways to classify."
        if any(len(result.readouts) > 1 for result in results.values())
        else ""
    )
    return Html(
        tag("div", *shown, class_="plots") + (tag("p", note, class_="note") if note else "")
    )


def matrix_section(comparison: Comparison) -> Html:
    """One accuracy matrix per method."""
    return tag(
        "div",
        *(
            plot(plot_matrix(result), f"Accuracy by task, {method}", method)
            for method, result in comparison.results.items()
        ),
        class_="plots",
    )


def forgetting_section(comparison: Comparison) -> Html:
    """Forgetting of each earlier task, and how the first fared; nothing where there is but one."""
    results = comparison.results.values()
    if any(len(result.outcomes[0].tasks) < 2 or result.data_incremental for result in results):
        return Html()
    forgotten = plot_forgetting(comparison.results)
    first = plot_first_task(comparison.results)
    return Html(
        tag(
            "div",
            plot(forgotten, "Forgetting of each earlier task"),
            plot(first, "Accuracy on the first task's classes, after each task"),
            class_="plots",
        )
        + tag(
            "p",
            "First: best accuracy that was ever reached on a task's classes, minus the accuracy "
            "after the last task. Second: accuracy on the first task's classes, as more are "
            "learned.",
            class_="note",
        )
    )


def sweeps_section(comparison: Comparison) -> Html:
    """Accuracy against each setting that was swept; nothing where none was."""
    shown = [
        plot(plot_sweep(sweep), f"Average and last accuracy by {sweep.name}")
        for sweep in find_sweeps(comparison.results)
    ]
    if not shown:
        return Html()
    note = (
        "Runs that differ in one setting only; bands reach from the lowest seed to the highest. "
        "A budget is shown by its limit after the last task."
    )
    return Html(tag("div", *shown, class_="plots") + tag("p", note, class_="note"))


def time_section(comparison: Comparison) -> Html:
    """Wall time by task, and by stage where the event log is there."""
    results = comparison.results
    figure = plot_seconds(results)
    parts = [tag("div", plot(figure, "Wall time of each task"), class_="plots")]
    parts += [
        details(method, _stage_table(result), shown=len(results) <= _OPEN)
        for method, result in results.items()
    ]
    note = (
        "Seconds, mean over seeds. A stage's are its training, companions included; the rest is "
        "set-up, boxes, selection, evaluation and checkpoints. Images per second are those trained "
        "on."
    )
    return Html("".join(parts) + tag("p", note, class_="note"))


def _stage_table(result: Result) -> Html:
    """Seconds of each stage by task, and its speed."""
    tasks = range(len(result.outcomes[0].tasks))
    seeds = len(result.outcomes)
    logs = [
        timing
        for outcome in result.outcomes
        if result.run_dir is not None
        for timing in read_timings(result.run_dir / f"seed-{outcome.seed}" / "events.jsonl")
    ]
    whole = [sum(o.tasks[t].seconds for o in result.outcomes) / seeds for t in tasks]
    rows = []
    trained = [0.0] * len(tasks)
    for stage in dict.fromkeys(timing.stage for timing in logs):
        mine = [timing for timing in logs if timing.stage == stage]
        seconds = [sum(x.seconds for x in mine if x.task == t) / seeds for t in tasks]
        trained = [a + b for a, b in zip(trained, seconds, strict=True)]
        rate = sum(x.images for x in mine) / max(1e-9, sum(x.seconds for x in mine))
        rows.append([stage, *_seconds(seconds), f"{rate:,.0f}"])
        for name in dict.fromkeys(name for timing in mine for name in timing.companions):
            parts = [
                sum(x.companions.get(name, 0.0) for x in mine if x.task == t) / seeds for t in tasks
            ]
            share = sum(parts) / max(1e-9, sum(seconds))
            rows.append([f"of it {name} ({share:.0%})", *_seconds(parts), ""])
    if rows:
        rest = [max(0.0, a - b) for a, b in zip(whole, trained, strict=True)]
        rows.append(["the rest", *_seconds(rest), ""])
    rows.append([tag("b", "whole task"), *_seconds(whole), ""])
    columns = ["stage", *(f"task {t + 1}" for t in tasks), "all tasks", "images/s"]
    return table(columns, rows)


def _seconds(values: list[float]) -> list[str]:
    """Each value, a dash for none, and the sum."""
    return [f"{value:,.1f}" if value else "–" for value in [*values, sum(values)]]


def setup_section(comparison: Comparison) -> Html:
    """Command, environment and configuration."""
    results = comparison.results
    environment, others = _shared({m: r.environment for m, r in results.items()})
    for method, own in others.items():
        for name, value in own.items():
            before = environment.get(name)
            environment[name] = f"{before}; {method}: {value}" if before else f"{method}: {value}"
    command = environment.pop("command", None)
    config, own_config = _shared({m: r.config for m, r in results.items()})
    parts = [tag("h3", "Command"), tag("pre", command)] if command else []
    parts += _variants(comparison)
    parts += [tag("h3", "Environment"), definitions(environment)]
    parts += [
        tag("h3", "Configuration"),
        details("shared by all" if own_config else "all options", tag("pre", _yaml(config))),
    ]
    parts += [details(method, tag("pre", _yaml(own))) for method, own in own_config.items()]
    return Html("".join(parts))


def _variants(comparison: Comparison) -> list[Html]:
    """What each label stands for: its method, and the options in which methods differ."""
    configs = {label: result.config for label, result in comparison.results.items()}
    if all(label == config["method"] for label, config in configs.items()):
        return []
    flat = {label: flatten(config) for label, config in configs.items()}
    values: dict[str, list[Any]] = {}
    for options in flat.values():
        for name, value in options.items():
            values.setdefault(name, []).append(value)
    names = [
        name
        for name, found in values.items()
        if name != "method" and any(value != found[0] for value in found)
    ]
    rows = [
        [
            method_name(comparison, label),
            options["method"],
            *("–" if name not in options else str(options[name]) for name in names),
        ]
        for label, options in flat.items()
    ]
    return [tag("h3", "What is compared"), table(["", "method", *names], rows)]


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _shared(
    settings: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What all methods have alike, and what each has of its own."""
    first = next(iter(settings.values()))
    alike = {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in settings.values())
    }
    own = {
        method: {key: value for key, value in mine.items() if key not in alike}
        for method, mine in settings.items()
    }
    return alike, {method: mine for method, mine in own.items() if mine}
