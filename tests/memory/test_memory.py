"""What a memory keeps of each class, and in which order."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from streams import arrays, buffers_nbytes, draw, embed, pictures, stream

from fastcil.contract import Task
from fastcil.data import Examples, ImageStore
from fastcil.memory import Budget, Memory, herding, make_codec, random_order
from fastcil.memory.codecs.raw import RawCodec


@pytest.mark.parametrize("codec", ["raw", "bbox"])
@pytest.mark.parametrize("text", ["60 images", "7 images/class", "25000 B", "2500 B/class"])
@pytest.mark.filterwarnings("ignore:memory is")
def test_picks_stop_at_the_first_that_exceeds_and_old_classes_keep_a_prefix(text, codec):
    memory, coder, budget = Memory(text, codec), make_codec(codec), Budget.parse(text)
    expected = {}
    for task, boxes in stream(1):
        memory.update(task, embed, boxes)
        quota = budget.quota(task.total)
        for label in task.classes:
            chosen = (task.examples.labels == label).nonzero().flatten()
            encoded = coder.encode(task.examples.images.select(chosen), boxes[chosen])
            order = herding(embed(Examples(encoded, task.examples.labels[chosen])), len(chosen))
            costs = coder.nbytes(encoded) if budget.unit == "bytes" else coder.units(encoded)
            expected[label] = [(encoded.image(i).numpy(), float(costs[i])) for i in order.tolist()]
        for label, ranked in expected.items():
            kept, spent = [], 0.0
            for image, cost in ranked:
                if spent + cost > quota + 1e-9:
                    break
                spent += cost
                kept.append((image, cost))
            expected[label] = kept
        held = pictures(memory)
        assert sorted(held) == [label for label in expected if expected[label]]
        for label, kept in held.items():
            assert len(kept) == len(expected[label])
            for mine, (theirs, _) in zip(kept, expected[label], strict=True):
                assert np.array_equal(mine, theirs)


def test_a_smaller_image_behind_one_that_does_not_fit_is_not_kept():
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    order = herding(features, 3).tolist()
    sides = {order[0]: 10, order[1]: 20, order[2]: 10}
    store = ImageStore.from_images([np.zeros((sides[i], sides[i], 3), np.uint8) for i in range(3)])
    new = Examples(store, torch.zeros(3, dtype=torch.int64))
    small, large = 3 * 10 * 10 + 28, 3 * 20 * 20 + 28
    for budget, kept in [
        (small, 1),
        (2 * small, 1),
        (small + large - 1, 1),
        (small + large, 2),
        (2 * small + large - 1, 2),
        (2 * small + large, 3),
    ]:
        memory = Memory(Budget(budget))
        memory.update(Task(0, (0,), 0, new, new.select([])), lambda examples: features)
        assert memory.counts(1) == [kept]


def test_prefixes_of_random_selection_are_its_seed_s_permutation():
    (task, _), *_ = stream(3)
    memory = Memory("9 images", selection="random")
    memory.update(task, lambda examples: pytest.fail("asked for features"), seed=11)
    generator, originals = torch.Generator().manual_seed(11), arrays(task.examples.images)
    for label, kept in pictures(memory).items():
        chosen = (task.examples.labels == label).nonzero().flatten()
        order = random_order(len(chosen), generator)[:3]
        for mine, i in zip(kept, chosen[order].tolist(), strict=True):
            assert np.array_equal(mine, originals[i])
    again, other = (Memory("9 images", selection="random") for _ in range(2))
    again.update(task, embed, seed=11)
    other.update(task, embed, seed=12)
    assert again.checksum() == memory.checksum() != other.checksum()


def test_selection_looks_at_the_images_as_remembered():
    (task, boxes), *_ = stream(4)
    asked = []

    def look(examples):
        asked.append(examples)
        return embed(examples)

    Memory("unlimited", "bbox").update(task, look, boxes)
    assert len(asked) == len(task.classes)
    for label, examples in enumerate(asked):
        chosen = (task.examples.labels == label).nonzero().flatten()
        packed = task.examples.images.select(chosen).compress(boxes[chosen])
        assert examples.labels.tolist() == [label] * len(chosen)
        for mine, theirs in zip(arrays(examples.images), arrays(packed), strict=True):
            assert np.array_equal(mine, theirs)


def test_images_that_stay_as_they_are_are_looked_at_once_for_all_classes(monkeypatch):
    """And the same are chosen as class by class, of classes that come again too."""
    rng, asked = np.random.default_rng(8), []

    def look(examples):
        asked.append(len(examples))
        return embed(examples)

    def filled():
        asked.clear()
        memory = Memory("3 images/class")
        memory.update(Task(0, (0, 1, 2), 0, first, first.select([])), look)
        memory.update(Task(1, (1, 3, 4), 3, second, memory.examples()), look)
        return memory.checksum(), list(asked)

    first, _ = draw(rng, [0] * 8 + [1] * 5 + [2] * 6)
    second, _ = draw(rng, [1] * 7 + [3] * 2)  # of class 4 there is none
    together, at_once = filled()
    monkeypatch.setattr(RawCodec, "leaves_images", False)
    apart, one_by_one = filled()
    assert together == apart
    assert (at_once, one_by_one) == ([19, 3, 9], [8, 5, 6, 10, 2])


@pytest.mark.parametrize("codec", ["raw", "bbox"])
def test_classes_that_come_again_are_selected_anew(codec):
    memory, coder = Memory("5 images/class", codec), make_codec(codec)
    rng = np.random.default_rng(6)
    examples, boxes = draw(rng, [0] * 8 + [1] * 8 + [2] * 8)
    memory.update(Task(0, (0, 1, 2), 0, examples, examples.select([])), embed, boxes)
    before = memory.examples()
    again, boxes = draw(rng, [1] * 7 + [3] * 7)
    memory.update(Task(1, (1, 3), 3, again, before), embed, boxes)

    new = (again.labels == 1).nonzero().flatten()
    old = (before.labels == 1).nonzero().flatten()
    candidates = ImageStore.cat(
        [before.images.select(old), coder.encode(again.images.select(new), boxes[new])]
    )
    order = herding(embed(Examples(candidates, torch.ones(len(candidates)).long())), 99).tolist()
    costs = coder.units(candidates)[order].cumsum(0)
    expected = order[: int((costs <= 5 + 1e-9).sum())]
    held = pictures(memory)
    assert len(held[1]) == len(expected)
    for mine, i in zip(held[1], expected, strict=True):
        assert np.array_equal(mine, candidates.image(i).numpy())
    for label in (0, 2):
        mine = (before.labels == label).nonzero().flatten().tolist()
        for picture, i in zip(held[label], mine, strict=True):
            assert np.array_equal(picture, before.images.image(i).numpy())
    assert sorted(held) == [0, 1, 2, 3]
    labels = memory.examples().labels.tolist()
    assert labels == sorted(labels)


def test_everything_is_kept_raw_whatever_the_budget():
    memory = Memory("1 image", codec="bbox", keeps="everything")
    assert isinstance(memory.codec, RawCodec)
    seen = {}
    for task, boxes in stream(7):
        memory.update(task, lambda examples: pytest.fail("asked for features"), boxes)
        originals = arrays(task.examples.images)
        for image, label in zip(originals, task.examples.labels.tolist(), strict=True):
            seen.setdefault(label, []).append(image)
    held = pictures(memory)
    assert memory.counts(12) == [len(seen[label]) for label in range(12)]
    for label, images in seen.items():
        for mine, theirs in zip(held[label], images, strict=True):
            assert np.array_equal(mine, theirs)
    assert memory.nbytes == buffers_nbytes(memory)


@pytest.mark.parametrize(
    "arguments", [{"budget": "none"}, {"budget": "5 images", "keeps": "nothing"}]
)
def test_nothing_is_kept_and_nothing_is_asked(arguments):
    memory = Memory(codec="bbox", **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for task, _ in stream(8):
            memory.update(task, lambda examples: pytest.fail("asked for features"))
            assert memory.nbytes == buffers_nbytes(memory) == len(memory) == 0
            assert memory.units == 0
            assert memory.counts(task.total) == [0] * task.total
            assert len(memory.examples()) == 0


def test_a_class_with_one_image_and_a_class_with_none():
    rng = np.random.default_rng(9)
    examples, boxes = draw(rng, [0, 2, 2])
    for codec in ("raw", "bbox"):
        memory = Memory("30 images", codec)
        memory.update(Task(0, (0, 2), 0, examples, examples.select([])), embed, boxes)
        assert memory.counts(3) == [1, 0, 2]
