"""The scripts for a GPU go through on the CPU, by the small form that their docstrings give."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import growth
import kept
import pytest
from backbones import ConvNet

import fastcil.engine.parts

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


def small_form(script: str, doc: str) -> list[str]:
    """The arguments that the docstring names for the CPU."""
    words = shlex.split(" ".join(doc.split()).partition("on the CPU: ")[2])
    assert words[:2] == ["--device", "cpu"], f"{script} has no form for the CPU"
    return words


def go(script: str, out: Path, more: list[str], patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs a script's main; what it kept."""
    patch.setattr(fastcil.engine.parts, "make_backbone_builder", lambda *_: ConvNet)
    module = runpy.run_path(str(GPU / script))
    given = [*small_form(script, module["__doc__"]), "--out", str(out), *more]
    patch.setattr(sys, "argv", [script, *given])
    module["main"]()
    (file,) = out.glob("*.json")
    content: dict[str, Any] = json.loads(file.read_text())
    assert content["command"] == " ".join([script, *given])
    assert set(content["environment"]) == set(kept.FACTS)
    return content


def test_steps(tmp_path, monkeypatch, capsys) -> None:
    more = ["--methods", "gem", "--rounds", "1"]
    rows = go("steps.py", tmp_path, more, monkeypatch)["rows"]
    assert [(row["method"], row["mode"]) for row in rows] == [("gem", "fp32"), ("gem", "bf16")]
    for row in rows:
        assert row["images/s"] > 0
        shares = {name: share for name, share in row.items() if name.endswith(", %")}
        assert {"data, %", "forward, %", "backward, %", "optimiser, %"} <= shares.keys()
        assert sum(shares.values()) == pytest.approx(100, abs=1)
    assert any("images/s" in line for line in capsys.readouterr().out.splitlines())


def test_whole_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(growth, "METHODS", ("finetune", "der"))
    rows = go("whole_runs.py", tmp_path, ["--methods", "foster+cim"], monkeypatch)["rows"]
    runs, grown = rows[:2], rows[2:]
    assert [(row["method"], row["task"]) for row in runs] == [("foster+cim", 1), ("foster+cim", 2)]
    assert all(row["memory update, s"] > 0 and row["evaluation, s"] > 0 for row in runs)
    assert runs[1]["addon, s"] > 0 and runs[1]["exemplars"] > 0
    assert [row["method"] for row in grown] == ["finetune, growth", "der, growth"]
    assert all(row["ms, task 2"] > 0 and row["ms, task 3"] > 0 for row in grown)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["steps.py", "whole_runs.py"])
def test_every_method_of_the_small_form(script: str, tmp_path, monkeypatch) -> None:
    methods = {row["method"] for row in go(script, tmp_path, [], monkeypatch)["rows"]}
    assert {"finetune", "icarl", "der", "foster", "foster+cim"} <= methods


def test_what_is_kept_is_what_is_shown(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["some.py", "--rounds", "2", "--out", str(tmp_path)])
    given = kept.arguments("What it does.", rounds=3, data="cifar100")
    assert vars(given) == {"device": "cuda", "out": tmp_path, "rounds": 2, "data": "cifar100"}
    given.device = "cpu"
    rows = [{"method": "er", "s": 1234.5678}, {"method": "der", "MiB": None, "n": 3}]
    path = kept.keep("folder/some.py", rows, given)
    assert path.parent == tmp_path and path.name.startswith("some-")
    assert json.loads(path.read_text())["rows"] == rows
    kept.show(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["method", "s", "MiB", "n"], ["er", "1,235"], ["der", "3"]]
    monkeypatch.setattr(sys, "argv", ["some.py", "--rounds", "few"])
    with pytest.raises(SystemExit):
        kept.arguments("What it does.", rounds=3)
