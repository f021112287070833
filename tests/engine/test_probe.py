"""Nearest neighbours against lists sorted by hand, and the probe as a readout of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import FastcilError, Result, train
from fastcil.contract import evaluating
from fastcil.data import Dataset, Examples, ImageStore
from fastcil.engine.compare import Comparison
from fastcil.engine.probe import NearestNeighbours
from fastcil.engine.report import render_report
from fastcil.engine.seed_run import SeedRun

OPTIONS = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 8,
    "engine.progress": False,
    "augment.size": 12,
    "engine.knn": 3,
}
CLASSES = ("ant", "bee", "cat", "dog", "elk")


def ranking(query, features, labels, k, among):
    """Classes by votes of the k nearest, then by the nearest image, the best one first."""
    rows = [i for i, label in enumerate(labels) if label in among]
    cosine = {
        i: float(query @ features[i] / (np.linalg.norm(query) * np.linalg.norm(features[i])))
        for i in rows
    }
    voters = sorted(rows, key=lambda i: -cosine[i])[:k]
    votes = {c: sum(labels[i] == c for i in voters) for c in among}
    closest = {c: max([-1.0, *(cosine[i] for i in rows if labels[i] == c)]) for c in among}
    return sorted(among, key=lambda c: (-votes[c], -closest[c]))


@pytest.mark.parametrize("tasks", [(6,), (2, 3, 1)])
@pytest.mark.parametrize("k", [1, 4, 7, 1000])
@pytest.mark.parametrize("chunk", [1, 5, 16384])
def test_votes_are_those_of_sorted_lists(tasks, k, chunk):
    rng = np.random.default_rng(k)
    features, queries = rng.normal(size=(40, 3)), rng.normal(size=(25, 3))
    labels = np.concatenate([np.arange(5), rng.integers(0, 5, 35)])  # none of class 5
    nearest = NearestNeighbours(
        torch.from_numpy(features), torch.from_numpy(labels), k, tasks, chunk
    )
    scores = nearest(torch.from_numpy(queries))
    assert scores.shape == (25, 6) and scores.dtype == torch.float64
    start = 0
    for size in tasks:
        among = list(range(start, start + size))
        start += size
        order = scores[:, among].argsort(dim=1, descending=True, stable=True)
        expected = [ranking(q, features, labels, k, among) for q in queries]
        assert [[among[c] for c in row] for row in order.tolist()] == expected


def test_ties_go_to_the_nearer_and_length_says_nothing():
    features = torch.tensor([[10.0, 1.0], [9.0, -2.0], [0.01, 0.002], [0.0, 1.0]])
    labels = torch.tensor([1, 0, 0, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert NearestNeighbours(features, labels, 2, [2])(query).argmax() == 1
    assert NearestNeighbours(features, labels, 3, [2])(query).argmax() == 0
    assert NearestNeighbours(features, labels, 4, [2])(query).argmax() == 1


def test_no_neighbour():
    with pytest.raises(FastcilError, match="k is 0"):
        NearestNeighbours(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), 0, [1])
    with pytest.raises(FastcilError, match=r"engine\.knn is -1"):
        train("finetune", **{"engine.knn": -1})


def part(per_class: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    labels = [c for c in range(len(CLASSES)) for _ in range(per_class + c % 2)]
    colours = np.random.default_rng(1).uniform(60, 195, (len(CLASSES), 1, 1, 3))
    images = rng.normal(colours[labels], 45, (len(labels), 12, 12, 3)).clip(0, 255)
    return Examples(ImageStore.from_batch(images.astype(np.uint8)), torch.tensor(labels))


DATA = Dataset("beasts", part(7, 0), part(4, 1), CLASSES)


def run(method: str = "er", scenario: str = "lfs-2", **changes: Any) -> Result:
    arguments = {"data": DATA, "memory": "10 images", "backbone": ConvNet}
    return train(method, scenario=scenario, **{**arguments, **OPTIONS, **changes})


@pytest.mark.parametrize("scenario", ["lfs-2", "task-2", "data-3"])
def test_a_run_s_readout_compares_with_all_training_images(scenario):
    result = run(scenario=scenario)
    learner = result.learner
    place = [learner.class_names.index(name) for name in CLASSES]
    features = {}
    with evaluating(learner.method):
        for name, examples in (("train", DATA.train), ("test", DATA.test)):
            seen = learner.parts.context.scan(learner.method.embed, examples)
            features[name] = seen.double().numpy()
    labels = [place[c] for c in DATA.train.labels.tolist()]
    groups = [[0, 1, 2], [3, 4]] if scenario == "task-2" else [[0, 1, 2, 3, 4]]
    top1 = [0] * 5
    for query, label in zip(features["test"], DATA.test.labels.tolist(), strict=True):
        among = next(group for group in groups if place[label] in group)
        best = ranking(query, features["train"], labels, 3, among)
        top1[place[label]] += best[0] == place[label]
    last = result.outcomes[0].tasks[-1]
    assert last.correct["knn"]["top1"] == top1 and sum(top1) > 0
    assert last.correct["knn"]["top5"] == last.correct["knn"]["count"]
    assert result.readouts == ["linear", "knn"]
    assert result.matrix("knn").shape == (len(result.outcomes[0].tasks),) * 2


def test_before_the_last_task_only_known_classes_take_part():
    result = run()
    first = result.outcomes[0].tasks[0].correct["knn"]
    assert len(first["top1"]) == 3 and sum(first["count"]) == 13


def test_it_changes_nothing_else(assert_same):
    with_probe, without = run(), run(**{"engine.knn": 0})
    assert without.readouts == ["linear"]
    for a, b in zip(with_probe.outcomes[0].tasks, without.outcomes[0].tasks, strict=True):
        assert a.correct["linear"] == b.correct["linear"]
    assert_same(with_probe.learner.method.tensors(), without.learner.method.tensors())


def test_a_method_s_own_readouts_come_first_and_the_report_shows_it():
    result = run("icarl")
    assert result.readouts == ["nme", "linear", "knn"]
    rows = Comparison({"icarl": result}).rows()
    assert [row.readout for row in rows] == ["nme", "linear", "knn"]
    assert "knn" in render_report(Comparison({"icarl": result}))


def test_a_stopped_run_goes_on_with_it(tmp_path: Path, monkeypatch):
    whole = run(run_dir=tmp_path / "whole")
    measure, calls = SeedRun._measure, []

    def stopped(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, *args)

    monkeypatch.setattr(SeedRun, "_measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(run_dir=tmp_path / "stopped")
    resumed = run(run_dir=tmp_path / "stopped")
    for a, b in zip(whole.outcomes[0].tasks, resumed.outcomes[0].tasks, strict=True):
        assert a.correct == b.correct
    with pytest.raises(FastcilError, match=r"engine\.knn was 3, now 5"):
        run(run_dir=tmp_path / "stopped", **{"engine.knn": 5})
