from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil.contract import Task
from fastcil.data import Examples, ImageStore
from fastcil.engine.gallery import _fitted, _scale, exemplar_gallery
from fastcil.memory import Memory, make_codec
from fastcil.memory.codecs.raw import RawCodec
from fastcil.memory.originals import find_original

AMBER = (255, 190, 0)
NAMES = tuple(f"class {k}" for k in range(30))


def make_task(classes=3, per_class=6, sizes=((64, 64), (64, 48)), known=0, seed=0):
    """Images that look alike: noise over one picture, of two sizes; and a box for each."""
    rng = np.random.default_rng(seed)
    images, labels, boxes = [], [], []
    for k in range(classes * per_class):
        height, width = sizes[k % len(sizes)]
        picture = np.linspace(40, 200, height * width * 3).reshape(height, width, 3)
        images.append((picture + rng.normal(0, 12, picture.shape)).clip(0, 255).astype(np.uint8))
        labels.append(known + k % classes)
        boxes.append((10, 8, 10 + rng.integers(5, 40), 8 + rng.integers(5, 30)))
    examples = Examples(ImageStore.from_images(images), torch.tensor(labels))
    new = tuple(range(known, known + classes))
    task = Task(1, new, known, examples, examples.select([]), "task 2")
    return task, torch.tensor(boxes, dtype=torch.int16)


def remember(task, boxes, budget="100 images", codec="bbox"):
    memory = Memory(budget, codec=codec, selection="random")
    memory.update(task, embed=lambda e: torch.ones(len(e), 1), marks=boxes, seed=3)
    return memory


def halves(pair):
    """The two pictures of a pair."""
    width = (pair.shape[1] - 4) // 2
    assert (pair[:, width : width + 4] == 255).all()
    return pair[:, :width], pair[:, width + 4 :]


