"""Keeps the figures of finished comparisons and of published runs, and writes their tables.

python benchmarks/reproduction.py keep caltech101 runs/caltech101   # -> reproduction/*.json
python benchmarks/reproduction.py keep-preset RUN_DIR               # -> reproduction/presets/*.json
python benchmarks/reproduction.py tables              # -> README.md, reproduction/README.md
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from reproduction_table import MEASURES, plus_minus, table

from fastcil import Result
from fastcil.engine.compare import Comparison, Row
from fastcil.engine.epoch_choice import PAPER_MODE
from fastcil.engine.metrics import mean_interval
from fastcil.engine.options import flatten, make_settings
from fastcil.engine.preset_files import Published, preset_names, read_preset
from fastcil.engine.result import SeedOutcome, TaskOutcome
from fastcil.engine.state import write_atomically

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "reproduction"
# Where tables stand, each in one of the two.
DOCUMENTS = (ROOT / "README.md", FOLDER / "README.md")
# Where a figure was taken: what a reader needs to take it again.
FACTS = ("fastcil", "commit", "python", "torch", "numpy", "processor", "threads", "device")
PRESET_COLUMNS = (
    *("preset", "method", "published", "in", "average", "last", "BWT", "seeds", "hours", "device"),
    *("commit", "changed"),
)
# What a run may have of its own without being another experiment.
FREE = ("seeds", "device", "preset", "codec", "method", "load.", "engine.threads")
FREE += ("engine.progress", "engine.tensorboard", "engine.checkpoint_seconds", "engine.scan_batch")


def keep(name: str, run_dir: Path) -> Path:
    """Writes a comparison's rows and curves, its config and where they come from.

    What is not finished yet is left out and named; a later call with the rest, from another
    directory too, adds to what is kept.
    """
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    kept = FOLDER / "seeds" / f"{name}.json"
    seeds = gather(config, run_dir, kept)
    if not seeds:
        raise SystemExit(f"{run_dir} holds no finished seed of a method of {name}.yaml.")
    results = {method: _joined(runs) for method, runs in seeds.items()}
    comparison = Comparison(results)
    machines = [run["environment"] for runs in seeds.values() for run in runs.values()]
    content = {
        "command": f"fastcil compare --config benchmarks/reproduction/{name}.yaml",
        "environments": [m for k, m in enumerate(machines) if m not in machines[:k]],
        "config": config,
        "missing": {
            method: lacking
            for method in config["methods"]
            if (lacking := [s for s in config["seeds"] if str(s) not in seeds.get(method, {})])
        },
        "rows": [
            {**dataclasses.asdict(row), "method": comparison.label(row.method)}
            for row in _rows(results)
        ],
        "notes": comparison.notes,
        "curves": {
            comparison.label(method): {
                name: result.curve(name).round(3).tolist() for name in result.readouts
            }
            for method, result in results.items()
        },
        "first_task": {
            method: result.accuracy_matrix[:, 0].round(3).tolist()
            for method, result in results.items()
        },
        "chance": {
            method: round(100 / result.outcomes[0].tasks[0].classes, 3)
            for method, result in results.items()
        },
        "per_seed": {
            method: {measure: result.per_seed(measure) for measure in MEASURES}
            for method, result in results.items()
        },
    }
    path = FOLDER / f"{name}.json"
    kept.parent.mkdir(exist_ok=True)
    write_atomically(kept, (json.dumps(seeds) + "\n").encode())
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def gather(config: dict[str, Any], run_dir: Path, kept: Path) -> dict[str, dict[str, Any]]:
    """Every finished seed, method -> seed -> what it was and gave; those of ``run_dir`` count."""
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    found: dict[str, dict[str, Any]] = {}
    for method in config["methods"]:
        for seed in config["seeds"]:
            folder = run_dir / method / f"seed-{seed}"
            run = before.get(method, {}).get(str(seed))
            if (folder / "result.json").is_file():
                run = _bare(Result.load(folder))
            if run is not None:
                found.setdefault(method, {})[str(seed)] = run
    for method, runs in found.items():
        options = [_filled(run["config"]) for run in runs.values()]
        if any(other != options[0] for other in options):
            raise SystemExit(
                f"{method}: the seeds in {run_dir} and those kept in {kept} were run with other "
                f"options: remove {kept.name} to keep the new ones alone."
            )
    return found


def _filled(config: dict[str, Any]) -> dict[str, Any]:
    """A run's flat config with what options there are since then, at their defaults."""
    now = make_settings(config["method"], codec=config.get("codec")).as_dict()
    return {**json.loads(json.dumps(flatten(now))), **config}


