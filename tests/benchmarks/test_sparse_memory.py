"""The script that counts sparse exemplars: its sums, and all of it on next to nothing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import sparse_memory
import torch
from sparse_memory import RULED_AT, RULES, THRESHOLDS, Filled, Room

from fastcil.data import ImageStore


def test_room_by_hand() -> None:
    """Two images of 4 x 4, of which 4 pixels and 1 are kept: in coordinates 5 bytes each."""
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, ::5], masks[1, 3] = True, True
    room = Room()
    for one in masks:
        room.add(one, torch.tensor([[4, 4]]))
    counts = room.counts()
    assert counts["paper"] == pytest.approx(10 * 32 / 5)
    assert counts["coo"] == pytest.approx(10 * 2 * (48 + 28) / (5 * 5 + 2 * 13))
    assert counts["bitmask"] == pytest.approx(10 * 2 * (48 + 28) / (3 * 5 + 2 * 2 + 2 * 13))
    assert counts["smallest"] >= max(counts["coo"], counts["runs"], counts["bitmask"])


def test_what_a_rule_fills_by_hand() -> None:
    images = ImageStore.from_batch(torch.full((2, 4, 4, 3), 51, dtype=torch.uint8))
    masks = torch.arange(32) % 4 == 0
    filled = {rule: Filled() for rule in RULES}
    for rule, each in filled.items():
        each.add(images, masks, rule)
        assert (each.images, each.values) == (2, 3 * 24) and each.seconds > 0
    assert filled["zero"].figures()["psnr"] == pytest.approx(13.979, abs=1e-3)  # a fifth of 255
    assert filled["diffusion"].figures()["psnr"] is None


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    data = "scenes:classes=10,size=32,train_per_class=3,test_per_class=1"
    given = [f"--data={data}", "--tasks=2", f"--out={tmp_path}"]
    try:
        sparse_memory.main(given)
        sparse_memory.main([*given, "--saliency=predicted", "--norms=batch"])
    finally:
        torch.set_num_threads(threads)
    (file,) = tmp_path.iterdir()
    assert capsys.readouterr().out.endswith(f"{file}\n")
    sections = json.loads(file.read_text())["sections"]
    assert list(sections) == ["label, running", "predicted, batch"]
    tables = []
    for name, section in sections.items():
        saliency, norms = name.split(", ")
        assert section["command"].endswith(f"--saliency {saliency} --norms {norms}")
        rows = section["rows"]["thresholds"]
        assert [row["threshold"] for row in rows] == list(THRESHOLDS)
        assert rows[0]["paper"] == pytest.approx(10) and rows[-1]["paper"] > 10
        assert all(a["paper"] <= b["paper"] for a, b in pairwise(rows))
        rules = {row.pop("rule"): row for row in section["rows"][f"rules at mu {RULED_AT}"]}
        assert tuple(rules) == RULES
        assert all(rules[rule]["psnr"] > rules["zero"]["psnr"] for rule in RULES[:3])
        assert all(row["ms_per_image"] >= 0 for row in rules.values())
        tables.append(rows)
    assert tables[0] != tables[1], "another saliency drops other pixels"
