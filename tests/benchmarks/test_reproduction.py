"""Kept figures: taken from finished runs, told with where they come from, shown in the README."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from fastcil.engine.arguments import parse_run
from fastcil.engine.compare import compare
from fastcil.engine.preset_files import preset_names
from fastcil.engine.run import train

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "reproduction"
SETTINGS = sorted(FOLDER.glob("*.yaml"))
KEPT = sorted(FOLDER.glob("*.json"))
PRESET_RUNS = sorted(FOLDER.glob("presets/*.json"))


@pytest.fixture
def reproduction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "reproduction", ROOT / "benchmarks" / "reproduction.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda path: path.stem)
def test_settings_are_options_that_compare_takes(settings: Path) -> None:
    parsed = parse_run("compare", [f"--config={settings}"])
    written = yaml.safe_load(settings.read_text())
    assert parsed["methods"] == written["methods"] and list(parsed["seeds"]) == written["seeds"]
    assert parsed["engine"]["threads"] == written.get("engine", {}).get("threads")


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.stem)
def test_kept_figures_belong_to_their_settings_and_name_no_machine(kept: Path) -> None:
    text = kept.read_text()
    content = json.loads(text)
    assert content["config"] == yaml.safe_load(kept.with_suffix(".yaml").read_text())
    for facts in content["environments"]:
        # One that was resumed may tell of several.
        assert re.fullmatch("[0-9a-f]{12}(, then [0-9a-f]{12})*", facts["commit"]), "clean trees"
    assert not re.search(r'"[^"]*(/home|/root|/tmp|/work|/Users)', text)
    whole = [m for m in content["config"]["methods"] if m not in content.get("missing", {})]
    assert [m for m in content["per_seed"] if m in whole] == whole
    seeds = FOLDER / "seeds" / kept.name
    if seeds.is_file():
        assert not re.search(r'"[^"]*(/home|/root|/tmp|/work|/Users)', seeds.read_text())


def test_the_tables_show_what_is_kept(reproduction: ModuleType) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in reproduction.DOCUMENTS}
    assert reproduction.with_tables(texts) == texts, "python benchmarks/reproduction.py tables"


def test_figures_are_kept_and_tabled(
    reproduction: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduction, "FOLDER", tmp_path)
    config = {"methods": ["er", "finetune"], "seeds": [0, 1]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    short = {"network.name": "resnet20", "network.width": 4, "engine.epoch_scale": 0.005}
    compare(
        **config,
        data="scenes:classes=4,size=32,train_per_class=4,test_per_class=4",
        scenario="lfs-2",
        memory="20KiB",
        run_dir=tmp_path / "runs",
        **short,
        **{"engine.progress": False},
    )
    path = reproduction.keep("tiny", tmp_path / "runs")
    content = json.loads(path.read_text())
    assert content["command"].endswith("--config benchmarks/reproduction/tiny.yaml")
    assert [len(v["average"]) for v in content["per_seed"].values()] == [2, 2]
    assert not content["missing"] and content["rows"][-1]["differences"]
    place = "<!-- presets --><!-- /presets -->"
    one, two = Path("one.md"), Path("two.md")
    texts = reproduction.with_tables({one: "a <!-- tiny -->\nold\n<!-- /tiny --> b", two: place})
    shown = texts[one]
    assert shown.startswith("a <!-- tiny -->\n| method |") and shown.endswith("<!-- /tiny --> b")
    assert "cifar100/b0-10" in texts[two]
    (facts,) = content["environments"]
    assert "\n| `finetune` | " in shown and facts["commit"] in shown
    # A machine is told once, with every commit that ran there.
    two = [{**facts, "commit": "aa"}, {**facts, "commit": "bb, then aa"}]
    two += [{**facts, "commit": "bb", "processor": "Another"}]
    where = reproduction.table({**content, "environments": two}).rpartition("; ")
    assert where[0].endswith(", commit aa, bb") and where[2].startswith("Another, ")
    assert content["chance"] == {"er": 50.0, "finetune": 50.0}
    hardly = {**content, "chance": {"er": 5.0, "finetune": 4.0}}
    hardly["first_task"] = {"er": [14.9, 40.0], "finetune": [12.0, 0.0]}
    assert "three times chance, which say nothing: `er` 14.9 % (chance 5.0 %)." in (
        reproduction.table(hardly)
    )
    heads, *lines = (
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in reproduction.table(content).splitlines()
        if line.startswith("|")
    )
    times = {row["method"]: row["seconds"] for row in reversed(content["rows"])}
    assert heads[-1] == "time" and "FWT" not in heads
    for name, seconds in times.items():
        shown_time = next(cells for cells in lines if cells[0] == f"`{name}`")[-1]
        assert shown_time == f"{seconds:.0f} s"
    own, *others = content["rows"]
    measured = {**content, "rows": [{**own, "transfer": [1.25, None], "seconds": 7443.4}, *others]}
    heads, _, first, *rest = (
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in reproduction.table(measured).splitlines()
        if line.startswith("|")
    )
    column = heads.index("FWT")
    assert column == heads.index("BWT") + 1 and first[column] == "1.2" and first[-1] == "2:04:03"
    assert {cells[column] for cells in rest if len(cells) > column} == {""}
    with pytest.raises(SystemExit, match="no place"):
        reproduction.with_tables({one: "nothing"})
    with pytest.raises(SystemExit, match="no finished seed"):
        (tmp_path / "seeds" / "tiny.json").unlink()
        reproduction.keep("tiny", tmp_path / "elsewhere")
    # Seed by seed, from two directories, the same figures come together.
    for seed, method in ((0, "er"), (1, "er"), (0, "finetune"), (1, "finetune")):
        one = tmp_path / f"{method}-{seed}" / method
        one.mkdir(parents=True)
        shutil.copytree(tmp_path / "runs" / method / f"seed-{seed}", one / f"seed-{seed}")
        reproduction.keep("tiny", one.parent)
        parts = json.loads(path.read_text())
        if (seed, method) == (0, "finetune"):
            assert parts["missing"] == {"finetune": [1]}
            assert "`finetune` [1]" in reproduction.table(parts)
            parts["missing"] = {"er": [1], "finetune": [1]}
            assert "not been run yet: 1 of every row." in reproduction.table(parts)
            parts["missing"] = {"er": [1], "finetune": [0, 1]}
            assert "yet: `er` [1], `finetune` [0, 1]." in reproduction.table(parts)
            row = parts["rows"][-1]
            assert (row["method"], row["seeds"]) == ("finetune", 1) and row["differences"]
    assert parts == content
    other = json.loads((tmp_path / "seeds" / "tiny.json").read_text())
    # One that was run before there was some option has its default.
    del other["er"]["0"]["config"]["augment.resize"]
    (tmp_path / "seeds" / "tiny.json").write_text(json.dumps(other))
    reproduction.keep("tiny", tmp_path / "elsewhere")
    other["er"]["0"]["config"]["memory"] = "1MiB"
    (tmp_path / "seeds" / "tiny.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="other options"):
        reproduction.keep("tiny", tmp_path / "elsewhere")


@pytest.mark.parametrize("kept", PRESET_RUNS, ids=lambda path: path.stem)
def test_kept_runs_of_presets_name_no_machine(kept: Path) -> None:
    text = kept.read_text()
    content = json.loads(text)
    assert kept.stem == content["preset"].replace("/", "-")
    assert not re.search(r'"[^"]*(/home|/root|/tmp|/work|/Users)', text)
    for run in content["runs"]:
        assert re.fullmatch("[0-9a-f]{12}", run["environment"]["commit"]), "of a clean tree"


def test_presets_that_were_not_run_are_empty(
    reproduction: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduction, "FOLDER", tmp_path)
    text = reproduction.preset_tables()
    for name in preset_names():
        assert f"\n| `{name}` | `" in text
    row = next(line for line in text.splitlines() if line.startswith("| `cim/food101-lfs5` |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    wanted = ["`cim/food101-lfs5`", "`icarl`", "69.66", "Luo et al. (2023), Table 1"]
    assert cells == [*wanted, *[""] * 7]
    assert "19 presets, 0 methods' runs kept" in text


def test_a_run_of_a_preset_is_kept_and_tabled(
    reproduction: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduction, "FOLDER", tmp_path)
    short = {"network.name": "resnet20", "network.width": 4, "engine.epoch_scale": 0.005}
    data = "scenes:classes=4,size=32,train_per_class=4,test_per_class=4"

    def run(method: str, seeds: tuple[int, ...], **options: object) -> Path:
        folder = tmp_path / "runs" / f"{method}-{len(seeds)}"
        train(
            method,
            data,
            "lfs-2",
            preset="cifar100/b0-10",
            seeds=seeds,
            run_dir=folder,
            **{**short, "engine.progress": False, **options},
        )
        return folder

    reproduction.keep_preset(run("icarl", (0,)))
    path = reproduction.keep_preset(run("icarl", (0, 1, 2)))
    assert reproduction.keep_preset(run("er", (1,), **{"er.later.lr": 0.01})) == path
    content = json.loads(path.read_text())
    assert path == tmp_path / "presets" / "cifar100-b0-10.json"
    assert [run["method"] for run in content["runs"]] == ["icarl", "er"], "the later one counts"
    icarl, er = content["runs"]
    assert icarl["seeds"] == [0, 1, 2] and len(icarl["per_seed"]["last"]) == 3
    assert {change.split(" ")[0] for change in icarl["changed"]} == {"data", "scenario", *short}
    assert "er.later.lr 0.01" in er["changed"] and "memory" not in str(er["changed"])
    rows = reproduction.preset_rows("cifar100/b0-10")
    shown = {row[1]: row for row in rows}
    mean, half = icarl["readouts"]["nme"]["average"]
    lost, spread = icarl["readouts"]["nme"]["bwt"]
    assert shown["`icarl`"][2:9] == [
        *("64.40 / 49.60", "PyCIL's plot (Zhou et al. 2023), read off to 0.3"),
        *(f"{mean:.1f} ± {half:.1f}", shown["`icarl`"][5], f"{lost:.1f} ± {spread:.1f}"),
        *("3", f"{icarl['hours']:.1f}"),
    ]
    assert shown["&emsp;linear"][4] and not shown["&emsp;linear"][7]
    assert shown["`er`"][2] == "" and shown["`er`"][7] == "1"
    assert shown["`wa`"][2:] == ["67.10 / 52.40", "", *[""] * 8]
    assert all(len(row) == len(reproduction.PRESET_COLUMNS) for row in rows)
    text = reproduction.preset_tables()
    assert "19 presets, 0" in text and "10 presets, 2" in text
    # Where exemplars were published ours stand beside them.
    held = {**icarl, "method": "gem+samc", "exemplars": 2111.6}
    other = tmp_path / "presets" / "samc-cifar100-10-mu-0.9.json"
    other.write_text(json.dumps({"runs": [held]}))
    (row, _) = reproduction.preset_rows("samc/cifar100-10-mu-0.9")
    assert row[2] == "2,250 exemplars (here 2,112)"
    # So do their bytes and the time of two tasks.
    cost = {**icarl, "method": "gem", "nbytes": 103.4 * 2**20, "task_seconds": [9.2, 10.4, 30.0]}
    (tmp_path / "presets" / "samc-mini-imagenet-255.json").write_text(json.dumps({"runs": [cost]}))
    (row, _) = reproduction.preset_rows("samc/mini-imagenet-255")
    assert row[2] == "413 MiB, two tasks in 133 s (here 103 MiB, 20 s)"
    assert len(icarl["task_seconds"]) == 2
    assert sum(icarl["task_seconds"]) == pytest.approx(3600 * icarl["hours"])
    transfers = [part for part in text.split("<details>") if "BWT" in part]
    assert [part.split("code>")[1] for part in transfers] == ["dlcft</", "samc</"]
    assert all("| BWT |" in part for part in transfers)
    train("er", data, "lfs-2", run_dir=tmp_path / "plain", **short, **{"engine.progress": False})
    with pytest.raises(SystemExit, match="is no run of a preset"):
        reproduction.keep_preset(tmp_path / "plain")
