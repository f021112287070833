"""What a GPU's scripts end with: figures are kept part by part, whatever becomes of a part."""

from __future__ import annotations

import json
from argparse import Namespace

import kept
import pytest


def test_a_part_that_fails_is_named_and_the_others_are_kept(tmp_path, capsys):
    given = Namespace(device="cpu", out=tmp_path / "results")
    seen = []

    def fine(name):
        # What came before is there already, should this one be stopped.
        seen.append([json.loads(path.read_text())["rows"] for path in given.out.glob("*.json")])
        return [{"method": name, "images/s": 2.0}]

    def broken():
        raise RuntimeError("an illegal memory access")

    parts = {"a": lambda: fine("a"), "b": broken, "c": lambda: fine("c")}
    with pytest.raises(SystemExit, match="failed: b;"):
        kept.run_parts("steps.py", parts, given)
    assert seen == [[], [[{"method": "a", "images/s": 2.0}]]]
    (path,) = given.out.glob("*.json")
    content = json.loads(path.read_text())
    assert [row["method"] for row in content["rows"]] == ["a", "c"]
    assert set(content["environment"]) == set(kept.FACTS)
    shown = capsys.readouterr()
    assert "an illegal memory access" in shown.err and "images/s" in shown.out