def doubled(image):
    return image.numpy().repeat(2, 0).repeat(2, 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_packed_exemplars_stand_beside_the_images_they_were_made_of(seed):
    task, boxes = make_task(seed=seed)
    images = task.examples.images
    memory = remember(task, boxes)
    packed = images.compress(boxes)
    payload = exemplar_gallery(task, memory, NAMES).payload
    assert len(payload["images"]) == 6
    seen = [doubled(packed.image(k)) for k in range(len(images))]
    for pair, caption, share in zip(*payload.values(), strict=True):
        original, exemplar = halves(pair)
        (k,) = [
            k for k, s in enumerate(seen) if s.shape == exemplar.shape and (s == exemplar).all()
        ]
        kept, raw = int(memory.codec.nbytes(packed)[k]), int(images.sizes[k].prod()) * 3 + 28
        assert caption == f"class {int(task.examples.labels[k])}: {kept:,} of {raw:,} bytes"
        assert share == pytest.approx(kept / raw)
        y0, x0, y1, x1 = (2 * int(b) for b in boxes[k])
        for y, x in ((y0, x0), (y1 - 1, x0), (y0, x1 - 1), (y1 - 1, x1 - 1)):
            assert tuple(original[y, x]) == AMBER
        away = np.ones(original.shape[:2], bool)
        away[y0 - 2 : y1 + 2, x0 - 2 : x1 + 2] = False
        assert (original[away] == doubled(images.image(k))[away]).all()
        inside = (slice(y0 + 2, y1 - 2), slice(x0 + 2, x1 - 2))
        assert (original[inside] == doubled(images.image(k))[inside]).all()


class Coarse(RawCodec):
    """Keeps the four highest bits."""

    name = "coarse"

    def encode(self, images, marks=None):
        return ImageStore(images.pixels & 0xF0, images.offsets, images.geometry)


def test_originals_are_found_for_any_codec():
    task, boxes = make_task()
    memory = remember(task, boxes, codec=Coarse())
    shown = exemplar_gallery(task, memory, NAMES).payload["images"]
    assert len(shown) == 6
    for pair in shown:
        original, exemplar = halves(pair)
        assert (original & 0xF0 == exemplar).all()
        assert (original != exemplar).any()


def test_raw_exemplars_have_no_box():
    task, boxes = make_task()
    payload = exemplar_gallery(task, remember(task, boxes, codec="raw"), NAMES).payload
    assert payload["shares"] == [1.0] * 6
    for pair in payload["images"]:
        original, exemplar = halves(pair)
        assert (original == exemplar).all()


@pytest.mark.parametrize(
    ("classes", "per_task", "labels"),
    [
        (11, 6, [0, 2, 4, 6, 8, 10]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (4, 6, [0, 0, 1, 1, 2, 3]),
        (1, 3, [0, 0, 0]),
        (2, 9, [0, 0, 0, 1, 1, 1]),
    ],
)
def test_classes_are_taken_evenly_in_the_order_of_selection(classes, per_task, labels):
    task, boxes = make_task(classes, per_class=3, sizes=((16, 16),))
    memory = remember(task, boxes.clamp_max(16), "1000 images")
    payload = exemplar_gallery(task, memory, NAMES, per_task).payload
    assert [int(c.split(":")[0][6:]) for c in payload["captions"]] == labels
    held = memory.examples()
    first = [int((held.labels == label).nonzero()[0]) for label in set(labels)]
    shown = [halves(pair)[1] for pair in payload["images"]]
    for k in first:
        exemplar = held.images.image(k).numpy().repeat(8, 0).repeat(8, 1)
        assert any((exemplar == s).all() for s in shown)


def test_only_new_classes_are_shown():
    task, boxes = make_task()
    memory = remember(task, boxes)
    later, later_boxes = make_task(classes=2, known=3, seed=9)
    memory.update(later, lambda e: torch.ones(len(e), 1), marks=later_boxes)
    captions = exemplar_gallery(later, memory, NAMES).payload["captions"]
    assert {c.split(":")[0] for c in captions} == {"class 3", "class 4"}
    again = Task(2, (3,), 5, later.examples, later.exemplars)
    assert exemplar_gallery(again, memory, NAMES).payload["images"] == []


def test_nothing_is_shown_of_an_empty_memory():
    task, boxes = make_task()
    record = exemplar_gallery(task, remember(task, boxes, "none"), NAMES)
    assert record.title == "Exemplars of task 2"
    assert record.payload == {"images": [], "captions": [], "shares": []}


@pytest.mark.parametrize(
    ("size", "shown"),
    [((300, 225), (128, 96)), ((20, 20), (128, 128)), ((50, 400), (24, 192)), ((400, 2), (128, 1))],
)
def test_pictures_have_a_common_height(size, shown):
    task, boxes = make_task(1, 2, sizes=(size,))
    record = exemplar_gallery(task, remember(task, boxes, codec="raw"), NAMES)
    assert record.payload["images"][0].shape == (shown[0], 2 * shown[1] + 4, 3)
    assert record.payload["images"][0].dtype == np.uint8


def test_large_images_are_compared_at_sampled_values():
    task, boxes = make_task(1, 12, sizes=((120, 160),))
    memory = remember(task, boxes, codec=Coarse())
    for pair in exemplar_gallery(task, memory, NAMES).payload["images"]:
        original, exemplar = (half.astype(int) for half in halves(pair))
        assert 0 < (original - exemplar).mean() < 16
        assert (original - exemplar).max() < 20


def test_exemplars_that_the_codec_shrank_stand_beside_their_originals():
    # Of 62 x 94 pixels are left 44 x 66, which fitted by themselves would be a row higher.
    # 45 x 45 is what is left of 64 x 64: the size alone does not say which image it was.
    task, boxes = make_task(sizes=((64, 64), (62, 94), (45, 45)), classes=2, per_class=9)
    memory = remember(task, boxes, codec=make_codec("bbox", foreground_ratio=2.0))
    payload = exemplar_gallery(task, memory, NAMES).payload
    assert len(payload["images"]) == 6
    # What is drawn on the left is the image that was shrunk: the first four of either class.
    small = memory.codec.encode(task.examples.images, boxes)
    originals = task.examples.images
    shapes = set()
    for pair in payload["images"]:
        sizes = [_fitted(originals.image(k).numpy()) for k in range(len(originals))]
        matches = [
            k
            for k, size in enumerate(sizes)
            if np.array_equal(pair[:, -size[1] :], _scale(small.image(k).numpy(), size))
        ]
        assert len(matches) == 1
        shown = _scale(originals.image(matches[0]).numpy(), sizes[matches[0]])
        shapes.add(shown.shape)
        left = pair[:, : shown.shape[1]]
        assert (left == shown).all(2).mean() > 0.8, "but for the lines of its box"
    assert shapes >= {(128, 128, 3), (127, 192, 3)}


def test_a_sparse_exemplar_is_paired_by_the_pixels_it_keeps():
    """Of two images of a class the one that was stored, though what fills it is like the other."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    codec = make_codec("sparse", threshold=0.5, rule="zero")
    images[1, 4:] = 0  # black, as dropped pixels are
    store = ImageStore.from_batch(torch.from_numpy(images))
    maps = torch.zeros(2, 8, 8)
    maps[:, 3:5, 3:5] = 1.0
    new = Examples(store, torch.tensor([0, 0]))
    task = Task(0, (0,), 0, new, new.select([]), "task 1")
    memory = Memory("1 images", codec, selection="random")
    memory.update(task, embed=lambda e: torch.ones(len(e), 1), marks=maps)
    held = memory.examples().images
    for place in range(len(held)):
        kept = memory.faithful(place).view(16, 16)
        found = find_original(new, 0, held.image(place), memory.faithful(place))
        assert torch.equal(held.image(place)[kept], store.image(found)[kept])
    assert {find_original(new, 0, held.image(p), memory.faithful(p)) for p in range(2)} == {0, 1}
