"""Every operation against Pillow's, over odd sizes, image kinds and a table of magnitudes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from fastcil.ops import pixel_ops

SIZES = [(1, 1), (1, 7), (2, 3), (5, 2), (7, 5), (17, 31), (23, 23), (33, 32)]
FILL = (128, 3, 250)


@dataclass(frozen=True)
class Case:
    """An operation, what Pillow does for one image, and its magnitudes."""

    ours: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    pillow: Callable[[Image.Image, float], Image.Image]
    magnitudes: tuple[float, ...]


def fill(count: int) -> torch.Tensor:
    return torch.tensor(FILL, dtype=torch.uint8).expand(count, 3)


def affine(
    coefficients: Callable[[float], tuple[float, ...]],
    magnitudes: tuple[float, ...],
    whole: bool = False,
) -> Case:
    """The affine transform with the six coefficients made from the magnitude, for us rounded."""

    def ours(images: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
        given = (magnitudes + 0.5).floor() if whole else magnitudes
        rows = torch.tensor([coefficients(m) for m in given.tolist()], dtype=torch.float64)
        return pixel_ops.affine(images, rows.view(-1, 6), fill(len(images)))

    def pillow(image: Image.Image, m: float) -> Image.Image:
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            coefficients(m),
            Image.Resampling.NEAREST,
            fillcolor=FILL,
        )

    return Case(ours, pillow, magnitudes)


def turned(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    rows = pixel_ops.rotation(degrees, *images.shape[2:])
    return pixel_ops.affine(images, rows, fill(len(images)))


LEVELS = tuple(float(level) for level in range(10))
SHEARS = (*tuple(sign * level * 0.3 / 9 for level in LEVELS for sign in (-1, 1)), 1.0, -2.5)
SHIFTS = (*tuple(sign * level * 1.61 for level in LEVELS for sign in (-1, 1)), 0.5, -0.5, 40.0)
ANGLES = (
    *tuple(sign * level * 30 / 9 for level in LEVELS for sign in (-1, 1)),
    45.0,
    90.0,
    135.5,
    180.0,
    270.0,
    -450.0,
)
FACTORS = (*tuple(1 + sign * level * 0.9 / 9 for level in LEVELS for sign in (-1, 1)), 0.0, 5.5)

CASES = {
    "shear_x": affine(lambda m: (1, m, 0, 0, 1, 0), SHEARS),
    "shear_y": affine(lambda m: (1, 0, 0, m, 1, 0), SHEARS),
    "skew": affine(lambda m: (1 + m / 2, m, 3 * m, -m, 1 - m / 3, -m), SHEARS),
    # Shifts alone Pillow does not walk through in fixed point.
    "translate_x": affine(lambda m: (1, 0, m, 0, 1, 0), SHIFTS, whole=True),
    "translate_y": affine(lambda m: (1, 0, 0, 0, 1, m), SHIFTS, whole=True),
    "rotate": Case(
        turned,
        lambda image, m: image.rotate(m, Image.Resampling.NEAREST, fillcolor=FILL),
        ANGLES,
    ),
    "autocontrast": Case(
        lambda images, _: pixel_ops.autocontrast(images),
        lambda image, _: ImageOps.autocontrast(image),
        (0.0,),
    ),
    "equalize": Case(
        lambda images, _: pixel_ops.equalize(images),
        lambda image, _: ImageOps.equalize(image),
        (0.0,),
    ),
    "invert": Case(
        lambda images, _: pixel_ops.invert(images), lambda image, _: ImageOps.invert(image), (0.0,)
    ),
    "solarize": Case(
        pixel_ops.solarize,
        lambda image, m: ImageOps.solarize(image, m),
        (*tuple(256 - level * 256 / 9 for level in LEVELS), 100.0, 255.0, 255.5, 0.25),
    ),
    "posterize": Case(
        pixel_ops.posterize,
        lambda image, m: ImageOps.posterize(image, int(m)),
        tuple(float(bits) for bits in range(1, 9)),
    ),
    "brightness": Case(
        pixel_ops.brightness, lambda image, m: ImageEnhance.Brightness(image).enhance(m), FACTORS
    ),
    "contrast": Case(
        pixel_ops.contrast, lambda image, m: ImageEnhance.Contrast(image).enhance(m), FACTORS
    ),
    "colour": Case(
        pixel_ops.colour, lambda image, m: ImageEnhance.Color(image).enhance(m), FACTORS
    ),
    "sharpness": Case(
        pixel_ops.sharpness, lambda image, m: ImageEnhance.Sharpness(image).enhance(m), FACTORS
    ),
}


def pictures(height: int, width: int) -> np.ndarray:
    """Random and structured images of one size, uint8 [N, H, W, 3]."""
    rng = np.random.default_rng(height * 100 + width)
    shape = (height, width, 3)
    two_valued = np.where(rng.random(shape) < 0.5, 40, 201)
    mostly_black = np.zeros(shape)
    mostly_black.reshape(-1, 3)[-20:] = 255
    near_flat = 77 + rng.integers(0, 2, shape)
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([x * 255 // max(width - 1, 1), y * 7 % 256, (x + y) * 3 % 256], axis=-1)
    flat_red = np.broadcast_to([255, 0, 9], shape)
    narrow = np.clip(rng.normal(120, 12, shape), 0, 255)
    extremes = rng.choice([0, 1, 254, 255], shape)
    kinds = [
        rng.integers(0, 256, shape),
        two_valued,
        mostly_black,
        near_flat,
        ramp,
        flat_red,
        narrow,
        extremes,
        np.zeros(shape),
        np.full(shape, 255),
    ]
    return np.stack(kinds).astype(np.uint8)


def batch(pixels: np.ndarray) -> torch.Tensor:
    """[N, H, W, 3] as [N, 3, H, W] in channels_last memory."""
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_pillow(name: str, size: tuple[int, int]) -> None:
    case = CASES[name]
    kinds = pictures(*size)
    images = np.repeat(kinds, len(case.magnitudes), axis=0)
    magnitudes = np.tile(case.magnitudes, len(kinds))
    expected = np.stack(
        [
            np.asarray(case.pillow(Image.fromarray(image), float(m)))
            for image, m in zip(images, magnitudes, strict=True)
        ]
    )
    given = batch(images)
    got = case.ours(given, torch.from_numpy(magnitudes))
    assert got.dtype == torch.uint8
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), expected)
    assert torch.equal(given, batch(images)), "the input was written to"


@pytest.mark.parametrize("name", CASES)
def test_memory_format_does_not_matter(name: str) -> None:
    case = CASES[name]
    images = batch(pictures(7, 5))
    magnitudes = torch.tensor(case.magnitudes).repeat(10)[:10]
    expected = case.ours(images, magnitudes)
    for other in (
        images.contiguous(),
        torch.cat([images, images], dim=3)[..., :5],
        images.flip(0).flip(0),
    ):
        got = case.ours(other, magnitudes)
        assert torch.equal(got, expected)
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", CASES)
def test_an_empty_batch_stays_empty(name: str) -> None:
    empty = torch.empty((0, 3, 4, 5), dtype=torch.uint8)
    assert CASES[name].ours(empty, torch.empty(0)).shape == (0, 3, 4, 5)


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_the_device(name: str) -> None:
    # Meta tensors hold no values, so reading one back is an error.
    images = torch.empty((2, 3, 4, 5), dtype=torch.uint8, device="meta")
    got = CASES[name].ours(images, torch.ones(2))
    assert got.shape == images.shape and got.dtype == torch.uint8 and got.is_meta


def test_equalize_cuts_off_what_would_pass_255() -> None:
    # 509 dark pixels: step 1, so the bright ones would get 509.
    image = np.zeros((23, 23, 3), np.uint8)
    image.reshape(-1, 3)[-20:] = 200
    assert pixel_ops.equalize(batch(image[None])).amax() == 255


@pytest.mark.parametrize("side", [0, 1, 3, 8, 50])
def test_cutout_against_a_loop(side: int) -> None:
    images = batch(pictures(9, 7))
    rng = np.random.default_rng(side)
    ys, xs = rng.integers(0, 9, 10), rng.integers(0, 7, 10)
    expected = images.clone()
    for i, (y, x) in enumerate(zip(ys, xs, strict=True)):
        top, left = y - side // 2, x - side // 2
        expected[i, :, max(top, 0) : top + side, max(left, 0) : left + side] = torch.tensor(
            FILL, dtype=torch.uint8
        )[:, None, None]
    sides = torch.full((10,), side)
    got = pixel_ops.cutout(images, torch.from_numpy(ys), torch.from_numpy(xs), sides, fill(10))
    assert torch.equal(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_cutout_of_an_even_side_has_its_full_area_inside() -> None:
    images = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    middle = torch.tensor([16])
    black = pixel_ops.cutout(images, middle, middle, middle, torch.zeros(1, 3).byte()) == 0
    assert black[0, 0].sum() == 16 * 16


def test_each_image_has_its_own_fill_colour() -> None:
    images, colours = batch(pictures(5, 4)[:2]), torch.tensor([[1, 2, 3], [4, 5, 6]]).byte()
    away = torch.tensor([[1.0, 0, 100, 0, 1, 0]]).repeat(2, 1)
    got = pixel_ops.affine(images, away, colours)
    assert torch.equal(got, colours[:, :, None, None].expand_as(got))
    whole = torch.full((2,), 50)
    assert torch.equal(pixel_ops.cutout(images, whole * 0, whole * 0, whole, colours), got)


@pytest.mark.parametrize(
    ("images", "factor", "word"),
    [
        (torch.zeros(2, 3, 4, 4), torch.ones(2), "images"),
        (np.zeros((2, 3, 4, 4), np.uint8), torch.ones(2), "images"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.ones(2), "images"),
        (torch.zeros(2, 3, 0, 4, dtype=torch.uint8), torch.ones(2), "images"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.ones(3), "factor"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 1.5, "factor"),
    ],
)
def test_a_wrong_argument_is_named(images: object, factor: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        pixel_ops.brightness(images, factor)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fill", [(0, 0, 0), torch.zeros(3).byte(), torch.zeros(1, 3), torch.zeros(2, 3).byte()]
)
def test_a_wrong_fill_colour_is_named(fill: object) -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="fill"):
        pixel_ops.affine(images, torch.zeros(1, 6), fill)  # type: ignore[arg-type]


@pytest.mark.parametrize("coefficients", [(1, 0, 0, 0, 1, 0), torch.zeros(6), torch.zeros(2, 6)])
def test_wrong_coefficients_are_named(coefficients: object) -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="coefficients"):
        pixel_ops.affine(images, coefficients, fill(1))  # type: ignore[arg-type]
