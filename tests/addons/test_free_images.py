"""Images read with gradients are the images that the reader reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil.addons.free_images import FreeImages
from fastcil.data import Augmentation, ImageStore, read_batch

SIZES = [(16, 16), (20, 31), (9, 12), (40, 17)]
AUGMENTATIONS = {
    "whole": Augmentation(12, crop="none"),
    "padded": Augmentation.cifar(12),
    "centre": Augmentation.photos(12),
    "no antialias": Augmentation.photos(12, antialias=False),
    "enlarging": Augmentation(48, crop="none"),
}


def draw(sizes=SIZES, seed=0) -> ImageStore:
    rng = np.random.default_rng(seed)
    return ImageStore.from_images([rng.integers(0, 256, (*s, 3), np.uint8) for s in sizes])


def by_reader(store: ImageStore, augmentation: Augmentation, index: torch.Tensor) -> torch.Tensor:
    crops = augmentation.centre(store.sizes[index])
    return read_batch([store], torch.zeros_like(index), index, augmentation, crops=crops)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_reads_what_the_reader_reads_but_for_its_rounding(name):
    augmentation, store = AUGMENTATIONS[name], draw()
    free = FreeImages(store, augmentation)
    index = torch.tensor([3, 0, 1, 0, 2])
    found = free.read(free.start(), index)
    expected = by_reader(store, augmentation, index)
    assert found.is_contiguous(memory_format=torch.channels_last)
    # A level, and what the reader's 14-bit weights add to its last rounding.
    levels = (found - expected).abs() * torch.tensor(augmentation.std).view(3, 1, 1) * 255
    assert found.shape == expected.shape
    assert levels.max() < 0.52


def test_an_image_of_the_networks_own_size_is_copied():
    augmentation, store = Augmentation.cifar(16), draw([(16, 16)] * 3)
    free = FreeImages(store, augmentation)
    index = torch.tensor([2, 0])
    expected = by_reader(store, augmentation, index)
    assert torch.allclose(free.read(free.start(), index), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["padded", "centre"])
def test_gradient_reaches_the_pixels_that_are_seen(name):
    augmentation = AUGMENTATIONS[name]
    free = FreeImages(draw([(5, 7), (6, 4)]), augmentation)
    values = free.start().double().requires_grad_()
    index = torch.tensor([1, 1, 0])
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 3, 12, 12, generator=generator, dtype=torch.float64)
    change = torch.randn(len(values), generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((free.read(values, index) * weight).sum(), [values])
    # Reading is linear, so that any change says all.
    with torch.no_grad():
        expected = ((free.read(values + change, index) - free.read(values, index)) * weight).sum()
    assert torch.isclose(gradient @ change, expected, rtol=1e-9)
    (gradient,) = torch.autograd.grad(free.read(values, torch.tensor([0])).sum(), [values])
    assert not gradient[5 * 7 * 3 :].any(), "the other image is not read"
    seen = gradient[: 5 * 7 * 3].view(5, 7, 3).ne(0).all(-1)
    # The middle square is 4.4 pixels wide, of 7.
    assert seen.all() if name == "padded" else not seen[:, [0, 6]].any() and seen[:, 1:6].all()


def test_untouched_pixels_come_back_exactly():
    every = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).view(1, 16, 16, 3)
    store = ImageStore.cat([ImageStore.from_batch(every), draw()])
    free = FreeImages(store, Augmentation.cifar(16))
    back = free.store(free.start()).state()
    assert all(torch.equal(back[name], value) for name, value in store.state().items())


def test_values_are_clamped_to_levels_and_rounded_to_the_nearest():
    store = ImageStore.from_batch(torch.full((1, 1, 2, 3), 100, dtype=torch.uint8))
    free = FreeImages(store, Augmentation.cifar(2))
    level = 1 / (255 * torch.tensor(free.augmentation.std))
    values = free.start() + torch.cat([0.4 * level, -0.6 * level])
    assert free.store(values).pixels.tolist() == [100] * 3 + [99] * 3
    free.clamp(values)
    assert free.store(values).pixels.tolist() == [100] * 3 + [99] * 3
    values = free.start() + torch.cat([400 * level, -400 * level])
    free.clamp(values)
    assert free.store(values).pixels.tolist() == [255] * 3 + [0] * 3
    again = values.clone()
    free.clamp(again)
    assert torch.equal(values, again)


def test_packed_images_are_read_as_they_are_seen():
    store = draw([(16, 16)] * 2)
    packed = store.compress(torch.tensor([[2, 2, 9, 9]] * 2, dtype=torch.int16))
    free = FreeImages(packed, Augmentation(16, crop="none"))
    index = torch.arange(2)
    expected = by_reader(packed, free.augmentation, index)
    assert torch.allclose(free.read(free.start(), index), expected, atol=1e-6, rtol=0)
    assert len(free.store(free.start()).pixels) == 2 * 16 * 16 * 3
