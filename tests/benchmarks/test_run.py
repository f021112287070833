"""Timing of the ops: what is wrong is not timed, figures are kept with where they come from."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace

import pytest
import run
from clocks import in_turn
from op_case import Group, OpCase


def wait(milliseconds):
    return lambda: time.sleep(milliseconds / 1e3)


def make(name, full):
    assert name != "peer that errs"
    return {"fastcil": wait(1), "slow peer": wait(4), "absent peer": None}[name]


CASE = OpCase(
    "pade",
    "forward and backward, 64x64x56x56",
    ("fastcil", "slow peer", "peer that errs", "absent peer"),
    make,
    aims={"slow peer": 100, "absent peer": 2},
)
FACTS = {"processor": "A CPU, 2 cores", "device": "cpu", "torch": "2.13.0", "python": "3.11"}
FACTS |= {"rounds": 3, "commit": "abc", "peers": {"pillow": "12"}}


@pytest.fixture
def row():
    return run.measure(CASE, 3)


def test_ways_are_timed_if_they_are_there_and_right(row):
    assert set(row["ways"]) == {"fastcil", "slow peer"} and row["wrong"] == ["peer that errs"]
    for ms, least in ((row["ways"]["fastcil"], 1), (row["ways"]["slow peer"], 4)):
        assert least <= ms["min"] <= ms["median"]
    (line,) = run.missed(row)
    assert "slow peer" in line and "aim 100" in line


def test_each_round_begins_with_another_way():
    steps = {"a": None, "b": None, "c": None}
    assert "".join(way for way, _ in in_turn(steps, 4)) == "abcbcacababc"


def test_ours_must_be_right():
    def wrong(name, full):
        raise AssertionError("another result")

    with pytest.raises(AssertionError, match="another result"):
        run.measure(OpCase("pade", "", ("fastcil",), wrong), 1)


def test_figures_are_kept_and_shown(row, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    path = run.file_of(FACTS)
    assert path.name == "a-cpu-2-cores.json"
    other = row | {"name": "second order, 16x64x56x56"}
    run.keep(path, [other], FACTS)
    run.keep(path, [row], FACTS)
    content = json.loads(path.read_text())
    assert [kept["name"] for kept in content["cases"]] == [row["name"], other["name"]]
    readme = run.with_table("before <!-- ops -->\nold\n<!-- /ops --> after")
    assert readme.startswith("before <!-- ops -->") and readme.endswith("<!-- /ops --> after")
    ratio = row["ways"]["slow peer"]["min"] / row["ways"]["fastcil"]["min"]
    assert f"slow peer {ratio:.1f} (" in readme and "peer that errs: wrong result" in readme
    assert "commit abc" in readme and "old" not in readme
    # Those of another commit say so, and one more peer does not matter.
    more = FACTS | {"commit": "def", "peers": {"kornia": "1"}}
    run.keep(path, [row], more)
    content = json.loads(path.read_text())
    assert [kept["commit"] for kept in content["cases"]] == ["def", "abc"]
    assert content["environment"]["peers"] == {"pillow": "12", "kornia": "1"}
    assert f"commits def (`{row['op']}`), abc (`{row['op']}`)" in run.table(content)
    # Figures of other versions are not mixed with these.
    for other in ({"torch": "9"}, {"peers": {"pillow": "13"}}):
        run.keep(path, [row, {**row, "name": "second order, 16x64x56x56"}], FACTS)
        run.keep(path, [row], FACTS | other)
        assert len(json.loads(path.read_text())["cases"]) == 1


def grouped(name, ours, *others, group="batch 8"):
    """A row of two packages and a way that is none."""
    ways = {"fastcil": ours, "naive": 0.1, **dict(zip(("one", "two"), others, strict=False))}
    return {
        "op": "conv_input_factor",
        "name": name,
        "group": {"name": group, "peers": ["one", "two"], "aim": 8},
        "ways": {way: {"min": ms, "median": 2 * ms} for way, ms in ways.items()},
        "wrong": [],
    }


def test_of_groups_the_geometric_mean_beside_the_best_package_is_told(row):
    rows = [row, grouped("a", 1.0, 4.0, 6.0), grouped("b", 1.0, 40.0, 36.0)]
    rows += [grouped("c", 1.0, 64.0, group="batch 32"), grouped("d", 1.0, group="none installed")]
    (eight, above), (thirty_two, reached) = run.geometric_means(rows)
    assert "batch 8" in eight and " 12 (12) times" in eight and "mean of 2" in eight and above
    assert "batch 32" in thirty_two and " 64 (64) times" in thirty_two and reached
    (_, reached) = run.geometric_means([grouped("a", 1.0, 7.9, 20.0)])[0]
    assert not reached


def test_what_ours_did_is_noted():
    case = OpCase(
        "pade", "", ("fastcil",), make, note=lambda: "lags", group=Group("all", ("peer",), 2)
    )
    row = run.measure(case, 1)
    assert json.loads(json.dumps(row))["group"] == {"name": "all", "peers": ["peer"], "aim": 2}
    assert "(lags)" in run.table(
        {"cases": [row | {"commit": "abc"}], "environment": FACTS, "command": "make bench"}
    )


def test_every_kept_case_is_one_there_is():
    known = {
        device: [(case.op, case.name) for case in run.CASES if case.device == device]
        for device in run.CLOCKS
    }
    assert all(len(set(names)) == len(names) for names in known.values())
    for path in run.RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        names = set(known["cpu" if content["environment"]["device"] == "cpu" else "cuda"])
        assert set() < {(row["op"], row["name"]) for row in content["cases"]} <= names
        assert all(re.fullmatch("[0-9a-f]{12}", row["commit"]) for row in content["cases"])
        assert {"torch", "processor", "rounds", "peers"} <= set(content["environment"])


def test_a_case_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    def broken(name, full):
        raise RuntimeError("no such instruction")

    bad = OpCase("pade", "broken", ("fastcil",), broken)
    monkeypatch.setattr(run, "CASES", (bad, replace(CASE, aims={})))
    out = tmp_path / "new"
    monkeypatch.setattr(sys, "argv", ["run.py", "time", "--rounds", "1", "--out", str(out)])
    with pytest.raises(SystemExit, match="failed: pade, broken"):
        run.main()
    (kept,) = out.iterdir()
    assert [row["name"] for row in json.loads(kept.read_text())["cases"]] == [CASE.name]
    assert "no such instruction" in capsys.readouterr().err
