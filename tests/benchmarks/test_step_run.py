"""What times steps: figures are those of real epochs, kept by section, and shown beside peers'."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial

import growth
import pytest
import ranks
import step_run
import step_sections
import step_table
import torch
import torchvision_stand_in as stand_in
from backbones import ConvNet
from PIL import Image
from step_case import Epoch, Run, Work, peak_of

import fastcil.engine.parts
from fastcil.engine.online import leading

FACTS = {
    **dict.fromkeys(step_run.FACTS, "1"),
    "device": "cpu",
    "processor": "A CPU, 2 cores",
    "threads": 2,
    "commit": "abc",
}
DRAWN = Work(
    "drawn", "scenes:classes=6,size=32,train_per_class=8,test_per_class=1", "lfs-3", "6 images", 8
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fastcil.engine.parts, "make_backbone_builder", lambda *_: ConvNet)


@pytest.fixture
def run():
    return Run("foster+cim", replace(DRAWN, options={"cim.steps_per_class": 3.0}), "cpu")


def test_an_epoch_is_as_long_as_asked_for(run):
    epoch = run.epoch(3)
    lanes = 8 * (3 + 3 * run.stage.companions[0].steps)  # a mask step reads two batches
    assert epoch.seconds > 0 and 3 * 8 <= epoch.images <= 3 * lanes
    assert sum(epoch.phases.values()) >= epoch.seconds
    assert {"data", "forward", "backward", "optimiser", "addon"} <= set(epoch.phases)
    assert epoch.rate == epoch.images / epoch.seconds


@pytest.mark.parametrize("method", ["gem", "a-gem", "si"])
def test_gradients_that_a_step_takes_itself_are_backward(method, monkeypatch):
    """Of these the trainer's own backward pass is next to nothing."""
    wide = partial(ConvNet, (64, 128))
    monkeypatch.setattr(fastcil.engine.parts, "make_backbone_builder", lambda *_: wide)
    phases = Run(method, DRAWN, "cpu").epoch(3).phases
    assert phases["backward"] > 0.2 * sum(phases.values()), phases


def test_companions_keep_their_share(run):
    whole, companion = leading(run.stage).steps, run.stage.companions[0]
    assert companion.steps == 6 and whole > 2
    for steps in (1, 2, whole, 2 * whole):
        run.epoch(steps)
        assert companion.steps == round(6 * steps / whole)


def test_memory_is_put_back(run):
    before = run.parts.memory.checksum()
    seconds, held = run.remember("fp32")
    assert seconds > 0 and held >= 6 and run.parts.memory.checksum() == before
    assert run.remember("bf16")[1] >= 6


def test_bf16_is_bf16(run, monkeypatch):
    seen = []
    objective = run.stage.objective
    run.stage.objective = lambda batch: (
        seen.append(torch.is_autocast_enabled("cpu")) or objective(batch)
    )
    run.epoch(1, "fp32")
    assert seen and not any(seen)
    run.epoch(1, "bf16")
    assert any(seen)


def test_peak_counts_what_was_used():
    with peak_of(torch.device("cpu")) as peak:
        torch.ones(16 << 20).sum()
    assert peak() is None or 60 << 20 < peak() < 120 << 20


def test_growth_goes_through_tasks():
    points = growth.grow("finetune", DRAWN, "cpu", 1, 3)
    assert [point.ms > 0 for point in points] == [True] * 3
    assert points[0].trained < points[2].trained == points[2].held


@pytest.mark.parametrize(("values", "expected"), [([9, 1, 2, 3], 1.0), ([0, 4, 4, 4, 4], 0.0)])
def test_slope_leaves_the_first_task_out(values, expected):
    assert growth.slope(values) == expected


def test_a_part_keeps_its_own_limits():
    assert step_sections.part("a.npz", train_per_class=5) == "a.npz:train_per_class=5"
    told = step_sections.part("a:classes=4,train_per_class=2", train_per_class=5, test_per_class=1)
    assert told == "a:train_per_class=2,test_per_class=1,classes=4"


def test_summary_is_of_medians():
    epochs = [
        Epoch(s, 10, {"data": s / 2, "forward": s / 2}, p) for s, p in ((1, 5), (2, 9), (5, 7))
    ]
    found = step_sections.summary(epochs)
    assert found["rate"] == 5 and found["peak"] == 9
    assert found["shares"] == {"data": 0.5, "forward": 0.5}


def test_compiled_where_asked_for():
    given = argparse.Namespace(device="cpu", compiled="foster")
    assert "bf16 compiled" in step_sections.modes_of("foster", given)
    assert "bf16 compiled" not in step_sections.modes_of("gem", given)
    given.device = "cuda"
    assert "bf16 compiled" in step_sections.modes_of("gem", given)


def test_processes_that_share_a_run(monkeypatch):
    told = []
    monkeypatch.setattr(
        ranks,
        "learn",
        lambda count, settings: (
            told.append((count, settings))
            or {"average_accuracy": 50.0, "last_accuracy": 40.0, "seconds": 8.0 - 2 * count}
        ),
    )
    found = list(ranks.rows([1, 2], "a.npz", "cpu", {"engine.batch_size": 8}))
    assert [row["efficiency"] for row in found] == [1.0, 0.75]
    for count, (given, settings) in enumerate(told, start=1):
        assert given == count and settings["engine.batch_size"] == 8