def _bare(result: Result) -> dict[str, Any]:
    """One seed without what the report draws, and without names of this machine's folders."""
    (outcome,) = result.outcomes
    tasks = [{**dataclasses.asdict(task), "records": []} for task in outcome.tasks]
    config = {
        name: Path(value).name if str(value).startswith("/") else value
        for name, value in flatten(result.config).items()
        if name not in ("run_dir", "seeds")
    }
    environment = {fact: result.environment[fact] for fact in FACTS}
    return {"config": config, "environment": environment, "seed": outcome.seed, "tasks": tasks}


def _joined(runs: dict[str, Any]) -> Result:
    """One method's seeds as a result."""
    first = next(iter(runs.values()))
    outcomes = [
        SeedOutcome(run["seed"], [TaskOutcome(**task) for task in run["tasks"]])
        for run in runs.values()
    ]
    return Result(first["config"], first["environment"], outcomes)


def _rows(results: dict[str, Result]) -> list[Row]:
    """A comparison's rows; differences to the first method over the seeds that both have."""
    base_name, base = next(iter(results.items()))
    rows = []
    for method, result in results.items():
        own = [outcome.seed for outcome in result.outcomes]
        both = [outcome.seed for outcome in base.outcomes if outcome.seed in own]
        for row in Comparison({method: result}).rows():
            if method != base_name and both:
                pair = Comparison({base_name: base.only(both), method: result.only(both)})
                paired = {(r.method, r.readout): r.differences for r in pair.rows()}
                row = dataclasses.replace(row, differences=paired[method, row.readout])
            rows.append(row)
    return rows


