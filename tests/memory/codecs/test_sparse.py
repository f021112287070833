"""Kept pixels come back in their places, masks cost what they must, and memory keeps its budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import arrays, buffers_nbytes, embed, stream

from fastcil.data import ImageStore
from fastcil.errors import FastcilError
from fastcil.memory import Budget, Memory, make_codec
from fastcil.memory.codecs.completion import complete
from fastcil.memory.codecs.masks import FORMS
from fastcil.memory.codecs.sparse import SparseCodec
from fastcil.memory.codecs.sparse_store import SparseStore, form_nbytes, stretches
from fastcil.ops import salient_masks

SIZES = [(1, 1), (1, 9), (7, 1), (5, 7), (32, 32), (9, 31), (300, 2), (2, 700), (32, 32)]


def pictures(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def drawn(sizes, seed=0, share=0.4):
    """Masks that keep something of every image."""
    rng = np.random.default_rng(seed)
    masks = [rng.random(size) < share for size in sizes]
    for mask in masks:
        mask[rng.integers(mask.shape[0]), rng.integers(mask.shape[1])] = True
    return masks


def flat(masks):
    joined = [mask.flatten() for mask in masks] or [np.empty(0, bool)]
    return torch.from_numpy(np.concatenate(joined))


def made(images, masks):
    return SparseStore.from_masks(ImageStore.from_images(images), flat(masks))


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state().values(), b.state().values(), strict=True)
    )


def naive_nbytes(mask):
    """Bytes of a mask by the documented formulas: coordinates, run lengths, bits."""
    kept = int(mask.sum())
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.flatten().astype(int), [0]])))
    numbers = np.diff(np.concatenate([[0], edges]))[:-1]
    varints = [1 + sum(number >= 128**k for k in range(1, 5)) for number in [*numbers]]
    body = sum(varints)
    return {
        "coo": kept * (2 if max(mask.shape) <= 256 else 4),
        "runs": body + 1 + (body >= 128) + (body >= 128**2),
        "bitmask": -(-mask.size // 8),
    }


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.95, 1.0])
def test_kept_pixels_come_back_and_cost_the_least(share):
    images, masks = pictures(SIZES), drawn(SIZES, share=share)
    store = made(images, masks)
    assert torch.equal(store.masks(), flat(masks))
    assert store.kept().tolist() == [int(mask.sum()) for mask in masks]
    assert store.sizes.tolist() == [list(size) for size in SIZES]
    for image, mask, found in zip(images, masks, arrays(store.images()), strict=True):
        assert np.array_equal(found, image * mask[:, :, None])
    nbytes, counted = store.image_nbytes().tolist(), form_nbytes(flat(masks), store.sizes)
    for place, mask in enumerate(masks):
        naive, pixels = naive_nbytes(mask), 3 * int(mask.sum())
        least = 0 if mask.all() else min(naive.values())
        assert nbytes[place] == least + pixels + 9
        form = FORMS[store.forms[place]]
        assert naive[form] == least if form != "full" else mask.all()
        assert {name: int(counted[name][place]) - pixels for name in naive} == naive
        assert int(counted["smallest"][place]) == least + pixels
        assert int(counted["raw"][place]) == 3 * mask.size
    buffers = store.state().values()
    assert store.nbytes == sum(nbytes) == sum(b.untyped_storage().nbytes() for b in buffers)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=5),
    st.integers(0, 2**31),
    st.sampled_from([0.05, 0.5, 0.9]),
)
@settings(max_examples=30, deadline=None)
def test_fuzzed(sizes, seed, share):
    images, masks = pictures(sizes, seed), drawn(sizes, seed, share)
    store = made(images, masks)
    assert torch.equal(store.masks(), flat(masks))
    for image, mask, found in zip(images, masks, arrays(store.images()), strict=True):
        assert np.array_equal(found, image * mask[:, :, None])
    assert same(SparseStore.from_state(store.state()), store)
    assert store.nbytes == int(store.image_nbytes().sum())


def test_long_stores_are_handled_in_stretches(monkeypatch):
    images, masks = pictures(SIZES), drawn(SIZES)
    whole = made(images, masks)
    monkeypatch.setattr(stretches, "__defaults__", (40,))
    parts = made(images, masks)
    assert len(list(stretches(parts.sizes.prod(1)))) > 3
    assert same(parts, whole) and torch.equal(parts.masks(), flat(masks))
    assert torch.equal(parts.images().pixels, whole.images().pixels)
    for name, each in form_nbytes(flat(masks), parts.sizes).items():
        assert len(each) == len(SIZES), name


@pytest.mark.parametrize("index", [[], [2], [4, 0, 2], [3, 3], torch.arange(len(SIZES)) % 2 == 0])
def test_a_selection_is_a_compact_copy(index):
    images, masks = pictures(SIZES), drawn(SIZES)
    places = torch.arange(len(SIZES))[index].tolist()
    picked = made(images, masks).select(index)
    assert same(picked, made([images[k] for k in places], [masks[k] for k in places]))
    assert picked.nbytes == sum(b.untyped_storage().nbytes() for b in picked.state().values())


def test_joining_undoes_splitting():
    store = made(pictures(SIZES), drawn(SIZES))
    parts = [store.select([0, 1]), SparseStore.empty(), store.select(range(2, len(SIZES)))]
    assert same(SparseStore.cat(parts), store)
    assert same(store.to("cpu"), store)
    assert same(SparseStore.from_state(store.state()), store)
    with pytest.raises(FastcilError, match="stores is empty"):
        SparseStore.cat([])
    with pytest.raises(IndexError):
        store.select([len(SIZES)])


def test_nothing():
    codec, empty = SparseCodec(), SparseStore.empty()
    kept = codec.encode(ImageStore.empty(), torch.empty(0, 4, 4))
    assert same(kept, empty) and (len(kept), kept.nbytes) == (0, 0)
    assert same(SparseStore.from_state(empty.state()), empty)
    assert len(codec.decode(kept)) == len(empty.masks()) == 0
    assert codec.units(kept).tolist() == codec.nbytes(kept).tolist() == []
    assert {len(each) for each in form_nbytes(empty.masks(), empty.sizes).values()} == {0}


def change(state, name, value):
    return {**state, name: value}


def first_byte(state, value):
    data = state["data"].clone()
    data[0] = value
    return {**state, "data": data}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "forms"}, "state has no 'forms'"),
        (lambda s: {k: v for k, v in s.items() if k != "data"}, "state has no 'data'"),
        (lambda s: change(s, "forms", s["forms"][:1]), r"forms has shape \(1,\); it must be \[2\]"),
        (lambda s: change(s, "forms", s["forms"] + 9), "data holds a mask that does not fit"),
        (lambda s: change(s, "forms", s["forms"] * 0), "data holds a mask that does not fit"),
        (lambda s: change(s, "sizes", s["sizes"] + 1), "data holds a mask that does not fit"),
        (lambda s: change(s, "sizes", s["sizes"] // 2), "data holds a mask that does not fit"),
        (lambda s: change(s, "lengths", s["lengths"].flip(0)), "data holds a mask that does not"),
        (lambda s: change(s, "data", s["data"][:-1]), "lengths sum up to"),
        (lambda s: first_byte(s, 255), "data holds a mask that does not fit its image"),
        (lambda s: first_byte(s, 0), "data holds a mask that does not fit its image"),
    ],
)
def test_damaged_state_is_a_sentence(damage, says):
    masks = [np.zeros((8, 8), bool), np.random.default_rng(0).random((8, 8)) < 0.5]
    masks[0][2:5, 3:6] = True
    state = made(pictures([(8, 8)] * 2), masks).state()
    with pytest.raises(FastcilError, match=says):
        SparseStore.from_state(damage(state))


def test_buffers_are_checked():
    store = made(pictures([(2, 2)]), [np.ones((2, 2), bool)])
    with pytest.raises(TypeError, match=r"forms is torch.int64; it must be torch.uint8"):
        SparseStore(store.strings, store.forms.long())
    with pytest.raises(FastcilError, match="masks keeps no pixel of some image"):
        made(pictures([(2, 2)] * 2), [np.ones((2, 2), bool), np.zeros((2, 2), bool)])
    with pytest.raises(FastcilError, match=r"masks is torch.bool of shape \(4,\)"):
        SparseStore.from_masks(ImageStore.from_images(pictures([(2, 3)])), store.masks())
    with pytest.raises(FastcilError, match=r"masks is torch.float32"):
        form_nbytes(store.masks().float(), store.sizes)


@pytest.mark.parametrize("rule", ["zero", "telea", "navier-stokes", "diffusion"])
def test_the_codec_completes_what_it_kept(rule):
    images = pictures(SIZES)
    store, maps = ImageStore.from_images(images), torch.rand(len(SIZES), 4, 4)
    codec = make_codec("sparse", threshold=0.5, rule=rule, radius=2.0)
    kept = codec.encode(store, maps)
    masks = salient_masks(maps, store.sizes, 0.5)
    seen = codec.decode(kept)
    assert torch.equal(seen.pixels, complete(store, masks, rule, 2.0).pixels)
    known = masks.repeat_interleave(3)
    assert torch.equal(seen.pixels[known], store.pixels[known])
    shares = [float(part.double().mean()) for part in masks.split([h * w for h, w in SIZES])]
    assert codec.units(kept).tolist() == pytest.approx(shares) and codec.units(kept).min() > 0
    assert codec.units(kept).dtype == torch.float64
    assert int(codec.nbytes(kept).sum()) == kept.nbytes + 4 * len(SIZES)


def test_images_from_anywhere_and_in_any_form():
    store = ImageStore.from_images(pictures([(8, 6), (5, 5), (8, 6)]))
    scattered = ImageStore(store.pixels, store.offsets[[2, 0]], store.geometry[[2, 0]])
    codec, maps = SparseCodec(0.5), torch.rand(3, 4, 4)
    whole = codec.encode(store, maps)
    assert same(codec.encode(scattered, maps[[2, 0]]), whole.select([2, 0]))
    packed = store.compress(torch.tensor([[0, 0, 2, 2]] * 3, dtype=torch.int16))
    assert same(codec.encode(packed, maps), codec.encode(packed.reconstruct(), maps))


def test_refine_has_the_last_word():
    asked = []

    def refine(images, masks):
        asked.append((images, masks))
        return ImageStore.from_pixels(255 - images.pixels, images.sizes)

    store, maps = ImageStore.from_images(pictures([(8, 6), (5, 5)])), torch.rand(2, 2, 2)
    codec = SparseCodec(0.5, refine=refine)
    kept = codec.encode(store, maps)
    seen = codec.decode(kept)
    ((completed, masks),) = asked
    assert torch.equal(masks, kept.masks())
    assert torch.equal(completed.pixels, SparseCodec(0.5).decode(kept).pixels)
    assert torch.equal(seen.pixels, 255 - completed.pixels)
    wrong = SparseCodec(0.5, refine=lambda images, masks: images.select([0]))
    with pytest.raises(FastcilError, match="refine gave images of other sizes"):
        wrong.decode(kept)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 1.0}, "threshold is 1.0; it must lie from 0"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "0.6"}, "threshold is '0.6'"),
        ({"rule": "tela"}, "did you mean 'telea'"),
        ({"radius": -1}, "radius is -1"),
        ({"radius": True}, "radius is True"),
        ({"treshold": 0.5}, "did you mean 'threshold'"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(FastcilError, match=says):
        make_codec("sparse", **options)


@pytest.mark.parametrize(
    ("maps", "says"),
    [
        (None, "marks is None, but the codec 'sparse' keeps the salient pixels"),
        (torch.ones(1, 4, 4), r"maps is torch.float32 of shape \(1, 4, 4\); .* \[2, h, w\]"),
        (torch.ones(2, 4), "maps is torch.float32 of shape"),
        (torch.ones(2, 4, 4, dtype=torch.int16), "maps is torch.int16"),
        (torch.ones(2, 0, 4), "h and w must be at least 1"),
    ],
)
def test_bad_maps(maps, says):
    with pytest.raises(FastcilError, match=says):
        SparseCodec().encode(ImageStore.from_images(pictures([(3, 4)] * 2)), maps)


def smooth(count, seed):
    maps = torch.rand(count, 3, 3, generator=torch.Generator().manual_seed(seed))
    low, high = maps.flatten(1).aminmax(dim=1)
    return (maps - low[:, None, None]) / (high - low)[:, None, None]


@pytest.mark.parametrize(
    ("budget", "selection"),
    [
        ("2 images/class", "random"),
        ("14 images", "herding"),
        ("2000B/class", "herding"),
        ("24KiB", "random"),
    ],
)
def test_memory_holds_more_images_within_its_budget(budget, selection):
    sparse = Memory(budget, codec=SparseCodec(0.6), selection=selection)
    raw, limit = Memory(budget, selection=selection), Budget.parse(budget)
    for seed, (task, _) in enumerate(stream(7)):
        sparse.update(task, embed, smooth(len(task.examples), seed), seed=seed)
        raw.update(task, embed, seed=seed)
        held = sparse.nbytes if limit.unit == "bytes" else sparse.units
        assert held <= limit.limit(task.total) + 1e-9
        assert sparse.nbytes == buffers_nbytes(sparse) == int(sparse.exemplar_nbytes().sum())
    assert len(sparse) > 1.3 * len(raw)
    again = Memory(budget, codec=SparseCodec(0.6), selection=selection)
    again.restore(sparse.state())
    assert again.checksum() == sparse.checksum()
    assert torch.equal(again.examples().images.pixels, sparse.examples().images.pixels)


def test_without_a_threshold_memory_holds_what_raw_would():
    memory, raw = (Memory("2 images/class", codec=codec) for codec in (SparseCodec(0.0), "raw"))
    for task, _ in stream(8):
        memory.update(task, embed, smooth(len(task.examples), 0))
        raw.update(task, embed)
    assert len(memory) == len(raw) and memory.units == raw.units
    assert torch.equal(memory.examples().images.pixels, raw.examples().images.pixels)
    assert memory.nbytes == raw.nbytes - (24 - 9) * len(raw)
