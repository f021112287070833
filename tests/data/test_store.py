from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fastcil.data import Dataset, Examples, ImageStore
from fastcil.errors import FastcilError

SIZES = [(9, 12), (20, 5), (1, 1), (16, 16), (31, 44)]


@pytest.fixture
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.fixture
def store(images) -> ImageStore:
    return ImageStore.from_images(images)


BOXES = torch.tensor(
    [[2, 2, 7, 9], [0, 0, 20, 5], [0, 0, 0, 0], [8, 3, 16, 16], [5, 6, 20, 30]], dtype=torch.int16
)


def same(one: ImageStore, other: ImageStore) -> bool:
    return all(torch.equal(buffer, other.state()[name]) for name, buffer in one.state().items())


@pytest.mark.parametrize("kind", ["arrays", "tensors", "read-only", "strided", "iterator"])
def test_holds_images_of_any_sizes(images, kind):
    given = {
        "arrays": images,
        "tensors": [torch.from_numpy(image) for image in images],
        "read-only": [np.frombuffer(i.tobytes(), np.uint8).reshape(i.shape) for i in images],
        "strided": [np.ascontiguousarray(i.transpose(2, 0, 1)).transpose(1, 2, 0) for i in images],
        "iterator": iter(images),
    }[kind]
    store = ImageStore.from_images(given)
    assert len(store) == len(images)
    assert store.sizes.tolist() == [list(size) for size in SIZES]
    assert store.boxes.tolist() == [[0, 0, *size] for size in SIZES]
    for number, image in enumerate(images):
        assert np.array_equal(store.image(number).numpy(), image)
    assert np.array_equal(store.image(-1).numpy(), images[-1])


def test_holds_its_own_copy_of_images(images):
    store = ImageStore.from_images(images[:1])
    before = images[0].copy()
    images[0][:] = 0
    assert np.array_equal(store.image(0).numpy(), before)


def test_holds_a_batch():
    batch = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    store = ImageStore.from_batch(batch)
    assert same(store, ImageStore.from_images(batch))
    assert same(store, ImageStore.from_batch(torch.from_numpy(batch)))


def test_holds_nothing():
    for store in (
        ImageStore.from_images([]),
        ImageStore.from_batch(np.empty((0, 4, 4, 3), np.uint8)),
    ):
        assert len(store) == 0 and store.nbytes == 0
        assert store.sizes.shape == (0, 2) and store.image_nbytes().shape == (0,)
        assert len(store.reconstruct()) == 0 and len(store.select([])) == 0


def test_counts_the_bytes_that_it_holds(store):
    for held in (store, store.compress(BOXES)):
        buffers = sum(buffer.untyped_storage().nbytes() for buffer in held.state().values())
        assert held.nbytes == buffers == held.image_nbytes().sum()
    assert store.image_nbytes().tolist() == [3 * h * w + 8 + 16 for h, w in SIZES]


def test_compresses_and_shows_what_is_left(store, images):
    packed = store.compress(BOXES)
    assert torch.equal(packed.boxes, BOXES) and torch.equal(packed.sizes, store.sizes)
    assert packed.nbytes < store.nbytes
    raw = packed.reconstruct()
    for number, image in enumerate(images):
        y0, x0, y1, x1 = BOXES[number].tolist()
        shown = packed.image(number)
        assert np.array_equal(shown[y0:y1, x0:x1].numpy(), image[y0:y1, x0:x1])
        assert torch.equal(shown, raw.image(number))
    assert torch.equal(raw.geometry, store.geometry)


@pytest.mark.parametrize(
    "index",
    [[3, 0, 0], [1, 2, 3], [], [-1], torch.tensor([0, 1, 4]), torch.tensor([1, 0, 0, 1, 1]) > 0],
    ids=["any order", "neighbours", "none", "last", "tensor", "mask"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_selects_a_compact_copy(store, index, packed):
    source = store.compress(BOXES) if packed else store
    part = source.select(index)
    wanted = torch.arange(len(store))[torch.as_tensor(index, dtype=None if len(index) else int)]
    assert len(part) == len(wanted)
    for place, number in enumerate(wanted.tolist()):
        assert torch.equal(part.image(place), source.image(number))
    assert part.nbytes == source.image_nbytes()[wanted].sum()
    assert part.nbytes == sum(t.untyped_storage().nbytes() for t in part.state().values())


def test_joins_raw_and_packed(store):
    packed = store.compress(BOXES)
    both = ImageStore.cat([packed.select([4, 1]), store, packed])
    assert len(both) == 12
    shown = [packed.image(4), packed.image(1), store.image(0)]
    assert all(torch.equal(both.image(n), image) for n, image in enumerate(shown))
    assert torch.equal(both.image(11), packed.image(4))
    with pytest.raises(FastcilError, match="packed already"):
        both.compress(BOXES[:1].repeat(12, 1))


def test_state_brings_it_back(store):
    packed = store.compress(BOXES)
    assert same(ImageStore.from_state(packed.state()), packed)
    assert same(packed.to("cpu"), packed)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"pixels": None}, FastcilError, "state has no 'pixels'"),
        ({"pixels": torch.zeros(7, dtype=torch.uint8)}, FastcilError, "offsets"),
        ({"pixels": torch.zeros(2000)}, TypeError, "pixels has dtype torch.float32"),
        ({"offsets": torch.zeros(4).long()}, FastcilError, "geometry has shape"),
        ({"geometry": torch.zeros(5, 8).short()}, FastcilError, r"geometry\[0\]"),
    ],
)
def test_refuses_a_state_that_does_not_hold_together(store, change, error, says):
    state = {k: v for k, v in (store.state() | change).items() if v is not None}
    with pytest.raises(error, match=says):
        ImageStore.from_state(state)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.zeros((4, 4, 3)), r"images\[1\] is float64"),
        (torch.zeros(4, 4, 3), r"images\[1\] is torch.float32"),
        (np.zeros((4, 4), np.uint8), r"images\[1\] has shape \(4, 4\)"),
        (np.zeros((3, 4, 4), np.uint8), r"images\[1\] has shape \(3, 4, 4\)"),
        (np.zeros((1, 32768, 3), np.uint8), r"images\[1\] is 1 x 32768"),
        (np.zeros((0, 4, 3), np.uint8), r"images\[1\] is 0 x 4"),
        ([[0]], r"images\[1\] is a list"),
    ],
)
def test_says_which_image_is_wrong(bad, says):
    with pytest.raises(FastcilError, match=says):
        ImageStore.from_images([np.zeros((2, 2, 3), np.uint8), bad])


