"""Balanced subsets: of every class as many images."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcil.contract import Task
from fastcil.data import Examples, ImageStore
from fastcil.memory.balance import balanced_subset, herded_subset
from fastcil.memory.selection import herding


@pytest.mark.parametrize("counts", [[3], [4, 2, 9], [1, 1], [0, 5, 3], [7, 0, 2, 0, 2]], ids=str)
def test_balanced_subset(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]
    smallest = min(c for c in counts if c)
    expected = {y: smallest for y, c in enumerate(counts) if c}
    drawn = [balanced_subset(labels, seed) for seed in range(8)]
    for subset in drawn:
        assert Counter(labels[subset].tolist()) == expected
        assert torch.equal(subset, subset.unique())
    assert torch.equal(drawn[3], balanced_subset(labels, 3))
    if len(set(counts) - {0}) > 1:
        assert len({tuple(s.tolist()) for s in drawn}) > 1


def test_balanced_subset_of_nothing():
    assert balanced_subset(torch.empty(0, dtype=torch.int64), 0).shape == (0,)


def test_balanced_subset_is_uniform():
    """Every image of a large class is drawn equally often."""
    labels = torch.tensor([0] * 6 + [1] * 2)
    hits = torch.zeros(8)
    for seed in range(600):
        hits[balanced_subset(labels, seed)] += 1
    assert hits[6:].tolist() == [600, 600]
    assert ((hits[:6] / 600 - 1 / 3).abs() < 0.08).all()


def some(labels: list[int]) -> Examples:
    """Images of one pixel, its red the image's number."""
    pixels = np.zeros((len(labels), 1, 1, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(len(labels))
    return Examples(ImageStore.from_batch(pixels), torch.tensor(labels, dtype=torch.int64))


def embed(examples: Examples) -> Tensor:
    """Features that depend on the image alone."""
    number = examples.images.pixels[::3].double()
    return torch.stack([number.cos(), number.sin(), (2.7 * number).cos()], 1)


@pytest.mark.parametrize(
    "old, new",
    [
        ([0, 0, 1, 1], [2, 3, 2, 3, 2, 3, 2]),
        ([0, 0, 0, 1], [2] * 3 + [3] * 5),
        ([0, 0, 0, 0, 0], [1, 1]),
    ],
    ids=str,
)
def test_new_classes_get_as_many_as_the_old_have(old, new) -> None:
    examples, exemplars = some(new), some(old)
    known, classes = len(set(old)), tuple(sorted(set(new)))
    task = Task(index=1, classes=classes, known=known, examples=examples, exemplars=exemplars)
    chosen = herded_subset(task, embed)
    assert torch.equal(chosen, chosen.unique())
    assert chosen[chosen >= len(new)].tolist() == list(range(len(new), len(new) + len(old)))
    most = max(Counter(old).values())
    for label in classes:
        mine = torch.tensor([k for k, y in enumerate(new) if y == label])
        order = herding(embed(examples.select(mine)), most)
        wanted = mine[order] if len(mine) > most else mine
        picked = chosen[chosen < len(new)]
        assert set(picked[examples.labels[picked] == label].tolist()) == set(wanted.tolist())


def test_all_images_without_any_exemplar() -> None:
    examples = some([0, 1, 1])
    task = Task(0, (0, 1), 0, examples, examples.select(torch.arange(0)))
    assert herded_subset(task, embed).tolist() == [0, 1, 2]