def keep_preset(run_dir: Path) -> Path:
    """Writes the figures of one method's run of a preset, in the place of earlier ones."""
    result = Result.load(run_dir)
    name = result.config.get("preset")
    if name is None:
        raise SystemExit(f"{run_dir} is no run of a preset.")
    preset, method = read_preset(name), result.config["method"]
    label = method + PAPER_MODE * (result.epoch_choice == "paper")
    run = {
        "method": label,
        "seeds": [outcome.seed for outcome in result.outcomes],
        "readouts": {
            readout: {m: mean_interval(result.per_seed(m, readout)) for m in MEASURES}
            for readout in result.readouts
        },
        "per_seed": {measure: result.per_seed(measure) for measure in MEASURES},
        "hours": result.seconds / 3600,
        "task_seconds": [
            fmean(task.seconds for task in tasks)
            for tasks in zip(*(outcome.tasks for outcome in result.outcomes), strict=True)
        ],
        "exemplars": result.exemplars,
        "nbytes": result.nbytes,
        "changed": changes(result.config, preset.arguments, preset.options_for([method])),
        "environment": {fact: result.environment[fact] for fact in FACTS},
    }
    path = FOLDER / "presets" / f"{name.replace('/', '-')}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": []}
    runs = [other for other in kept["runs"] if other["method"] != label]
    content = {"preset": name, "runs": [*runs, run]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def changes(config: dict[str, Any], arguments: Any, options: Any) -> list[str]:
    """What a run's config has other than its preset, ``name value``; of paths only what follows."""
    settings = make_settings(config["method"], options).as_dict()
    told = flatten({**arguments, **settings})
    found = []
    for name, value in flatten(config).items():
        wanted = told.get(name)
        if name == "data":
            value, wanted = (str(text).partition(":")[2] for text in (value, wanted))
        if isinstance(wanted, tuple):
            wanted = list(wanted)
        if value != wanted and not name.startswith(FREE):
            found.append(f"{name} {value}")
    return found


def preset_tables() -> str:
    """The Markdown tables of all presets, family by family: published figures and ours."""
    parts = []
    families = dict.fromkeys(name.partition("/")[0] for name in preset_names())
    for family in families:
        names = [name for name in preset_names() if name.startswith(f"{family}/")]
        rows = [row for name in names for row in preset_rows(name)]
        done = sum(bool(row[4]) and not row[1].startswith("&emsp;") for row in rows)
        # Backward transfer is shown where it was published.
        transfer = any(f.bwt is not None for name in names for f in read_preset(name).published)
        shown = [k for k, column in enumerate(PRESET_COLUMNS) if column != "BWT" or transfer]
        lines = ["| " + " | ".join(row[k] for k in shown) + " |" for row in (PRESET_COLUMNS, *rows)]
        lines.insert(1, "|" + "---|" * len(shown))
        summary = f"<code>{family}</code>: {len(names)} presets, {done} methods' runs kept"
        head = f"<details><summary>{summary}</summary>"
        parts.append("\n".join([head, "", *lines, "", "</details>"]))
    return "\n\n".join(parts)


def preset_rows(name: str) -> list[list[str]]:
    """A preset's rows: every method that was published or run, its other readouts below it."""
    path = FOLDER / "presets" / f"{name.replace('/', '-')}.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    runs = {run["method"]: run for run in kept}
    published = list(read_preset(name).published)
    told = {figure.method for figure in published}
    published += [Published(method, None, None, "") for method in runs if method not in told]
    rows, source = [], ""
    for figure in published:
        cells = [f"`{name}`" if not rows else "", f"`{figure.method}`", figure.text]
        cells.append(figure.source if figure.source != source else "")
        source = figure.source
        run = runs.get(figure.method)
        if run is None:
            rows.append([*cells, *[""] * (len(PRESET_COLUMNS) - len(cells))])
            continue
        cells[2] += _beside(figure, run)
        for number, (readout, measures) in enumerate(run["readouts"].items()):
            ours = [plus_minus(*measures[m]) if m in measures else "" for m in MEASURES]
            if number:
                rows.append(["", f"&emsp;{readout}", "", "", *ours, *[""] * 5])
                continue
            facts = run["environment"]
            changed = ", ".join(run["changed"])
            device = facts["processor"] if facts["device"] == "cpu" else facts["device"]
            more = [str(len(run["seeds"])), f"{run['hours']:.1f}", device, facts["commit"] or ""]
            rows.append([*cells, *ours, *more, changed])
    return rows


def _beside(figure: Published, run: dict[str, Any]) -> str:
    """Ours of what else was published: exemplars, their bytes, the time of two tasks."""
    ours = []
    if figure.exemplars is not None:
        ours.append(f"{run['exemplars']:,.0f}")
    if figure.mebibytes is not None:
        ours.append(f"{run['nbytes'] / 2**20:,.0f} MiB")
    if figure.seconds is not None:
        ours.append(f"{sum(run['task_seconds'][:2]):,.0f} s")
    return f" (here {', '.join(ours)})" if ours else ""


def with_tables(documents: dict[Path, str]) -> dict[Path, str]:
    """The documents with every kept comparison between its marks, ``<!-- NAME -->``, brought up."""
    made = {
        path.stem: table(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(FOLDER.glob("*.json"))
    }
    documents = dict(documents)
    for name, text in {**made, "presets": preset_tables()}.items():
        mark, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        homes = [path for path, old in documents.items() if mark in old and end in old]
        if not homes:
            raise SystemExit(
                f"{' and '.join(map(str, documents))} have no place for {name}: add {mark} and "
                f"{end} to one of them."
            )
        place = re.compile(f"{re.escape(mark)}.*?{re.escape(end)}", re.DOTALL)
        for path in homes:
            documents[path] = place.sub(
                lambda _, text=f"{mark}\n{text}\n{end}": text, documents[path]
            )
    return documents


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    keeper = commands.add_parser("keep", help="keep a finished comparison's figures")
    keeper.add_argument("name", help="of the settings in benchmarks/reproduction")
    keeper.add_argument("run_dir", type=Path, help="what fastcil compare wrote")
    one = commands.add_parser("keep-preset", help="keep the figures of a run of a preset")
    one.add_argument("run_dir", type=Path, help="what fastcil train --preset wrote")
    commands.add_parser("tables", help="write the kept figures into the two README.md")
    arguments = parser.parse_args()
    if arguments.command == "keep":
        print(keep(arguments.name, arguments.run_dir))
    elif arguments.command == "keep-preset":
        print(keep_preset(arguments.run_dir))
    else:
        texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
        for path, text in with_tables(texts).items():
            write_atomically(path, text.encode())


if __name__ == "__main__":
    main()
