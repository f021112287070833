from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil.errors import FastcilError
from fastcil.memory import ByteStore

TEXTS = [b"", b"a", b"otter", b"\x00\xff" * 9, b"seal"]
SIZES = torch.tensor([[1, 1], [3, 4], [5, 7], [300, 2], [32767, 9]])


def make(texts=TEXTS, sizes=SIZES):
    return ByteStore.from_strings([np.frombuffer(t, np.uint8) for t in texts], sizes)


def texts_of(store):
    return [bytes(string) for string in store.strings()]


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state().values(), b.state().values(), strict=True)
    )


def test_strings_come_back_and_cost_what_they_are():
    store = make()
    assert texts_of(store) == TEXTS
    assert torch.equal(store.sizes, SIZES.to(torch.int16))
    assert store.image_nbytes().tolist() == [len(t) + 8 for t in TEXTS]
    assert store.nbytes == sum(len(t) + 8 for t in TEXTS) == int(store.image_nbytes().sum())
    assert store.nbytes == sum(b.untyped_storage().nbytes() for b in store.state().values())


@pytest.mark.parametrize(
    "index", [[], [2], [4, 0, 2], [1, 2, 3], [3, 3, 1], torch.tensor([True, False] * 2 + [True])]
)
def test_a_selection_is_a_compact_copy(index):
    store = make()
    places = torch.arange(5)[index].tolist() if isinstance(index, torch.Tensor) else index
    picked = store.select(index)
    assert texts_of(picked) == [TEXTS[k] for k in places]
    assert picked.sizes.tolist() == [SIZES[k].tolist() for k in places]
    assert picked.data.untyped_storage().nbytes() == sum(len(TEXTS[k]) for k in places)


def test_joining_undoes_splitting():
    store = make()
    parts = [store.select([0, 1]), ByteStore.empty(), store.select([2, 3, 4])]
    assert same(ByteStore.cat(parts), store)
    assert same(store.to("cpu"), store)
    assert same(ByteStore.from_state(store.state()), store)


def test_nothing():
    empty = ByteStore.empty()
    assert (len(empty), empty.nbytes, empty.strings()) == (0, 0, [])
    assert same(ByteStore.from_state(empty.state()), empty)
    assert len(empty.select([])) == 0
    with pytest.raises(FastcilError, match="stores is empty"):
        ByteStore.cat([])
    with pytest.raises(IndexError):
        make().select([5])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": torch.zeros(3, dtype=torch.uint8)}, "lengths sum up to 28 for 3 bytes of data"),
        ({"lengths": torch.tensor([-2, 3, 5, 18, 4], dtype=torch.int32)}, "lengths sum up to 28"),
        ({"lengths": torch.zeros(4, dtype=torch.int32)}, r"sizes has shape \(5, 2\); it must be"),
        ({"lengths": torch.tensor(5, dtype=torch.int32)}, r"lengths has shape \(\)"),
        ({"data": torch.zeros(2, 14, dtype=torch.uint8)}, r"data has shape \(2, 14\)"),
        ({"sizes": torch.zeros(5, 2, dtype=torch.int16)}, "sizes has a side below 1"),
        ({"sizes": torch.ones(5, 3, dtype=torch.int16)}, r"sizes has shape \(5, 3\)"),
        ({"lengths": None}, "state has no 'lengths'"),
    ],
)
def test_damaged_state_is_a_sentence(change, says):
    state = {
        name: value for name, value in {**make().state(), **change}.items() if value is not None
    }
    with pytest.raises(FastcilError, match=says):
        ByteStore.from_state(state)


@pytest.mark.parametrize("name", ["data", "lengths", "sizes"])
def test_dtypes_are_checked(name):
    state = make().state()
    with pytest.raises(TypeError, match=f"{name} is torch.float32; it must be"):
        ByteStore.from_state({**state, name: state[name].float()})
