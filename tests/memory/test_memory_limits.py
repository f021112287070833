"""A memory against its budget, its saved state, and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from streams import STREAM, buffers_nbytes, embed, stream

from fastcil.errors import FastcilError
from fastcil.memory import Budget, Memory, make_codec
from fastcil.memory.codecs.raw import RawCodec

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


@pytest.mark.parametrize("text", ["12000 B", "6000 B/class", "20 images"])
def test_boxes_make_room_for_more(text):
    raw, bbox = Memory(text, "raw"), Memory(text, "bbox")
    for task, boxes in stream(5, classes=(2, 2), low=30, high=40):
        for memory in (raw, bbox):
            memory.update(task, embed, boxes)
    assert all(b > r > 0 for r, b in zip(raw.counts(4), bbox.counts(4), strict=True))


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
        ((embed, None), "marks is None"),
        ((embed, boxes[1:]), "marks has"),
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