def test_says_what_is_wrong_with_a_batch():
    with pytest.raises(FastcilError, match=r"images has shape \(4, 4, 3\)"):
        ImageStore.from_batch(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(FastcilError, match="stores is empty"):
        ImageStore.cat([])


@pytest.mark.parametrize("index", [5, -6])
def test_says_that_there_is_no_such_image(store, index):
    with pytest.raises(IndexError, match=f"{index}"):
        store.image(index)
    with pytest.raises(IndexError):
        store.select([index])


def test_tells_its_size_not_its_pixels(store):
    assert repr(store) == f"ImageStore(5 images, {store.nbytes} bytes on cpu)"


def test_examples_go_together(store):
    examples = Examples(store, torch.tensor([4, 3, 2, 1, 0]))
    part = examples.select([1, 3])
    assert len(part) == 2 and part.labels.tolist() == [3, 1]
    assert torch.equal(part.images.image(1), store.image(3))
    both = Examples.cat([part, examples.to("cpu")])
    assert both.labels.tolist() == [3, 1, 4, 3, 2, 1, 0]
    assert torch.equal(both.images.image(2), store.image(0))
    assert examples.select(examples.labels > 2).labels.tolist() == [4, 3]


def test_examples_need_a_label_each(store):
    with pytest.raises(FastcilError, match="labels has shape"):
        Examples(store, torch.tensor([0, 1]))
    with pytest.raises(FastcilError, match=r"labels is torch\.int32"):
        Examples(store, torch.zeros(5, dtype=torch.int32))


@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1], [0, -1, 0, 0, 1]])
def test_dataset_needs_a_name_for_each_label(store, labels):
    good = Examples(store, torch.tensor([0, 1, 1, 0, 1]))
    bad = Examples(store, torch.tensor(labels))
    with pytest.raises(FastcilError, match=r"test has labels from -?\d to \d; .* has 2\."):
        Dataset("five", good, bad, ("cat", "dog"))
    with pytest.raises(FastcilError, match="train has labels"):
        Dataset("five", bad, good, ("cat", "dog"))


def test_dataset_needs_a_box_for_each_image(store):
    examples = Examples(store, torch.zeros(5, dtype=torch.int64))
    dataset = Dataset("five", examples, examples, ("thing",), train_boxes=BOXES)
    assert dataset.test_boxes is None and dataset.skipped == ()
    with pytest.raises(FastcilError, match="test_boxes has shape"):
        dataclasses.replace(dataset, test_boxes=BOXES[:2])


def three(sizes=((4, 6), (5, 3), (2, 2))):
    generator = np.random.default_rng(1)
    return ImageStore.from_images(generator.integers(0, 256, (*s, 3), np.uint8) for s in sizes)


@pytest.mark.parametrize("index", [[2, 0], [1], [], [0, 0, 2], torch.tensor([True, False, True])])
def test_a_view_is_the_selection_without_its_bytes(index):
    store = three()
    view, copy = store.view(index), store.select(index)
    assert view.pixels is store.pixels and view.shared and not copy.shared
    assert len(view) == len(copy) and view.nbytes == copy.nbytes
    assert torch.equal(view.image_nbytes(), copy.image_nbytes())
    for name, value in copy.state().items():
        assert torch.equal(view.state()[name], value), name
        assert torch.equal(view.compact().state()[name], value), name
        assert torch.equal(ImageStore.cat([view, store]).state()[name][: len(value)], value[:])
    assert torch.equal(view.reconstruct().pixels, copy.pixels)
    assert all(torch.equal(view.image(k), copy.image(k)) for k in range(len(copy)))


def test_a_view_moves_its_own_pixels_alone():
    store, meta = three(), torch.device("meta")
    moved = store.view([1]).to(meta)
    assert moved.pixels.numel() == 5 * 3 * 3 and moved.pixels.device == meta and not moved.shared
    view = store.view([1])
    assert view.to("cpu") is view and store.to("cpu") is store


def test_a_view_of_a_view_and_what_is_packed_from_it():
    store = three()
    view = store.view([2, 1, 0]).view([1, 2])
    boxes = torch.tensor([[0, 0, 2, 2], [1, 1, 3, 4]], dtype=torch.int16)
    packed, other = view.compress(boxes), store.select([1, 0]).compress(boxes)
    assert not packed.shared and torch.equal(packed.pixels, other.pixels)


def test_a_part_of_what_is_in_memory_lets_the_rest_go():
    store = three()
    assert store.part([0]).pixels.numel() == 4 * 6 * 3
    mapped = ImageStore(store.pixels, store.offsets, store.geometry, True, "a checksum")
    part = mapped.part([0])
    assert part.pixels is store.pixels and part.mapped == "a checksum"
    assert part.compact().mapped is None and mapped.select([0]).mapped is None
