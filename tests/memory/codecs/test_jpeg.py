"""Files are Pillow's byte for byte, images OpenCV's bit for bit, and memory counts the files."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from streams import buffers_nbytes, embed, stream

from fastcil.data import ImageStore
from fastcil.errors import FastcilError
from fastcil.memory import Budget, ByteStore, Memory, make_codec

SIZES = [(1, 1), (1, 9), (9, 1), (7, 13), (8, 8), (16, 17), (33, 31), (64, 48), (101, 75)]


def picture(height, width, seed=0):
    """Smooth colours and some noise, as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    colours = np.stack([100 + 90 * np.sin(y / 9), 90 + 80 * np.cos(x / 7), (2 * x + y) % 256], -1)
    return (colours + rng.normal(0, 9, colours.shape)).clip(0, 255).astype(np.uint8)


def fuzzed(count, seed):
    rng = np.random.default_rng(seed)
    return [picture(*rng.integers(1, 60, 2), seed=k) for k in range(count)]


def pillow(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.mark.parametrize("quality", [1, 10, 50, 75, 90, 100])
def test_files_are_pillows_and_images_opencvs(quality):
    images = [picture(*size, seed=k) for k, size in enumerate(SIZES)] + fuzzed(12, quality)
    codec = make_codec("jpeg", quality=quality)
    kept = codec.encode(ImageStore.from_images(images), None)
    seen = codec.decode(kept)
    assert isinstance(kept, ByteStore) and len(kept) == len(seen) == len(images)
    nbytes, units = codec.nbytes(kept).tolist(), codec.units(kept)
    for place, (image, file) in enumerate(zip(images, kept.strings(), strict=True)):
        assert bytes(file) == pillow(image, quality)
        decoded = cv2.imdecode(file, cv2.IMREAD_COLOR)[:, :, ::-1]
        assert np.array_equal(seen.image(place).numpy(), decoded)
        assert nbytes[place] == len(file) + 12
        assert float(units[place]) == pytest.approx(len(file) / image.size, rel=1e-12)
    assert sum(nbytes) == kept.nbytes + 4 * len(images)
    assert units.dtype == torch.float64


def test_quality_is_75_unless_said_otherwise():
    image = picture(40, 40)
    kept = make_codec("jpeg").encode(ImageStore.from_images([image]), None)
    assert bytes(kept.strings()[0]) == pillow(image, 75)


def test_threads_change_nothing():
    store = ImageStore.from_images(fuzzed(41, 3))
    codec, threads = make_codec("jpeg"), torch.get_num_threads()
    states = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            kept = codec.encode(store, None)
            states.append({**kept.state(), **codec.decode(kept).state()})
    finally:
        torch.set_num_threads(threads)
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_images_from_anywhere_in_a_store():
    images = fuzzed(6, 4)
    store, codec = ImageStore.from_images(images), make_codec("jpeg")
    scattered = ImageStore(store.pixels, store.offsets[[4, 1, 1]], store.geometry[[4, 1, 1]])
    files = codec.encode(scattered, None).strings()
    assert [bytes(f) for f in files] == [pillow(images[k], 75) for k in (4, 1, 1)]
    boxes = torch.tensor([[0, 0, 3, 3]] * 6, dtype=torch.int16)
    packed = store.compress(boxes)
    files = codec.encode(packed, None).strings()
    assert [bytes(f) for f in files] == [pillow(packed.image(k).numpy(), 75) for k in range(6)]


def test_no_images():
    codec = make_codec("jpeg")
    kept = codec.encode(ImageStore.empty(), None)
    assert len(kept) == len(codec.decode(kept)) == 0
    assert codec.units(kept).tolist() == codec.nbytes(kept).tolist() == []


def test_an_image_of_the_published_accounts_may_be_a_file():
    store = ImageStore.from_images([picture(64, 48)])
    raw, files = make_codec("jpeg"), make_codec("jpeg", bits_per_pixel=4.8)
    kept = raw.encode(store, None)
    assert float(files.units(kept)) == pytest.approx(5 * float(raw.units(kept)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quality": 0}, "quality is 0; it must be a whole number from 1 to 100"),
        ({"quality": 101}, "quality is 101"),
        ({"quality": 50.0}, "quality is 50.0"),
        ({"quality": True}, "quality is True"),
        ({"bits_per_pixel": 0}, "bits_per_pixel is 0"),
        ({"bits_per_pixel": float("nan")}, "bits_per_pixel is nan"),
        ({"qualty": 5}, "did you mean 'quality'"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(FastcilError, match=says):
        make_codec("jpeg", **options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file[:0],
        lambda file: file[100:],
        lambda file: np.zeros_like(file),
        lambda file: np.frombuffer(pillow(picture(12, 13), 75), np.uint8),
        lambda file: cv2.imencode(".jpg", picture(9, 9))[1].reshape(-1),
    ],
)
def test_a_damaged_file_is_a_sentence(damage):
    codec = make_codec("jpeg")
    good = codec.encode(ImageStore.from_images([picture(13, 12), picture(8, 8)]), None)
    first, second = good.strings()
    bad = ByteStore.from_strings([second, damage(first)], good.sizes[[1, 0]])
    with pytest.raises(FastcilError, match="exemplar 1 is no JPEG file of 13 x 12 pixels"):
        codec.decode(bad)


BUDGETS = ["30 images", "2 images/class", "25000 B", "3000 B/class", "unlimited", "none"]


@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("selection", ["herding", "random"])
@pytest.mark.filterwarnings("ignore:memory is")
def test_a_memory_of_files_keeps_to_its_budget(text, selection):
    memory, budget = Memory(text, "jpeg", selection), Budget.parse(text)
    for task, _ in stream(0):
        memory.update(task, embed, seed=task.index)
        held = buffers_nbytes(memory)
        assert memory.nbytes == held == int(memory.exemplar_nbytes().sum())
        assert held == sum(b.untyped_storage().nbytes() for b in memory.state().values())
        total = held if budget.unit == "bytes" else memory.units
        assert total <= budget.limit(task.total) + 1e-6
        if text not in ("unlimited", "none"):
            assert total > 0.25 * budget.limit(task.total)


def test_a_memory_remembers_the_files_images_and_decodes_them_once(monkeypatch):
    memory = Memory("9 images", "jpeg")
    codec, calls = memory.codec, []
    decode = type(codec).decode
    monkeypatch.setattr(type(codec), "decode", lambda *a: calls.append(1) or decode(*a))
    looked = []

    def look(examples):
        looked.append(examples.images)
        return embed(examples)

    (task, _), (later, _), *_ = stream(2)
    assert memory.working_nbytes == 0
    memory.update(task, look)
    shown = [codec.encode(task.examples.select(task.examples.labels == c).images) for c in range(3)]
    for images, files in zip(looked, shown, strict=True):
        assert torch.equal(images.pixels, decode(codec, files).pixels)
    assert memory.working_nbytes == 0
    calls.clear()
    examples = memory.examples()
    assert memory.examples().images is examples.images and len(calls) == 1
    raw = 3 * int(examples.images.sizes.prod(1).sum()) + 24 * len(memory)
    assert memory.working_nbytes == raw == examples.images.nbytes
    assert memory.nbytes == buffers_nbytes(memory)
    memory.release()
    assert memory.working_nbytes == 0
    assert torch.equal(memory.examples().images.pixels, examples.images.pixels)
    memory.update(later, embed)
    assert memory.working_nbytes == 0
    assert len(memory.examples()) == len(memory) != len(examples)


def test_files_of_several_qualities_stand_side_by_side():
    memory = Memory("unlimited", make_codec("jpeg", quality=90))
    (task, _), (later, _), *_ = stream(3)
    memory.update(task, embed)
    before = [image.clone() for image in map(memory.examples().images.image, range(len(memory)))]
    memory.use(make_codec("jpeg", quality=10))
    memory.update(later, embed)
    after = memory.examples().images
    assert all(torch.equal(after.image(k), image) for k, image in enumerate(before))
    files = memory.codec.encode(later.examples.images, None)
    assert {bytes(f) for f in files.strings()} <= {
        bytes(f) for f in ByteStore.from_state(memory.state()).strings()
    }


def test_what_a_memory_saves():
    (task, _), (later, _), *_ = stream(4)
    memory, twin = Memory("9 images", "jpeg"), Memory("9 images", "jpeg")
    memory.update(task, embed)
    memory.examples()
    saved = {name: buffer.clone() for name, buffer in memory.state().items()}
    assert set(saved) == {"data", "lengths", "sizes", "labels"}
    twin.restore(saved)
    assert twin.checksum() == memory.checksum()
    for one in (memory, twin):
        one.update(later, embed)
    assert twin.checksum() == memory.checksum()
    for change, says in (
        ({"labels": saved["labels"][1:]}, "labels for"),
        ({"data": saved["data"][:-1]}, "lengths sum up to"),
        ({"pixels": saved["data"]}, "pixels missing or not known"),
    ):
        with pytest.raises(FastcilError, match=says):
            twin.restore({**saved, **change})
        assert twin.checksum() == memory.checksum()
    with pytest.raises(FastcilError, match="the saved memory does not fit"):
        Memory("9 images").restore(saved)


def test_own_choice_may_be_of_files():
    (task, _), (later, _), *_ = stream(5)
    memory = Memory("6 images", "jpeg", "own")
    chosen = torch.arange(len(task.examples)).flip(0)
    memory.update(task, embed, chosen=chosen)
    held = ByteStore.from_state({k: v for k, v in memory.state().items() if k != "labels"})
    files = memory.codec.encode(task.examples.images.select(chosen[: len(memory)])).strings()
    assert [bytes(f) for f in held.strings()] == [bytes(f) for f in files]
    again = torch.tensor([len(later.examples), 0, len(later.examples) + 1])
    memory.update(later, embed, chosen=again)
    labels = [int(task.examples.labels[chosen[0]]), int(later.examples.labels[0])]
    assert memory.examples().labels.tolist()[:2] == labels
