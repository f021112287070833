from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil import ops
from fastcil.data import Augmentation, ImageStore, read_batch, read_images, view_geometry
from fastcil.errors import FastcilError


@pytest.fixture
def stores() -> list[ImageStore]:
    rng = np.random.default_rng(0)
    sizes = [(30, 40), (25, 18), (9, 50), (33, 33)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    raw = ImageStore.from_images(images)
    boxes = torch.tensor([[4, 4, 20, 30], [0, 0, 25, 9], [3, 8, 3, 9], [1, 2, 30, 31]]).short()
    return [raw, raw.compress(boxes), raw.select([])]


def test_reads_from_several_stores(stores):
    which, index = torch.tensor([1, 0, 0, 1, 1]), torch.tensor([3, 0, 3, 0, 2])
    crops = torch.tensor([[-3.0, 0, 20, 30], [0, 0, 9, 9], [1, 2, 30, 5], [0, 0, 30, 40]])
    crops = torch.cat([crops, crops[:1]])
    flips = torch.tensor([True, False, True, False, False])
    out = read_images(stores, which, index, (12, 10), crops, flips)
    assert out.shape == (5, 3, 12, 10) and out.is_contiguous(memory_format=torch.channels_last)
    for place, (k, i) in enumerate(zip(which.tolist(), index.tolist(), strict=True)):
        one = stores[k].select([i]).reconstruct()
        zero = torch.zeros(1, dtype=torch.int64)
        here = slice(place, place + 1)
        alone = ops.read(
            [one.pixels], zero, one.offsets, one.geometry, (12, 10), crops[here], flips[here]
        )
        assert torch.equal(out[here], alone)


def test_antialias_reaches_the_kernel(stores):
    zero = torch.zeros(1, dtype=torch.int64)
    soft, sharp = (read_images(stores, zero, zero, (5, 5), antialias=a) for a in (True, False))
    assert not torch.equal(soft, sharp)


@pytest.mark.parametrize("ratio", [2.0, 4.0])
def test_a_view_shows_what_compression_would(stores, ratio):
    raw, boxes = stores[0], stores[1].boxes
    index = torch.arange(4)
    views = view_geometry(raw.sizes, boxes, ratio)
    assert views.dtype == torch.int16 and views.shape == (4, 6)
    seen = read_images([raw], index * 0, index, (16, 16), views=views)
    packed = read_images([raw.compress(boxes, ratio)], index * 0, index, (16, 16))
    assert torch.equal(seen, packed)


def test_reads_an_empty_batch(stores):
    none = torch.empty(0, dtype=torch.int64)
    assert read_images(stores, none, none, (4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("policy", ["none", "cifar", "imagenet"])
@pytest.mark.parametrize("antialias", [True, False])
def test_a_batch_is_read_changed_and_normalised(stores, policy, antialias):
    augmentation = Augmentation(
        14, policy=policy, cutout=5, contrast=0.2, saturation=0.4, antialias=antialias
    )
    which, index = torch.arange(40) % 2, torch.arange(40) % 4
    sizes = stores[0].sizes[index]
    crops, flips = augmentation.draw(sizes, torch.Generator().manual_seed(0))
    views = view_geometry(sizes, stores[1].boxes[index]) * (which[:, None] == 0)
    program = augmentation.program(40, torch.Generator().manual_seed(1))
    got = read_batch(stores, which, index, augmentation, crops, flips, views.short(), program)
    pixels = read_images(
        stores, which, index, (14, 14), crops, flips, views.short(), antialias=antialias
    )
    pixels = augmentation.pixels(pixels, torch.Generator().manual_seed(1))
    assert torch.equal(got, augmentation.normalise(pixels))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_for_another_device_moves_as_bytes(stores, monkeypatch):
    dtypes = []

    def read(dtype, **given):
        dtypes.append(dtype)
        return torch.zeros(1, 3, 2, 2)

    monkeypatch.setattr(ops, "read_batch", read)
    monkeypatch.setattr(Augmentation, "normalise", lambda self, images: images + 1)
    zero = torch.zeros(1, dtype=torch.int64)
    here = read_batch(stores, zero, zero, Augmentation(2), device=torch.device("cpu"))
    there = read_batch(stores, zero, zero, Augmentation(2), device=torch.device("meta"))
    assert dtypes == [torch.float32, torch.uint8]
    assert not here.is_meta and not here.any() and there.is_meta


def test_says_what_is_wrong(stores):
    zero, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(FastcilError, match="stores is empty"):
        read_images([], zero, zero, (4, 4))
    with pytest.raises(FastcilError, match="stores is empty"):
        read_batch([], zero, zero, Augmentation(4))
    with pytest.raises(FastcilError, match="which has shape"):
        read_images(stores, zero, two, (4, 4))
    with pytest.raises(IndexError):
        read_images(stores, zero, zero + 4, (4, 4))
    with pytest.raises(ValueError, match=r"arena.* 3 arenas|geometry\[0\]"):
        read_images(stores, zero + 3, zero, (4, 4))
    with pytest.raises(FastcilError, match="boxes has shape"):
        view_geometry(stores[0].sizes, stores[0].boxes[:2])
