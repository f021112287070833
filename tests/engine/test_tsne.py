"""The layout of features in the plane, and the record of it in runs and reports."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import FastcilError, train
from fastcil.engine.compare import Comparison
from fastcil.engine.report import render_report
from fastcil.engine.tsne import MOST, TITLE, _draw, lay_out

OPTIONS = {"engine.epoch_scale": 0.01, "engine.progress": False, "augment.size": 12}


def test_clouds_stay_apart_and_the_same_seed_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.cat([torch.randn(30, 5, generator=generator) + 20 * k for k in range(2)])
    places = lay_out(features, seed=1)
    assert places.shape == (60, 2) and torch.equal(places, lay_out(features, seed=1))
    near = torch.cdist(places, places).fill_diagonal_(torch.inf).argmin(1)
    assert bool(((near < 30) == (torch.arange(60) < 30)).all())
    assert lay_out(torch.zeros(9, 3), seed=0).isfinite().all()


def test_no_more_than_1024_are_drawn() -> None:
    drawn = _draw(torch.arange(5000), torch.Generator().manual_seed(0))
    assert len(drawn) == len(drawn.unique()) == MOST == 1024
    assert torch.equal(_draw(torch.arange(7), torch.Generator()), torch.arange(7))


def data() -> tuple[tuple[np.ndarray, list[int]], ...]:
    rng = np.random.default_rng(0)
    labels = [label for label in range(5) for _ in range(3)]
    images = rng.integers(0, 256, (15, 12, 12, 3), np.uint8)
    return (images, labels), (images, labels)


def test_a_run_leaves_it_after_the_last_task(tmp_path: Path) -> None:
    options = {**OPTIONS, "engine.tsne": True}
    runs = [
        train("er", data(), "b3-inc1", "5 images", backbone=ConvNet, **options) for _ in range(2)
    ]
    found = [
        [r for task in run.outcomes[0].tasks for r in task.records if r["title"] == TITLE]
        for run in runs
    ]
    assert found[0] == found[1]
    (record,) = found[0]
    assert record in runs[0].outcomes[0].tasks[-1].records
    points = record["payload"]["points"]
    assert {name: len(rows) for name, rows in points.items()} == {
        "base classes": 9,
        "new classes": 6,
    }
    text = render_report(Comparison({"er": runs[0]}))
    assert f"er: {TITLE}" in text and "base classes" in text


def test_without_scikit_learn_it_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec

    def find(name: str, *rest: object) -> object:
        return None if name == "sklearn" else there(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(FastcilError, match="needs the package scikit-learn"):
        train("er", data(), "b3-inc1", backbone=ConvNet, **{**OPTIONS, "engine.tsne": True})
