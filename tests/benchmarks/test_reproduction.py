"""Kept figures: taken from finished runs, told with where they come from, shown in the README."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from fastcil.engine.arguments import parse_run
from fastcil.engine.compare import compare

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "reproduction"
SETTINGS = sorted(FOLDER.glob("*.yaml"))
KEPT = sorted(FOLDER.glob("*.json"))


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
    assert re.fullmatch("[0-9a-f]{12}", content["environment"]["commit"]), "of a clean tree"
    assert not re.search(r'"[^"]*(/home|/root|/tmp|/work|/Users)', text)
    assert list(content["per_seed"]) == content["config"]["methods"]


def test_the_readme_shows_what_is_kept(reproduction: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert reproduction.with_tables(readme) == readme, "python benchmarks/reproduction.py tables"


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
    readme = reproduction.with_tables("a <!-- tiny -->\nold\n<!-- /tiny --> b")
    assert readme.startswith("a <!-- tiny -->\n| method |") and readme.endswith("<!-- /tiny --> b")
    assert "\n| `finetune` | " in readme and content["environment"]["commit"] in readme
    with pytest.raises(SystemExit, match="no place"):
        reproduction.with_tables("nothing")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**config, "seeds": [0]}))
    with pytest.raises(SystemExit, match="does not hold the seeds"):
        reproduction.keep("tiny", tmp_path / "runs")
