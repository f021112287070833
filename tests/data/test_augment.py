"""Augmentation: crops against the published algorithm, pixels, normalisation and its checks."""

from __future__ import annotations

import math
import random
from dataclasses import FrozenInstanceError, replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from fastcil.data import ImageStore, load, read_batch
from fastcil.data.augment import Augmentation
from fastcil.data.autoaugment import draw
from fastcil.ops import pixel_ops


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sizes(height: int, width: int, count: int) -> torch.Tensor:
    return torch.tensor([[height, width]]).expand(count, 2)


def resized_crop(height: int, width: int, least: float, rng: random.Random) -> tuple[float, ...]:
    """RandomResizedCrop for one image as published: ten tries, then the middle."""
    for _ in range(10):
        area = height * width * rng.uniform(least, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            y, x = rng.randint(0, height - h), rng.randint(0, width - w)
            return y, x, y + h, x + w
    h, w = height, width
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    y, x = (height - h) // 2, (width - w) // 2
    return y, x, y + h, x + w


@pytest.mark.parametrize(
    ("height", "width", "least"),
    [(96, 96, 0.08), (64, 100, 0.08), (120, 40, 0.3), (200, 30, 0.08), (30, 33, 1.0)],
)
def test_resized_crops_are_distributed_as_published(height: int, width: int, least: float) -> None:
    count = 20_000
    crops, _ = Augmentation(32, min_scale=least).draw(sizes(height, width, count), seeded(1))
    assert crops.dtype == torch.float32 and crops.shape == (count, 4)
    rng = random.Random(2)
    expected = torch.tensor([resized_crop(height, width, least, rng) for _ in range(count)])
    for column, length in enumerate((height, width, height, width)):
        got, wanted = crops[:, column].double() / length, expected[:, column].double() / length
        noise = 5 * math.sqrt((got.var() + wanted.var()) / count)
        assert got.mean().item() == pytest.approx(wanted.mean().item(), abs=noise + 1e-12)
        quarters = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
        shift = got.quantile(quarters) - wanted.quantile(quarters)
        assert shift.abs().max() <= 0.02 + 1.01 / length
    area = (expected[:, 2] - expected[:, 0]) * (expected[:, 3] - expected[:, 1])
    got_area = (crops[:, 2] - crops[:, 0]) * (crops[:, 3] - crops[:, 1])
    assert got_area.mean().item() == pytest.approx(area.double().mean().item(), rel=0.03)


def test_resized_crops_keep_inside_the_image_and_the_ratios() -> None:
    shape = torch.randint(20, 300, (5000, 2), generator=seeded(3))
    crops, _ = Augmentation(32).draw(shape, seeded(4))
    y0, x0, y1, x1 = crops.unbind(1)
    assert torch.equal(crops, crops.round())
    assert (y0 >= 0).all() and (x0 >= 0).all()
    assert (y1 <= shape[:, 0]).all() and (x1 <= shape[:, 1]).all()
    tall, wide = y1 - y0, x1 - x0
    assert ((wide + 0.5) / (tall - 0.5) >= 3 / 4).all()
    assert ((wide - 0.5) / (tall + 0.5) <= 4 / 3).all()


@pytest.mark.parametrize(
    ("size", "crop"),
    [
        ((1000, 10), (493, 0, 506, 10)),
        ((10, 1000), (0, 493, 10, 506)),
        ((11, 1000), (0, 492, 11, 507)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_a_crop_that_cannot_fit_is_the_middle(size: tuple[int, int], crop: tuple) -> None:
    # A whole area of so narrow an image has no allowed ratio.
    crops, _ = Augmentation(32, min_scale=1.0).draw(sizes(*size, 50), seeded(5))
    assert torch.equal(crops, torch.tensor(crop, dtype=torch.float32).expand(50, 4))


@pytest.mark.parametrize(("padding", "least", "most"), [(4, -4, 4), (0, 0, 0), (1, -1, 1)])
def test_padded_crops_are_uniform_whole_squares(padding: int, least: int, most: int) -> None:
    count = 9000
    augmentation = Augmentation(32, crop="padded", padding=padding)
    crops, _ = augmentation.draw(sizes(32, 32, count), seeded(6))
    assert torch.equal(crops[:, 2:] - crops[:, :2], torch.full((count, 2), 32.0))
    for start in (crops[:, 0], crops[:, 1]):
        values, counts = start.unique(return_counts=True)
        assert values.tolist() == list(range(least, most + 1))
        share = 1 / len(values)
        noise = 5 * math.sqrt(share * (1 - share) / count)
        assert (counts / count - share).abs().max() <= noise
    if padding:
        assert abs(np.corrcoef(crops[:, 0], crops[:, 1])[0, 1]) < 0.06


def test_padded_crops_of_larger_and_smaller_images() -> None:
    shape = torch.tensor([[50, 10]] * 2000)
    crops, _ = Augmentation(32, crop="padded").draw(shape, seeded(7))
    assert (crops[:, 0].min(), crops[:, 0].max()) == (-4, 22)
    assert set(crops[:, 1].tolist()) == {-11.0}
    assert set((crops[:, 3] - crops[:, 1]).tolist()) == {32.0}


def test_no_crop_is_the_whole_image() -> None:
    augmentation = Augmentation(32, crop="none")
    shape = torch.tensor([[50, 10], [7, 9]])
    crops, _ = augmentation.draw(shape, seeded())
    expected = torch.tensor([[0.0, 0, 50, 10], [0, 0, 7, 9]])
    for got in (crops, augmentation.whole(shape), augmentation.centre(shape)):
        assert torch.equal(got, expected) and got.dtype == torch.float32


def test_half_the_images_are_flipped_or_none() -> None:
    _, flips = Augmentation(8).draw(sizes(9, 9, 10_000), seeded(8))
    assert flips.dtype == torch.bool and flips.shape == (10_000,)
    assert flips.double().mean().item() == pytest.approx(0.5, abs=0.025)
    _, flips = Augmentation(8, flip=False).draw(sizes(9, 9, 100), seeded(8))
    assert not flips.any()


@pytest.mark.parametrize(
    ("size", "ratio", "shape", "crop"),
    [
        (224, 256 / 224, (256, 256), (16, 16, 240, 240)),
        (224, 256 / 224, (512, 256), (144, 16, 368, 240)),
        (224, 1.0, (100, 300), (0, 100, 100, 200)),
        (64, 1.25, (40, 50), (4, 9, 36, 41)),
    ],
)
def test_the_centre_of_a_test_image(
    size: int, ratio: float, shape: tuple[int, int], crop: tuple
) -> None:
    got = Augmentation(size, test_ratio=ratio).centre(torch.tensor([shape]))
    assert torch.allclose(got, torch.tensor([crop], dtype=torch.float32), atol=1e-4)


def test_test_crops_of_the_other_kinds() -> None:
    shape = torch.tensor([[40, 50]], dtype=torch.int16)
    expected = torch.tensor([[0.0, 0, 40, 50]])
    assert torch.equal(Augmentation.cifar().centre(shape), expected)
    assert torch.equal(Augmentation(8).whole(shape), expected)


def test_brightness_is_uniform_about_one() -> None:
    images = torch.full((4000, 3, 2, 2), 100, dtype=torch.uint8)
    augmentation = Augmentation(2, brightness=0.4)
    got = augmentation.pixels(images, seeded(9))
    assert torch.equal(got, got[:, :1, :1, :1].expand_as(got))
    level = got[:, 0, 0, 0].double()
    assert level.min() == 60 and level.max() == 139  # factors cut off to whole levels
    assert level.mean().item() == pytest.approx(99.5, abs=2)
    assert level.var().item() == pytest.approx(80**2 / 12, rel=0.06)


@pytest.mark.parametrize("side", [1, 6, 7])
def test_cutout_covers_a_square_anywhere(side: int) -> None:
    images = torch.full((3000, 3, 12, 10), 255, dtype=torch.uint8)
    got = Augmentation(12, brightness=0.0, cutout=side).pixels(images, seeded(10))
    black = (got == 0).all(1)
    assert torch.equal(black, (got == 0).any(1))
    lines, columns = black.any(2).sum(1), black.any(1).sum(1)
    assert torch.equal(black.sum((1, 2)), lines * columns)
    assert lines.max() == side and columns.max() == side
    assert black.any(0).all(), "some pixels are never covered"


def test_nothing_to_do_gives_the_images_back() -> None:
    images = torch.randint(0, 256, (3, 3, 5, 4), dtype=torch.uint8)
    assert torch.equal(Augmentation(5, brightness=0.0).pixels(images, seeded()), images)


def test_brightness_then_policy_then_cutout() -> None:
    images = torch.randint(1, 256, (32, 3, 16, 16), generator=seeded(11), dtype=torch.uint8)
    augmentation = Augmentation(16, policy="cifar", brightness=0.25, cutout=8)
    generator = seeded(12)
    got = augmentation.pixels(images, generator)
    again = seeded(12)
    factor = 0.75 + 0.5 * torch.rand(32, generator=again, dtype=torch.float64)
    expected = pixel_ops.brightness(images, factor)
    expected = draw(32, "cifar", again).program(16, 16).run(expected)
    y, x = (torch.randint(16, (32,), generator=again) for _ in range(2))
    black = torch.zeros(32, 3, dtype=torch.uint8)
    expected = pixel_ops.cutout(expected, y, x, torch.full_like(y, 8), black)
    assert torch.equal(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(generator.get_state(), again.get_state())


def test_brightness_then_contrast_then_saturation() -> None:
    images = torch.randint(0, 256, (20, 3, 7, 9), generator=seeded(11), dtype=torch.uint8)
    generator = seeded(12)
    got = Augmentation(7, brightness=0.25, contrast=0.5, saturation=1.0).pixels(images, generator)
    again, expected = seeded(12), images
    changes = ((pixel_ops.brightness, 0.25), (pixel_ops.contrast, 0.5), (pixel_ops.colour, 1.0))
    for change, most in changes:
        luck = torch.rand(20, generator=again, dtype=torch.float64)
        expected = change(expected, 1 + most * (2 * luck - 1))
    assert torch.equal(got, expected)
    assert torch.equal(generator.get_state(), again.get_state())


@pytest.mark.parametrize("name", ["contrast", "saturation"])
def test_a_jitter_alone(name: str) -> None:
    images = torch.randint(0, 256, (8, 3, 5, 5), generator=seeded(1), dtype=torch.uint8)
    got = Augmentation(5, brightness=0.0, **{name: 0.5}).pixels(images, seeded(2))
    factor = 0.5 + torch.rand(8, generator=seeded(2), dtype=torch.float64)
    change = pixel_ops.contrast if name == "contrast" else pixel_ops.colour
    assert torch.equal(got, change(images, factor))


def test_a_program_is_what_pixels_does() -> None:
    augmentation = Augmentation(12, policy="imagenet", cutout=5, contrast=0.3, saturation=0.3)
    images = torch.randint(0, 256, (40, 3, 12, 12), generator=seeded(3), dtype=torch.uint8)
    program = augmentation.program(40, seeded(4))
    assert torch.equal(program.run(images), augmentation.pixels(images, seeded(4)))


@pytest.mark.parametrize("crop", ["resized", "padded", "window", "none"])
def test_same_seed_same_bits(crop: Any) -> None:
    augmentation = Augmentation(16, crop=crop, policy="imagenet", cutout=4)
    shape = torch.randint(16, 60, (24, 2), generator=seeded(13))
    images = torch.randint(0, 256, (24, 3, 16, 16), generator=seeded(14), dtype=torch.uint8)
    before = images.clone()

    def run(seed: int) -> tuple[torch.Tensor, ...]:
        generator = seeded(seed)
        return (*augmentation.draw(shape, generator), augmentation.pixels(images, generator))

    assert all(torch.equal(a, b) for a, b in zip(run(15), run(15), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(run(15), run(16), strict=True))
    assert torch.equal(images, before), "the input was written to"


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2**-22), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
)
def test_normalise_against_float64(dtype: torch.dtype, tolerance: float) -> None:
    augmentation = Augmentation.cifar()
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    got = augmentation.normalise(images, dtype)
    mean = torch.tensor(augmentation.mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(augmentation.std, dtype=torch.float64).view(3, 1, 1)
    expected = (images.double() / 255 - mean) / std
    assert got.dtype == dtype and got.shape == images.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    # Half an ulp of the dtype, and the rounding of mean / std where the two nearly cancel.
    bound = tolerance * expected.abs() + 2**-21
    assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("policy", ["none", "cifar", "imagenet"])
@pytest.mark.parametrize("crop", ["resized", "padded", "window", "none"])
def test_nothing_waits_for_the_device(policy: Any, crop: Any) -> None:
    # Meta tensors hold no values, so reading one back is an error.
    resize = 9 if crop == "window" else None
    augmentation = Augmentation(8, crop=crop, policy=policy, cutout=2, resize=resize)
    images = torch.empty((40, 3, 8, 8), dtype=torch.uint8, device="meta")
    shape = torch.empty((40, 2), dtype=torch.int64, device="meta")
    crops, flips = augmentation.draw(shape, seeded())
    assert crops.is_meta and flips.is_meta and augmentation.centre(shape).is_meta
    got = augmentation.normalise(augmentation.pixels(images, seeded()))
    assert got.is_meta and got.shape == images.shape


def test_empty_batches_stay_empty() -> None:
    augmentation = Augmentation(8, policy="cifar", cutout=2)
    empty = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    assert augmentation.pixels(empty, seeded()).shape == (0, 3, 8, 8)
    assert augmentation.normalise(empty).shape == (0, 3, 8, 8)
    crops, flips = augmentation.draw(torch.empty(0, 2, dtype=torch.int64), seeded())
    assert crops.shape == (0, 4) and flips.shape == (0,)


def test_presets() -> None:
    cifar = Augmentation.cifar()
    assert (cifar.size, cifar.crop, cifar.padding, cifar.flip) == (32, "padded", 4, True)
    assert cifar.brightness == 63 / 255
    assert cifar.mean == (0.5071, 0.4867, 0.4408) and cifar.std == (0.2675, 0.2565, 0.2761)
    photos = Augmentation.photos(224)
    assert (photos.size, photos.crop, photos.min_scale) == (224, "resized", 0.08)
    assert photos.mean == (0.485, 0.456, 0.406) and photos.std == (0.229, 0.224, 0.225)
    assert Augmentation.photos(96, crop="none", cutout=3) == Augmentation(96, "none", cutout=3)
    assert replace(cifar, policy="cifar", cutout=16) == Augmentation.cifar(
        policy="cifar", cutout=16
    )
    with pytest.raises(FrozenInstanceError):
        cifar.size = 64  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 0),
        ("size", 32.0),
        ("size", True),
        ("crop", "random"),
        ("min_scale", 0.0),
        ("min_scale", 1.1),
        ("min_scale", math.nan),
        ("padding", -1),
        ("padding", 1.5),
        ("flip", 1),
        ("brightness", -0.1),
        ("brightness", 1.5),
        ("brightness", "high"),
        ("contrast", -0.1),
        ("saturation", 1.5),
        ("policy", "svhn"),
        ("cutout", -2),
        ("mean", (0.5, 0.5)),
        ("mean", 0.5),
        ("std", (0.5, 0.5, 0.0)),
        ("std", (0.5, 0.5, math.inf)),
        ("antialias", None),
        ("test_ratio", 0.9),
        ("test_ratio", math.inf),
        ("resize", 31),
        ("resize", 40.0),
        ("resize", True),
        ("resize", 40),  # of crop "resized"
    ],
)
def test_a_wrong_field_is_named_in_one_sentence(name: str, value: object) -> None:
    fields: dict[str, Any] = {"size": 32, name: value}
    with pytest.raises(ValueError, match=f"^{name} is ") as caught:
        Augmentation(**fields)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_wrong_arguments_are_named() -> None:
    augmentation = Augmentation(8)
    for call in (augmentation.centre, augmentation.whole):
        with pytest.raises(ValueError, match="sizes is"):
            call(torch.zeros(3))
        with pytest.raises(ValueError, match="sizes is list"):
            call([[3, 4]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sizes is"):
        augmentation.draw(torch.zeros(3, 3), seeded())
    with pytest.raises(ValueError, match="images"):
        augmentation.pixels(torch.zeros(2, 3, 8, 8), seeded())
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"dtype is torch\.float64"):
        augmentation.normalise(images, torch.float64)
    with pytest.raises(ValueError, match="images"):
        augmentation.normalise(images.float())


def test_windows_are_uniform_squares_of_the_own_resolution() -> None:
    count = 8000
    crops, _ = Augmentation(32, crop="window").draw(sizes(36, 33, count), seeded(31))
    assert torch.equal(crops[:, 2:] - crops[:, :2], torch.full((count, 2), 32.0))
    for start, places in ((crops[:, 0], 5), (crops[:, 1], 2)):
        values, counts = start.unique(return_counts=True)
        assert values.tolist() == list(range(places))
        noise = 5 * math.sqrt((1 - 1 / places) / places / count)
        assert (counts / count - 1 / places).abs().max() <= noise


def test_windows_read_as_a_naive_crop_and_small_images_are_enlarged() -> None:
    rng = np.random.default_rng(7)
    pictures = [
        rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((40, 51), (32, 32), (20, 27))
    ]
    store = ImageStore.from_images(pictures)
    augmentation = Augmentation(
        32, crop="window", brightness=0.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    which = torch.arange(3).repeat(20)
    crops, flips = augmentation.draw(store.sizes[which], seeded(32))
    got = read_batch([store], torch.zeros_like(which), which, augmentation, crops, flips)
    for image, k, crop, flip in zip(got, which.tolist(), crops.int().tolist(), flips, strict=True):
        y0, x0, y1, x1 = crop
        height, width = pictures[k].shape[:2]
        assert y0 >= 0 and x0 >= 0 and y1 <= height and x1 <= width
        assert y1 - y0 == x1 - x0 == min(32, height, width)
        window = pictures[k][y0:y1, x0:x1]
        if k == 2:
            window = cv2.resize(window, (32, 32), interpolation=cv2.INTER_LINEAR)
        window = window[:, ::-1] if flip else window
        error = np.abs(image.permute(1, 2, 0).numpy() * 255 - window)
        # OpenCV interpolates with weights of 11 bits.
        assert error.max() < (1.01 if k == 2 else 1e-4)


def test_the_test_window_is_the_middle() -> None:
    shape = torch.tensor([[40, 50], [20, 31], [32, 32]])
    crops = Augmentation(32, crop="window").centre(shape)
    assert crops.tolist() == [[4, 9, 36, 41], [0, 6, 20, 26], [0, 0, 32, 32]]


def test_windows_of_a_resized_image_are_read_as_resized_then_cut() -> None:
    """Resized to 40 x 40 by Pillow, then a window of 32: the two steps, one after the other."""
    size, resize, drawn = 32, 40, load("scenes:classes=2,size=90,train_per_class=1").train.images
    noise = np.random.default_rng(11).integers(0, 256, (61, 40, 3), np.uint8)
    scenes = [drawn.image(k).numpy() for k in range(2)]
    # Shrunk, also unevenly, as it is along one side, and enlarged.
    pictures = [scenes[0], scenes[1][:50], noise, scenes[0][10:34, :20]]
    store = ImageStore.from_images(pictures)
    augmentation = Augmentation(
        size, "window", resize=resize, brightness=0.0, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    which = torch.arange(4).repeat(60)
    crops, flips = augmentation.draw(store.sizes[which], seeded(33))
    middles = augmentation.centre(store.sizes)
    got = read_batch([store], which * 0, which, augmentation, crops, flips)
    test = read_batch(
        [store], which[:4] * 0, which[:4], augmentation, middles, torch.zeros(4, dtype=torch.bool)
    )
    places = set()
    rows = zip([*got, *test], [*which.tolist(), *range(4)], [*crops, *middles], strict=True)
    for number, (image, k, crop) in enumerate(rows):
        height, width = pictures[k].shape[:2]
        top, left = float(crop[0]) * resize / height, float(crop[1]) * resize / width
        y, x = round(top), round(left)
        assert abs(top - y) < 1e-4 and abs(left - x) < 1e-4
        assert 0 <= y <= resize - size and 0 <= x <= resize - size
        whole = Image.fromarray(pictures[k]).resize((resize, resize), Image.Resampling.BILINEAR)
        wanted = np.asarray(whole)[y : y + size, x : x + size]
        if number < len(which):
            places.add((y, x))
            wanted = wanted[:, ::-1] if flips[number] else wanted
        else:
            assert (y, x) == (4, 4), "test images are the middle"
        error = np.abs(image.permute(1, 2, 0).numpy() * 255 - wanted)
        assert error[1:-1, 1:-1].max() < 1.01, "but for rounding"
        assert error.mean() < 0.5
    assert {y for y, _ in places} == {x for _, x in places} == set(range(resize - size + 1))


def test_a_window_may_be_all_of_a_resized_image() -> None:
    augmentation = Augmentation(300, "window", resize=300)
    shape = torch.tensor([[217, 331], [300, 300], [1, 5]])
    crops, _ = augmentation.draw(shape, seeded(34))
    assert torch.equal(crops, augmentation.whole(shape))
    assert torch.equal(augmentation.centre(shape), augmentation.whole(shape))


def test_shon_et_al_test_on_224_of_256() -> None:
    """Sec. 4.1: resized to 256 x 256, of which 224 x 224 in the middle."""
    crops = Augmentation(224, "window", resize=256).centre(torch.tensor([[256, 512]]))
    assert crops.tolist() == [[16, 32, 240, 480]]
