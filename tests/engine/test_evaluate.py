"""Hits among all classes and among those of an image's own task, against lists sorted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcil.data import Examples, ImageStore
from fastcil.engine.evaluate import count_correct, same_task

SIZES = (3, 7, 0, 2, 1)
CLASSES = sum(SIZES)
TASK = [t for t, size in enumerate(SIZES) for _ in range(size)]


class Scored(torch.nn.Module):
    """A method whose scores of an image are looked up by the image's first two bytes."""

    def __init__(self, tables: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tables = tables

    def readouts(self):
        return {name: lambda rows, t=table: t[rows] for name, table in self.tables.items()}


class Reader:
    """A context that hands over row numbers in place of images, a few at a time."""

    device = torch.device("cpu")

    def scan_labelled(self, function, examples, look):
        rows = torch.arange(len(examples))
        parts = [function(r, examples.labels[r], r) for r in rows.split(7)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def hits(scores, labels, tasks):
    """Correct per class among the candidates of each image, by sorting a list."""
    found = {"top1": [0] * CLASSES, "top5": [0] * CLASSES, "count": [0] * CLASSES}
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        among = [c for c in range(CLASSES) if tasks is None or TASK[c] == TASK[label]]
        ranked = sorted(among, key=lambda c: -row[c])
        found["top1"][label] += ranked[0] == label
        found["top5"][label] += label in ranked[:5]
        found["count"][label] += 1
    return found


def make(scores, labels):
    store = ImageStore.from_batch(np.zeros((len(labels), 1, 1, 3), np.uint8))
    return Scored(scores), Examples(store, labels)


@pytest.mark.parametrize("tasks", [None, SIZES])
def test_hits_are_those_of_sorted_lists(tasks) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (60,), generator=generator)
    scores = {
        name: torch.randn(60, CLASSES, generator=generator, dtype=torch.float64)
        + torch.nn.functional.one_hot(labels, CLASSES)
        for name in ("linear", "nme")
    }
    method, examples = make(scores, labels)
    found = count_correct(method, Reader(), examples, CLASSES, tasks)
    assert found == {name: hits(table, labels, tasks) for name, table in scores.items()}
    for name in scores:
        one, five = sum(found[name]["top1"]), sum(found[name]["top5"])
        assert 0 < one < five <= 60


def test_knowing_the_task_never_hurts_and_settles_tasks_of_one_class() -> None:
    labels = torch.arange(CLASSES)
    scores = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(1))
    method, examples = make({"linear": scores}, labels)
    among_all = count_correct(method, Reader(), examples, CLASSES)["linear"]
    own = count_correct(method, Reader(), examples, CLASSES, SIZES)["linear"]
    assert all(a >= b for a, b in zip(own["top1"], among_all["top1"], strict=True))
    assert own["top1"][-1] == 1, "its task has no other class"
    small = [c for c in range(CLASSES) if SIZES[TASK[c]] <= 5]
    assert all(own["top5"][c] == 1 for c in small)


def test_a_score_of_minus_infinity_is_last_of_its_task_but_before_other_tasks() -> None:
    """Nearest means score -inf where no exemplar is kept."""
    scores = torch.zeros(2, CLASSES)
    scores[:, 10] = -math.inf  # of the task of classes 10 and 11
    method, examples = make({"nme": scores}, torch.tensor([10, 11]))
    found = count_correct(method, Reader(), examples, CLASSES, SIZES)["nme"]
    assert found["top1"][10:12] == [0, 1] and found["top5"][10:12] == [1, 1]


def test_scores_that_are_not_numbers_are_no_hits() -> None:
    scores = torch.full((CLASSES, CLASSES), math.nan)
    method, examples = make({"linear": scores}, torch.arange(CLASSES))
    found = count_correct(method, Reader(), examples, CLASSES, SIZES)["linear"]
    assert sum(found["top1"]) <= len([size for size in SIZES if size])


def test_classes_of_one_task() -> None:
    expected = [[a == b for b in TASK] for a in TASK]
    assert same_task(SIZES).tolist() == expected
    assert same_task([2]).all()
