"""Keeps the figures of finished comparisons, and writes them into the README.

python benchmarks/reproduction.py keep caltech101 runs/caltech101   # -> reproduction/*.json
python benchmarks/reproduction.py tables                            # -> README.md
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import yaml

from fastcil import Result
from fastcil.engine.compare import Comparison, Row
from fastcil.engine.state import write_atomically

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "reproduction"
# Where a figure was taken: what a reader needs to take it again.
FACTS = ("fastcil", "commit", "python", "torch", "numpy", "processor", "threads", "device")
COLUMNS = ("method", "average", "last", "difference", "exemplars", "bytes", "with networks")


def keep(name: str, run_dir: Path) -> Path:
    """Writes a comparison's rows and curves, its config and where they come from."""
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    comparison = Comparison({m: Result.load(run_dir / m) for m in config["methods"]})
    for method, result in comparison.results.items():
        if [outcome.seed for outcome in result.outcomes] != config["seeds"]:
            raise SystemExit(f"{run_dir / method} does not hold the seeds {config['seeds']}.")
    environments = [result.environment for result in comparison.results.values()]
    facts = [{fact: environment[fact] for fact in FACTS} for environment in environments]
    if any(other != facts[0] for other in facts):
        raise SystemExit(f"the methods in {run_dir} were not run by one version on one machine.")
    content = {
        "command": f"fastcil compare --config benchmarks/reproduction/{name}.yaml",
        "environment": facts[0],
        "config": config,
        "rows": [dataclasses.asdict(row) for row in comparison.rows()],
        "curves": {
            method: {name: result.curve(name).round(3).tolist() for name in result.readouts}
            for method, result in comparison.results.items()
        },
        "per_seed": {
            method: {measure: result.per_seed(measure) for measure in ("average", "last")}
            for method, result in comparison.results.items()
        },
    }
    path = FOLDER / f"{name}.json"
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def table(content: dict[str, Any]) -> str:
    """The Markdown table of a kept comparison, and a line that says where it comes from."""
    rows = [Row(**row) for row in content["rows"]]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    seen: set[str] = set()
    for row in rows:
        first = row.method not in seen
        seen.add(row.method)
        cells = [
            f"`{row.method}`" if first else f"&emsp;{row.readout}",
            *(_figure(*row.measures[measure]) for measure in ("average", "last")),
            _figure(*row.differences["average"], sign=True) if row.differences else "",
            *((f"{row.exemplars:,.0f}", f"{row.nbytes:,}", f"{row.all_nbytes:,}") if first else ""),
        ]
        cells += [""] * (len(COLUMNS) - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    facts = content["environment"]
    where = (
        f"`{content['command']}`; {facts['processor']}, {facts['threads']} thread(s), "
        f"torch {facts['torch']}, Python {facts['python']}, commit {facts['commit']}."
    )
    return "\n".join([*lines, "", where])


def _figure(mean: float, half: float | None, sign: bool = False) -> str:
    text = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    return text if half is None else f"{text} ± {half:.1f}"


def with_tables(readme: str) -> str:
    """The README with every kept comparison between its marks, ``<!-- NAME -->``, brought up."""
    for path in sorted(FOLDER.glob("*.json")):
        made = table(json.loads(path.read_text(encoding="utf-8")))
        mark, end = f"<!-- {path.stem} -->", f"<!-- /{path.stem} -->"
        if mark not in readme or end not in readme:
            raise SystemExit(f"README.md has no place for {path.name}: add {mark} and {end}.")
        place = re.compile(f"{re.escape(mark)}.*?{re.escape(end)}", re.DOTALL)
        readme = place.sub(lambda _, text=f"{mark}\n{made}\n{end}": text, readme)
    return readme


def main() -> None:
    """Runs one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    keeper = commands.add_parser("keep", help="keep a finished comparison's figures")
    keeper.add_argument("name", help="of the settings in benchmarks/reproduction")
    keeper.add_argument("run_dir", type=Path, help="what fastcil compare wrote")
    commands.add_parser("tables", help="write the kept figures into README.md")
    arguments = parser.parse_args()
    if arguments.command == "keep":
        print(keep(arguments.name, arguments.run_dir))
    else:
        readme = ROOT / "README.md"
        text = with_tables(readme.read_text(encoding="utf-8"))
        write_atomically(readme, text.encode())


if __name__ == "__main__":
    main()
