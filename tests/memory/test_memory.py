from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from fastcil.contract import Task
from fastcil.data import Examples, ImageStore, read_images
from fastcil.errors import FastcilError
from fastcil.memory import Budget, Memory, herding, make_codec, random_order
from fastcil.memory.codecs.raw import RawCodec

STREAM = (3, 1, 4, 2, 2)  # new classes of each task


def draw(rng, labels, low=10, high=24):
    """Images of many sizes for the given labels, shuffled, and a box for each."""
    labels = rng.permutation(np.array(labels))
    images, boxes = [], []
    for label in labels:
        h, w = rng.integers(low, high, 2)
        images.append(rng.integers(0, 200 + label, (h, w, 3), dtype=np.uint8))
        y0, x0 = rng.integers(0, h // 2), rng.integers(0, w // 2)
        boxes.append((y0, x0, rng.integers(y0 + 1, h + 1), rng.integers(x0 + 1, w + 1)))
    examples = Examples(ImageStore.from_images(images), torch.from_numpy(labels))
    return examples, torch.tensor(np.array(boxes), dtype=torch.int16)


def stream(seed, classes=STREAM, low=6, high=12):
    """Yields tasks, with no exemplars, and boxes."""
    rng = np.random.default_rng(seed)
    known = 0
    for index, fresh in enumerate(classes):
        new = range(known, known + fresh)
        labels = [c for c in new for _ in range(rng.integers(low, high))]
        examples, boxes = draw(rng, labels)
        yield Task(index, tuple(new), known, examples, examples.select([])), boxes
        known += fresh


def embed(examples):
    """Features of the pixels themselves: the image at 3 x 3 pixels."""
    count = len(examples)
    store = torch.zeros(count, dtype=torch.int64)
    seen = read_images([examples.images], store, torch.arange(count), (3, 3))
    return seen.flatten(1).float() - 90


def arrays(images):
    """Every image of a store, as it is seen."""
    raw = images.reconstruct()
    flat = raw.pixels.split(raw.sizes.prod(1).mul(3).tolist())
    return [f.reshape(h, w, 3).numpy() for f, (h, w) in zip(flat, raw.sizes.tolist(), strict=True)]


def buffers_nbytes(memory):
    return sum(b.numel() * b.element_size() for b in memory.state().values())


def pictures(memory):
    """Each class's exemplars in order, as arrays."""
    held = memory.examples()
    by_class = {}
    for image, label in zip(arrays(held.images), held.labels.tolist(), strict=True):
        by_class.setdefault(label, []).append(image)
    return by_class


BUDGETS = [
    "60 images",
    "13 images",
    "7 images/class",
    "25000 B",
    "6KiB",
    "2500 B/class",
    "unlimited",
]


@pytest.mark.parametrize(
    ("text", "codec", "selection"),
    [
        *((text, codec, "herding") for text in BUDGETS for codec in ("raw", "bbox")),
        ("60 images", "bbox", "random"),
        ("2500 B/class", "raw", "random"),
    ],
)
@pytest.mark.filterwarnings("ignore:memory is")
def test_what_is_held_fits_the_budget_at_every_boundary(text, codec, selection):
    memory, coder = Memory(text, codec, selection), make_codec(codec)
    budget = Budget.parse(text)
    for task, boxes in stream(0):
        memory.update(task, embed, boxes, seed=task.index)
        held = buffers_nbytes(memory)
        assert memory.nbytes == memory.retained().nbytes == held
        assert held == sum(b.untyped_storage().nbytes() for b in memory.state().values())
        images = memory.examples().images
        assert held == int(coder.nbytes(images).sum())
        assert memory.units == pytest.approx(float(coder.units(images).sum()))
        total = held if budget.unit == "bytes" else memory.units
        assert total <= budget.limit(task.total) + 1e-6
        costs = coder.nbytes(images) if budget.unit == "bytes" else coder.units(images)
        labels = memory.examples().labels
        for label in range(task.total):
            assert float(costs[labels == label].sum()) <= budget.quota(task.total) + 1e-6
        assert sum(memory.counts(task.total)) == len(memory) == len(labels)
        assert labels.dtype == torch.int64
        assert labels.tolist() == sorted(labels.tolist())
    if text == "unlimited":
        assert all(n >= 6 for n in memory.counts(sum(STREAM)))
    if text in ("60 images", "25000 B"):
        assert all(memory.counts(sum(STREAM)))


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


@pytest.mark.parametrize("text", ["12000 B", "6000 B/class", "20 images"])
def test_boxes_make_room_for_more(text):
    raw, bbox = Memory(text, "raw"), Memory(text, "bbox")
    for task, boxes in stream(5, classes=(2, 2), low=30, high=40):
        for memory in (raw, bbox):
            memory.update(task, embed, boxes)
    assert all(b > r > 0 for r, b in zip(raw.counts(4), bbox.counts(4), strict=True))


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


@pytest.mark.parametrize("codec", ["raw", "bbox"])
@pytest.mark.parametrize(
    ("text", "other"), [("900 B", 0), ("1500 B", 600), ("200 B/class", 100), ("2 images", 0)]
)
def test_too_small_a_quota_is_said_once_with_the_budget_that_would_do(text, other, codec):
    first, second = list(stream(10, classes=(4, 1)))
    memory = Memory(text, codec)
    with pytest.warns(UserWarning, match="would hold one of each") as caught:
        memory.update(first[0], embed, first[1], other_nbytes=other)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.update(second[0], embed, second[1], other_nbytes=other)
    advised = str(caught[0].message).split("; '")[1].split("'")[0]
    assert Budget.parse(advised).unit == Budget.parse(text).unit
    enough = Memory(advised, codec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough.update(first[0], embed, first[1], other_nbytes=other)
    assert min(enough.counts(4)) >= 1


def test_other_entries_take_their_share_of_bytes_and_none_of_images():
    (task, boxes), *_ = stream(11)
    for text in ("12000 B", "4000 B/class"):
        memory = Memory(text)
        memory.update(task, embed, boxes, other_nbytes=5000)
        assert buffers_nbytes(memory) + 5000 <= 12000
        alone = Memory(text)
        alone.update(task, embed, boxes)
        assert len(memory) < len(alone)
    for other in (0, 10**9):
        memory = Memory("9 images")
        memory.update(task, embed, boxes, other_nbytes=other)
        assert memory.counts(3) == [3, 3, 3]


@pytest.mark.parametrize("keeps", ["exemplars", "nothing"])
def test_other_entries_beyond_the_budget_are_refused(keeps):
    (task, boxes), *_ = stream(12)
    memory = Memory("1000 B", keeps=keeps)
    with pytest.raises(FastcilError, match="1001 bytes beside exemplars; pass at least '1001B'"):
        memory.update(task, embed, boxes, other_nbytes=1001)


def test_a_codec_that_counts_less_than_it_keeps_is_found_out():
    class Modest(RawCodec):
        def nbytes(self, encoded):
            return super().nbytes(encoded) // 2

    (task, boxes), *_ = stream(13)
    memory = Memory("5000 B", Modest())
    with pytest.raises(FastcilError, match="internal error: memory would hold"):
        memory.update(task, embed, boxes)
    assert len(memory) == 0


@pytest.mark.parametrize("codec", ["raw", "bbox"])
def test_state_round_trip(codec):
    memory, twin = Memory("40 images", codec), Memory("40 images", codec)
    tasks = list(stream(14))
    empty = memory.checksum()
    for task, boxes in tasks[:3]:
        memory.update(task, embed, boxes)
    saved = {name: buffer.clone() for name, buffer in memory.state().items()}
    twin.restore(saved)
    assert twin.checksum() == memory.checksum() != empty
    assert twin.counts(8) == memory.counts(8)
    for held in (memory, twin):
        for task, boxes in tasks[3:]:
            held.update(task, embed, boxes)
    assert twin.checksum() == memory.checksum()
    fresh = Memory("40 images", codec)
    fresh.restore(Memory("none").state())
    assert fresh.checksum() == empty


def test_checksum_sees_every_buffer():
    (task, boxes), *_ = stream(15)
    memory = Memory("40 images", "bbox")
    memory.update(task, embed, boxes)
    whole = memory.checksum()
    assert memory.to("cpu").checksum() == whole
    for buffer in memory.state().values():
        flat = buffer.reshape(-1)
        kept = flat[-1].clone()
        flat[-1] = kept + 1
        assert memory.checksum() != whole
        flat[-1] = kept
    assert memory.checksum() == whole


def test_labels_are_kept_as_int32():
    (task, boxes), *_ = stream(16)
    memory = Memory("40 images")
    memory.update(task, embed, boxes)
    assert memory.state()["labels"].dtype == torch.int32


def test_a_failed_update_changes_nothing():
    tasks = list(stream(17))
    memory = Memory("40 images", "bbox")
    memory.update(tasks[0][0], embed, tasks[0][1])
    before = memory.checksum()
    task, boxes = tasks[1]
    bad = [
        ((embed, None), "boxes is None"),
        ((embed, boxes[1:]), "boxes has"),
        ((lambda examples: embed(examples)[1:], boxes), "rows of features"),
        ((lambda examples: embed(examples) * torch.nan, boxes), "NaN"),
    ]
    for arguments, says in bad:
        with pytest.raises(FastcilError, match=says):
            memory.update(task, *arguments)
        assert memory.checksum() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"budget": 2000}, "without a unit"),
        ({"budget": "5 images", "codec": "rar"}, "codec 'rar' is unknown"),
        ({"budget": "5 images", "selection": "herd"}, "did you mean 'herding'"),
        ({"budget": "5 images", "keeps": "all"}, "keeps is 'all'"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(FastcilError, match=says):
        Memory(**arguments)


def test_restore_refuses_what_is_no_memory():
    with pytest.raises(FastcilError, match="the saved memory does not fit: labels"):
        memory = Memory("none")
        memory.restore({k: v for k, v in memory.state().items() if k != "labels"})
