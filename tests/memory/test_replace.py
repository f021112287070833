"""Other images in the place of exemplars."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcil.contract import Task
from fastcil.data import Examples, ImageStore
from fastcil.errors import FastcilError
from fastcil.memory import Memory
from fastcil.memory.codecs.bbox import BBoxCodec
from fastcil.memory.codecs.raw import RawCodec

SIDES = [(8, 9), (7, 8), (9, 9), (8, 8), (10, 7), (8, 9)]
LABELS = torch.tensor([0, 1, 0, 1, 0, 1])


def draw(sides, seed: int, value: int | None = None) -> ImageStore:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (*s, 3), np.uint8) for s in sides]
    return ImageStore.from_images([np.full_like(i, value) if value else i for i in images])


def fill(memory: Memory, boxes: Tensor | None = None, **options) -> Memory:
    new = Examples(draw(SIDES, 0), LABELS)
    task = Task(index=0, classes=(0, 1), known=0, examples=new, exemplars=new.select([]))
    memory.update(task, lambda e: torch.ones(len(e), 2), marks=boxes, **options)
    return memory


def images(memory: Memory) -> list[Tensor]:
    held = memory.examples().images
    return [held.image(k) for k in range(len(held))]


@pytest.mark.parametrize("index", [[3, 0], [1], [], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("budget", ["6 images", "4KiB", "2KiB/class", "unlimited"])
def test_labels_order_and_bytes_stay(budget, index):
    memory = fill(Memory(budget))
    before, labels, nbytes = images(memory), memory.examples().labels, memory.nbytes
    assert len(before) == 6
    sizes = memory.examples().images.sizes[index].tolist()
    other = draw(sizes, 1)
    memory.replace(torch.tensor(index, dtype=torch.int64), other, classes=2)
    expected = list(before)
    for k, place in enumerate(index):
        expected[place] = other.image(k)
    assert all(torch.equal(a, b) for a, b in zip(images(memory), expected, strict=True))
    assert torch.equal(memory.examples().labels, labels) and memory.nbytes == nbytes


def test_buffers_of_before_are_not_written_to():
    memory = fill(Memory("6 images"))
    state = memory.state()
    copies = {name: value.clone() for name, value in state.items()}
    sizes = memory.examples().images.sizes.tolist()
    memory.replace(torch.arange(6), draw(sizes, 1), classes=2)
    assert all(torch.equal(value, copies[name]) for name, value in state.items())
    assert not torch.equal(memory.state()["pixels"], state["pixels"])


class ByBrightness(RawCodec):
    """Counts bright images double, as if they were kept in more bytes."""

    name = "by-brightness"

    def nbytes(self, encoded: ImageStore) -> Tensor:
        bright = [bool(encoded.image(k).float().mean() > 200) for k in range(len(encoded))]
        return super().nbytes(encoded) * (1 + torch.tensor(bright, dtype=torch.int64))


def test_where_a_codec_needs_more_a_class_keeps_its_prefix():
    memory = fill(Memory("1600B", codec=ByBrightness()))
    assert memory.counts(2) == [3, 3]
    before = images(memory)
    sizes = memory.examples().images.sizes.tolist()
    memory.replace(torch.tensor([1]), draw(sizes[1:2], 1, value=250), classes=2)
    # 800 bytes for a class, of which the two first of class 0 now take 244 + 2 * 271.
    assert memory.counts(2) == [2, 3]
    after = images(memory)
    assert after[1].eq(250).all()
    kept = [before[0], *before[3:]]
    assert all(torch.equal(a, b) for a, b in zip([after[0], *after[2:]], kept, strict=True))


@pytest.mark.parametrize(
    ("memory", "index", "sides", "says"),
    [
        (Memory("6 images", keeps="everything"), [0], SIDES[:1], "memory keeps everything"),
        (Memory("6 images", keeps="nothing"), [], [], "memory keeps nothing"),
        (Memory("6 images", selection="own"), [0], SIDES[:1], "by selection 'own'"),
        (Memory("6 images"), [6], SIDES[:1], "positions below 6"),
        (Memory("6 images"), [-1], SIDES[:1], "positions below 6"),
        (Memory("6 images"), [0, 0], [SIDES[0]] * 2, "each once"),
        (Memory("6 images"), [0, 1], SIDES[:1], "as many as index"),
        (Memory("6 images"), [0], [(9, 8)], "height and width of its exemplar"),
        (Memory("6 images", codec=BBoxCodec()), [0], SIDES[:1], "marks is None"),
    ],
)
def test_what_cannot_be_replaced_is_refused_and_memory_unchanged(memory, index, sides, says):
    boxes = torch.tensor([[1, 1, 5, 5]] * 6, dtype=torch.int16)
    chosen = torch.arange(6) if memory.selection == "own" else None
    fill(memory, boxes, chosen=chosen)
    before = memory.checksum()
    with pytest.raises(FastcilError, match=says):
        memory.replace(torch.tensor(index, dtype=torch.int64), draw(sides, 1), classes=2)
    assert memory.checksum() == before