@pytest.mark.slow
def test_real_processes_that_share_a_run():
    data = "scenes:classes=6,size=32,train_per_class=8,test_per_class=2"
    found = list(ranks.rows([1, 2], data, "cpu", {"engine.epoch_scale": 0.01}))
    assert [row["processes"] for row in found] == [1, 2]
    assert all(row["seconds"] > 0 and 0 <= row["last"] <= 100 for row in found)


ROWS = {
    "peers": [
        {
            "method": "foster",
            "steps": 2,
            "ways": {
                "PyCIL": {"rate": 100.0, "peak": 1 << 20},
                "fastcil, fp32": {"rate": 150.0, "peak": 2 << 20},
                "fastcil, bf16": {"rate": 50.0, "peak": None},
            },
            "read": {"PyCIL": 10.0, "fastcil": 20.0},
        }
    ],
    "mammoth": [
        {
            "method": "darkpp",
            "steps": 2,
            "ways": {
                "Mammoth": {"rate": 60.0, "peak": 3 << 20},
                "fastcil, fp32": {"rate": 75.0, "peak": 1 << 20},
            },
        }
    ],
    "memory": [
        {"way": "fastcil, fp32", "seconds": 2.0, "exemplars": 2000},
        {"way": "PyCIL", "seconds": 20.0, "exemplars": 2000},
    ],
    "methods": [
        {"method": "gem", "mode": "fp32", "rate": 5.0, "shares": {"data": 0.5}, "peak": None}
    ],
    "ranks": [
        {"processes": 2, "average": 50.0, "last": 41.25, "seconds": 99.6, "efficiency": 0.625}
    ],
}


def test_figures_are_kept_and_shown(tmp_path):
    path = tmp_path / "cpu.json"
    for section, rows in ROWS.items():
        step_run.keep(path, section, rows, FACTS, "make bench-steps")
    content = json.loads(path.read_text())
    assert set(content["sections"]) == set(ROWS)
    shown = step_table.with_table("a <!-- steps -->old<!-- /steps --> b", [content])
    assert "old" not in shown and shown.startswith("a ") and shown.endswith(" b")
    for line in (
        "| `foster` | fastcil, fp32 | 150 | 1.50 | 2 |",
        "| `foster` | fastcil, bf16 | 50 | 0.50 |  |",  # a peer that wins is shown too
        "| method | way | images/s | times Mammoth's | peak, MiB |",
        "| `darkpp` | Mammoth | 60 | 1.00 | 3 |",
        "| `darkpp` | fastcil, fp32 | 75 | 1.25 | 1 |",
        "| fastcil, fp32 | 2.00 | 10.0 | 2,000 |",
        "| `gem` | fp32 | 5 | 50.0% |",
        "| 2 | 50.0 | 41.2 | 100 | 62% |",
        "A CPU, 2 cores, 2 threads, torch 1, Python 1, commit abc.",
    ):
        assert line in shown


def test_figures_of_other_surroundings_go(tmp_path):
    path = tmp_path / "cpu.json"
    step_run.keep(path, "memory", ROWS["memory"], FACTS, "make")
    step_run.keep(path, "peers", ROWS["peers"], {**FACTS, "torch": "2"}, "make")
    assert set(json.loads(path.read_text())["sections"]) == {"peers"}


def test_a_readme_without_the_place():
    with pytest.raises(SystemExit, match="no place"):
        step_table.with_table("nothing", [])


class TestStandIn:
    """Transforms in torchvision's place do what theirs are documented to do."""

    image = Image.fromarray(torch.arange(48 * 32 * 3).view(48, 32, 3).to(torch.uint8).numpy())

    def test_crop_with_padding(self):
        torch.manual_seed(0)
        crops = [stand_in.RandomCrop(32, padding=4)(self.image) for _ in range(8)]
        assert {crop.size for crop in crops} == {(32, 32)}
        assert len({crop.tobytes() for crop in crops}) > 1

    def test_resized_crop(self):
        crop = stand_in.RandomResizedCrop(16)
        assert crop(self.image).size == (16, 16)
        for _ in range(50):
            x0, y0, x1, y1 = crop._box(32, 48)
            assert 0 <= x0 < x1 <= 32 and 0 <= y0 < y1 <= 48
            assert 0.06 < (x1 - x0) * (y1 - y0) / (32 * 48) <= 1

    def test_resize_and_centre(self):
        assert stand_in.Resize(16)(self.image).size == (16, 24)
        assert (
            stand_in.CenterCrop(8)(self.image).tobytes()
            == self.image.crop((12, 20, 20, 28)).tobytes()
        )

    def test_flip_and_tensor(self):
        flipped = stand_in.RandomHorizontalFlip(1.0)(self.image)
        tensor, back = stand_in.ToTensor()(self.image), stand_in.ToTensor()(flipped)
        assert tensor.shape == (3, 48, 32) and torch.equal(back.flip(2), tensor)
        assert float(tensor.max()) <= 1.0 and tensor.dtype == torch.float32

    def test_jitter_and_normalise(self):
        torch.manual_seed(0)
        grey = Image.new("RGB", (4, 4), (100, 100, 100))
        levels = {stand_in.ColorJitter(0.25)(grey).getpixel((0, 0))[0] for _ in range(40)}
        assert 75 <= min(levels) < 95 and 105 < max(levels) <= 125
        half = stand_in.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        assert torch.equal(half(torch.ones(3, 1, 1)), torch.full((3, 1, 1), 2.0))

    def test_compose(self):
        both = stand_in.Compose([stand_in.Resize(16), stand_in.ToTensor()])
        assert both(self.image).shape == (3, 24, 16)
