"""Timing of the ops: what is wrong is not timed, figures are kept with where they come from."""

from __future__ import annotations

import json
import time

import pytest
import run
from clocks import in_turn
from op_case import OpCase


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
    # Figures of another commit are not mixed with these.
    run.keep(path, [row], FACTS | {"commit": "def"})
    assert len(json.loads(path.read_text())["cases"]) == 1


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
        assert {"commit", "torch", "processor", "rounds", "peers"} <= set(content["environment"])
