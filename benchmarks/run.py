"""Times every op beside its peers, keeps the figures, and writes them into the README.

python benchmarks/run.py time [--device cuda] [--only pade,read_batch]   # -> results/DEVICE.json
python benchmarks/run.py table                                           # -> README.md

The ways of a case are timed in turn, round after round, in one process: what slows the machine down
meets all of them, and each round begins with another. THP_MEM_ALLOC_ENABLE=1, which make sets,
spares all of them most page faults.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import traceback
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import bench_cam_boxes
import bench_herding
import bench_input_factor
import bench_linearize
import bench_pade
import bench_penalty
import bench_read
import bench_reconstruct
import bench_salient_masks
import bench_soft_compose
import bench_symbol_coder
import gpu_cases
import torch
from clocks import on_cuda, on_host
from op_case import OURS, OpCase, Step, threads

from fastcil.engine.environment import environment
from fastcil.engine.state import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODULES = (
    bench_pade,
    bench_cam_boxes,
    bench_salient_masks,
    bench_soft_compose,
    bench_read,
    bench_reconstruct,
    bench_herding,
    bench_input_factor,
    bench_penalty,
    bench_linearize,
    bench_symbol_coder,
)
CASES: tuple[OpCase, ...] = tuple(case for module in MODULES for case in module.CASES)
CASES += tuple(gpu_cases.CASES)
CLOCKS = {"cpu": on_host, "cuda": on_cuda}
PEERS = (
    "opencv-python-headless",
    "pillow",
    "rational-activations",
    "nvidia-dali-cuda120",
    "kornia",
    "torchcam",
    "torchvision",
    "asdfghjkl",
    "kfac-pytorch",
    "curvlinops-for-pytorch",
    "nngeometry",
    "kronfluence",
    "backpack-for-pytorch",
    "singd",
)
FACTS = ("fastcil", "commit", "python", "torch", "numpy", "processor", "device")
MARKS = ("<!-- ops -->", "<!-- /ops -->")


def make_steps(case: OpCase) -> tuple[dict[str, Step], list[str]]:
    """The ways that can be had, and those whose results are wrong: these are not timed."""
    steps: dict[str, Step] = {}
    wrong = []
    for way in case.ways:
        try:
            step = case.make(way, True)
        except AssertionError:
            if way == OURS:
                raise
            wrong.append(way)
        else:
            if step is not None:
                steps[way] = step
    return steps, wrong


def measure(case: OpCase, rounds: int) -> dict[str, Any]:
    """Milliseconds of each way that can be had, the least and the median of so many rounds."""
    with threads(case.threads):
        steps, wrong = make_steps(case)
        taken = CLOCKS[case.device](steps, rounds)
    optional = {
        "note": case.note() if case.note else None,
        "group": asdict(case.group) if case.group else None,
    }
    return {
        "op": case.op,
        "name": case.name,
        **{key: value for key, value in optional.items() if value is not None},
        "threads": case.threads,
        "aims": dict(case.aims),
        "most_ms": case.most_ms,
        "wrong": wrong,
        "ways": {
            way: {"min": round(min(ms), 4), "median": round(statistics.median(ms), 4)}
            for way, ms in taken.items()
        },
    }


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def file_of(facts: dict[str, Any], folder: Path | None = None) -> Path:
    """Where the figures of this device are kept, in `RESULTS` or another folder."""
    name = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    return (folder or RESULTS) / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def alike(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any] | None:
    """The surroundings of both, or None where they differ."""
    peers = {**old["peers"], **new["peers"]}
    same = all(old["peers"].get(name, version) == version for name, version in new["peers"].items())
    return {**new, "peers": peers} if same and {**old, "peers": 0} == {**new, "peers": 0} else None


def keep(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Writes figures, each with the commit that gave it.

    Those of other cases stay if they were taken in the same surroundings: by the same versions, of
    the peers too as far as both had them.
    """
    commit = facts["commit"]
    facts = {name: value for name, value in facts.items() if name != "commit"}
    rows = [{**row, "commit": commit} for row in rows]
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        merged = alike(old["environment"], facts)
        if merged is not None:
            facts = merged
            fresh = {(row["op"], row["name"]) for row in rows}
            rows = [r for r in old["cases"] if (r["op"], r["name"]) not in fresh] + rows
    device = "cpu" if facts["device"] == "cpu" else "cuda"
    order = [(case.op, case.name) for case in CASES if case.device == device]
    rows.sort(key=lambda row: order.index((row["op"], row["name"])))
    command = {"cpu": "make bench", "cuda": "make bench-gpu"}[device]
    content = {"command": command, "environment": facts, "cases": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def times(ratio: float) -> str:
    """Two figures behind the point for what is near, none for what is far."""
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def geometric_means(rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """A line on each group of cases, and whether its aim is reached by the least times."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "group" in row and set(row["group"]["peers"]) & set(row["ways"]):
            groups.setdefault((row["op"], row["group"]["name"]), []).append(row)
    lines = []
    for (op, name), members in groups.items():
        least, median = (
            statistics.geometric_mean(
                min(row["ways"][way][kind] for way in row["group"]["peers"] if way in row["ways"])
                / row["ways"][OURS][kind]
                for row in members
            )
            for kind in ("min", "median")
        )
        lines.append(
            (
                f"`{op}`, {name}: the best package takes {times(least)} ({times(median)}) times as "
                f"long, in the geometric mean of {len(members)}",
                least >= members[0]["group"]["aim"],
            )
        )
    return lines


def commits(rows: list[dict[str, Any]]) -> str:
    """Which commit gave the figures of which ops."""
    ops: dict[str, list[str]] = {}
    for row in rows:
        named = ops.setdefault(row["commit"], [])
        if row["op"] not in named:
            named.append(row["op"])
    if len(ops) == 1:
        return f"commit {next(iter(ops))}"
    return "commits " + ", ".join(
        f"{commit} ({', '.join(f'`{op}`' for op in named)})" for commit, named in ops.items()
    )


def table(content: dict[str, Any]) -> str:
    """The Markdown table of kept figures, and lines that say where they come from."""
    lines = [
        "| op | on | ms (median) | others, in times of ours by their least (by their medians) |",
        "|---|---|---:|---|",
    ]
    for row in content["cases"]:
        ours = row["ways"][OURS]
        others = ", ".join(
            f"{way} {times(ms['min'] / ours['min'])} ({times(ms['median'] / ours['median'])})"
            for way, ms in row["ways"].items()
            if way != OURS
        )
        others += "".join(f", {way}: wrong result" for way in row["wrong"])
        on = row["name"] + (f" ({row['note']})" if "note" in row else "")
        cells = [f"`{row['op']}`", on, f"{ours['min']:.3g} ({ours['median']:.3g})", others]
        lines.append("| " + " | ".join(cells) + " |")
    facts = content["environment"]
    peers = "".join(f", {name} {version}" for name, version in facts["peers"].items())
    if facts["device"] == "cpu":
        device = facts["processor"]
        how = "reading, reconstruction, curvature, linearised networks on one thread, others on two"
    else:
        device = facts["device"]
        how = "by the GPU's clock, its cache empty; copy: as many bytes as the op must move"
    where = (
        f"`{content['command']}`; {facts['rounds']} rounds, {device}, torch {facts['torch']}"
        f"{peers}, Python {facts['python']}, {commits(content['cases'])}; {how}."
    )
    means = "".join(f"{line}.\n" for line, _ in geometric_means(content["cases"]))
    return "\n".join([*lines, "", means + where])


def missed(row: dict[str, Any]) -> list[str]:
    """The aims that a row does not reach, by the least times."""
    ways = row["ways"]
    ratios = {way: ways[way]["min"] / ways[OURS]["min"] for way in row["aims"] if way in ways}
    lines = [
        f"{way} takes {ratio:.2f} times as long, aim {row['aims'][way]:.3g}"
        for way, ratio in ratios.items()
        if ratio < row["aims"][way]
    ]
    if row["most_ms"] is not None and ways[OURS]["min"] > row["most_ms"]:
        lines.append(f"{ways[OURS]['min']} ms, aim {row['most_ms']}")
    return [f"{row['op']}, {row['name']}: {line}" for line in lines]


def with_table(readme: str) -> str:
    """The README with the kept figures between its marks brought up."""
    start, end = MARKS
    if start not in readme or end not in readme:
        raise SystemExit(f"README.md has no place for the figures: add {start} and {end}.")
    files = sorted(RESULTS.glob("*.json"))
    made = "\n\n".join(table(json.loads(path.read_text(encoding="utf-8"))) for path in files)
    place = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    return place.sub(lambda _: f"{start}\n{made}\n{end}", readme)


def main() -> None:
    """Runs one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    timer = commands.add_parser("time", help="time the ops and keep the figures")
    timer.add_argument("--only", default="", help="ops to time, separated by commas")
    timer.add_argument("--rounds", type=int, default=21)
    timer.add_argument("--device", choices=CLOCKS, default="cpu")
    timer.add_argument("--out", type=Path, default=RESULTS, help="folder that keeps the figures")
    commands.add_parser("table", help="write the kept figures into README.md")
    arguments = parser.parse_args()
    if arguments.command == "time":
        only = set(filter(None, arguments.only.split(",")))
        if unknown := only - {case.op for case in CASES}:
            raise SystemExit(f"--only names {', '.join(sorted(unknown))}, which is not timed here.")
        device = arguments.device
        facts = {name: value for name, value in environment(device).items() if name in FACTS}
        facts |= {"rounds": arguments.rounds, "peers": versions() if device == "cpu" else {}}
        facts["large_pages"] = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
        path, rows, failed = file_of(facts, arguments.out), [], []
        for case in CASES:
            if case.device != device or (only and case.op not in only):
                continue
            try:
                row = measure(case, arguments.rounds)
            except Exception:
                # The other cases are measured all the same: time on a device may be short.
                traceback.print_exc()
                failed.append(f"{case.op}, {case.name}")
                continue
            keep(path, [row], facts)
            rows.append(row)
            print(case, *(f"  {way}: {ms}" for way, ms in row["ways"].items()), sep="\n")
            for line in missed(row):
                print(f"  MISSED: {line}")
            torch.compiler.reset()
        for line, reached in geometric_means(rows):
            print(line if reached else f"MISSED: {line}")
        print(path)
        if failed:
            raise SystemExit(f"failed: {'; '.join(failed)}; their tracebacks are above.")
    else:
        readme = ROOT / "README.md"
        text = with_table(readme.read_text(encoding="utf-8"))
        write_atomically(readme, text.encode())


if __name__ == "__main__":
    main()
