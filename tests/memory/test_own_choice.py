"""A memory that a method fills itself, and the room it is told of before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from streams import arrays, buffers_nbytes, draw, stream

from fastcil.contract import Task
from fastcil.errors import FastcilError
from fastcil.memory import Budget, Memory, likely_room, make_codec


def no_features(examples):
    pytest.fail("asked for features")


@pytest.mark.parametrize("codec", ["raw", "bbox"])
@pytest.mark.parametrize("text", ["20 images", "3 images/class", "15000 B", "unlimited", "700 B"])
def test_the_longest_prefix_of_the_choice_is_kept_in_its_order(text, codec):
    memory, coder, budget = Memory(text, codec, "own"), make_codec(codec), Budget.parse(text)
    rng = np.random.default_rng(0)
    held: list[tuple[np.ndarray, int, float]] = []
    for task, boxes in stream(1):
        new = len(task.examples)
        # Some are chosen twice, new ones and old ones mixed.
        chosen = torch.from_numpy(rng.integers(0, new + len(memory), 60))
        encoded = coder.encode(task.examples.images, boxes)
        costs = coder.nbytes(encoded) if budget.unit == "bytes" else coder.units(encoded)
        labels = task.examples.labels.tolist()
        there = [(a, labels[k], float(costs[k])) for k, a in enumerate(arrays(encoded))] + held
        held, left = [], budget.limit(task.total) - (100 if budget.unit == "bytes" else 0)
        for position in chosen.tolist():
            left -= there[position][2]
            if left < -1e-9:
                break
            held.append(there[position])
        memory.update(task, no_features, boxes, chosen=chosen, other_nbytes=100)
        found = memory.examples()
        assert found.labels.tolist() == [label for _, label, _ in held]
        for mine, (theirs, _, _) in zip(arrays(found.images), held, strict=True):
            assert np.array_equal(mine, theirs)
        assert memory.counts(task.total) == [
            sum(label == c for _, label, _ in held) for c in range(task.total)
        ]
        assert memory.nbytes == buffers_nbytes(memory)
        twin = Memory(text, codec, "own")
        twin.restore(memory.state())
        assert twin.checksum() == memory.checksum()


@pytest.mark.parametrize("chosen", [None, torch.tensor([0, 99]), torch.tensor([-1])])
def test_a_choice_that_is_none_is_a_sentence(chosen):
    (task, _), *_ = stream(0)
    memory = Memory("5 images", selection="own")
    with pytest.raises(FastcilError, match="with selection 'own' it must be positions below"):
        memory.update(task, no_features, chosen=chosen)
    assert len(memory) == 0


def test_nothing_chosen_is_nothing_kept():
    (task, _), *_ = stream(0)
    memory = Memory("5 images", selection="own")
    memory.update(task, no_features, chosen=torch.arange(4))
    memory.update(task, no_features, chosen=torch.empty(0, dtype=torch.int64))
    assert len(memory) == 0 and memory.nbytes == 0


def alike(labels, side=8, index=0, known=0):
    """A task of images of one size."""
    examples, _ = draw(np.random.default_rng(index), labels, side, side + 1)
    total = max(labels) + 1
    return Task(index, tuple(range(known, total)), known, examples, examples.select([]))


@pytest.mark.parametrize(
    ("text", "beside", "other", "first", "second"),
    [
        ("12 images", 0, 0, 12, 12),
        ("12 images", 8, 999, 12, 12),
        ("5 images/class", 0, 0, 10, 20),
        ("unlimited", 8, 0, 16, 16 + 12),
        ("none", 8, 0, 0, 0),
        ("2200 B", 0, 0, 10, 10),  # 8 * 8 * 3 + 28 = 220
        ("2199 B", 0, 0, 9, 9),
        ("2200 B", 8, 0, 9, 9),
        ("2280 B", 8, 0, 10, 10),
        ("2280 B", 8, 1, 9, 9),
        ("1140 B/class", 8, 0, 10, 20),
    ],
)
def test_room_is_exact_for_images_of_one_size(text, beside, other, first, second):
    memory = Memory(text, selection="own")
    task = alike([0, 1] * 8)
    assert likely_room(memory, task, beside, other) == first
    memory.update(task, no_features, chosen=torch.arange(first), other_nbytes=other)
    assert len(memory) == first or beside
    task = alike([2, 3] * 6, index=1, known=2)
    assert likely_room(memory, task, beside, other) == min(second, len(memory) + 12)


def test_room_takes_new_images_to_be_compressed_as_the_exemplars_are():
    memory = Memory("10 images", "bbox", "own")
    (task, boxes), *_ = stream(2)
    assert likely_room(memory, task) == 10
    memory.update(task, no_features, boxes, chosen=torch.arange(len(task.examples)))
    share = memory.units / len(memory)
    assert share < 0.9
    room = likely_room(memory, replace(task, index=1))
    assert room == int(10 / share) > 10


def test_no_room_at_all_is_said_with_what_would_do():
    memory, task = Memory("200 B", selection="own"), alike([0] * 5)
    with pytest.warns(UserWarning, match="no room for an image .* '230B' would hold one"):
        assert likely_room(memory, task, beside=4, other_nbytes=6) == 0
    assert likely_room(Memory("230B", selection="own"), task, beside=4, other_nbytes=6) == 1
