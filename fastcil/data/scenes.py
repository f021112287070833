"""The embedded data set: one drawn object per image, on a cluttered background, with its box."""

from __future__ import annotations

import colorsys
from math import ceil, cos, pi, sin
from typing import Any

import cv2
import numpy as np
import torch

from fastcil.data.scenes_shapes import SHAPES
from fastcil.data.scenes_sketch import HOLE, Draws, Part, Sketch, arc, polar
from fastcil.data.store import Dataset, Examples, ImageStore
from fastcil.errors import DataError

_FINE = 2  # object layers are drawn this much finer and averaged down
_SHIFT = 4  # fractional bits of the coordinates OpenCV draws at
_TRAIN, _TEST = 0, 1


def make_scenes(
    classes: int = 20,
    size: int = 64,
    train_per_class: int = 100,
    test_per_class: int = 25,
    seed: int = 1993,
) -> Dataset:
    """Draw the data set `scenes`.

    Every image holds one object of its class: a drawing with random proportions, whose bounding
    box takes 6 % to 40 % of the image, at a random place, turned by up to 25 degrees, mirrored,
    stretched, in random texture, before a background of gradients, noise, stripes or patches with
    blobs, polygons and lines over it that belong to no class. Textures, sizes and backgrounds
    have the same distribution in all classes; colours lean towards a hue of the class, too weakly
    to tell it (a colour histogram inside the true box names 29 % of 20 classes): the form does.
    Every image has random numbers of its own, from (seed, split, class, position), so fewer
    classes or images are exactly the first ones of more.

    Args:
        classes: number of classes, 2 to 30.
        size: side of the square images in pixels, at least 32.
        train_per_class: training images per class.
        test_per_class: test images per class.
        seed: non-negative integer.

    Returns:
        A Dataset with `train_boxes` and `test_boxes`: int16 [N, 4] (y0, x0, y1, x1), exclusive
        ends, tight around the pixels that the object covers by a quarter or more.

    Raises:
        DataError: If an argument is out of its range.

    Example:
        >>> data = make_scenes(classes=2, train_per_class=3, test_per_class=1)
        >>> data.class_names, len(data.train), len(data.test)
        (('wheel', 'star'), 6, 2)
        >>> data.train.images.image(0).shape, data.train_boxes.shape
        (torch.Size([64, 64, 3]), torch.Size([6, 4]))
    """
    _check_range("classes", classes, 2, len(SHAPES))
    _check_range("size", size, 32, 32767)
    _check_range("train_per_class", train_per_class, 1)
    _check_range("test_per_class", test_per_class, 1)
    _check_range("seed", seed, 0)
    train, train_boxes = _draw_split(_TRAIN, classes, size, train_per_class, seed)
    test, test_boxes = _draw_split(_TEST, classes, size, test_per_class, seed)
    names = tuple(shape.__name__ for shape in SHAPES[:classes])
    return Dataset("scenes", train, test, names, train_boxes, test_boxes)


def _check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise DataError(f"{name} of scenes is {value!r}; give an integer")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"{low} to {high}"
        raise DataError(f"{name} of scenes is {value}; give {limits}")


def _draw_split(
    split: int, classes: int, size: int, per_class: int, seed: int
) -> tuple[Examples, torch.Tensor]:
    images = np.empty((classes * per_class, size, size, 3), dtype=np.uint8)
    boxes = np.empty((classes * per_class, 4), dtype=np.int16)
    for i in range(classes * per_class):
        label, position = divmod(i, per_class)
        images[i], boxes[i] = draw_scene(Draws(seed, split, label, position), label, size)
    labels = torch.arange(classes).repeat_interleave(per_class)
    store = ImageStore.from_batch(torch.from_numpy(images))
    return Examples(store, labels), torch.from_numpy(boxes)


def draw_scene(d: Draws, label: int, size: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Draw one image of a class.

    Args:
        d: where its random numbers come from.
        label: number of its class.
        size: side in pixels.

    Returns:
        The image, uint8 [size, size, 3], and the tight box (y0, x0, y1, x1) of its object.

    Example:
        >>> image, box = draw_scene(Draws(0), label=0, size=32)
        >>> image.shape, len(box)
        ((32, 32, 3), 4)
    """
    image = _background(d, size)
    sketch = Sketch()
    SHAPES[label](sketch, d)
    parts, corner, extent = _place(sketch.parts, d, size)
    y0, x0 = (int(c) for c in corner)
    y1, x1 = (min(size, ceil(c + e)) for c, e in zip(corner, extent, strict=True))
    behind = image[y0:y1, x0:x1]  # [h, w, 3]
    palette = _palette(d, label, behind.reshape(-1, 3).mean(0))
    colour, cover = _raster(parts, palette, (y0, x0, y1, x1), outlined=d.chance(0.5))
    texture = _texture(d, y1 - y0, x1 - x0)
    colour += d.uniform(0.0, 35.0) * texture[..., None]
    behind += (colour - behind) * cover[..., None]
    noise = d.uniform(2.0, 14.0)
    image *= d.uniform(0.85, 1.1)
    image += d.uniform(-10.0, 10.0)
    image += noise * d.grain(size, size, 3)
    ys, xs = np.nonzero(cover >= 0.25)
    box = (y0 + ys.min(), x0 + xs.min(), y0 + ys.max() + 1, x0 + xs.max() + 1)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), box


def _place(
    parts: list[Part], d: Draws, size: int
) -> tuple[list[Part], tuple[float, float], tuple[float, float]]:
    """Turn, stretch, scale and move a sketch into the image; also its corner and extent (y, x)."""
    turn, stretch, shear = d.uniform(-0.44, 0.44), d.uniform(0.85, 1.18), d.uniform(-0.12, 0.12)
    mirror = -1.0 if d.chance(0.5) else 1.0
    rotate = np.array([[cos(turn), -sin(turn)], [sin(turn), cos(turn)]])
    linear = rotate @ np.array([[mirror * stretch, shear], [0.0, 1.0 / stretch]])
    points = [part.points @ linear.T for part in parts]
    pairs = zip(points, parts, strict=True)
    solid = [(p, part.width / 2) for p, part in pairs if part.tone != HOLE]
    low = np.concatenate([p - half for p, half in solid]).min(0)
    extent = np.concatenate([p + half for p, half in solid]).max(0) - low
    area = 0.07 + 0.29 * d.uniform() ** 0.6
    scale = min((area / extent.prod()) ** 0.5, 0.94 / extent.max()) * size
    extent = extent * scale
    corner = d.array(2) * (size - extent)
    placed = [
        Part((p - low) * scale + corner, part.tone, part.width * scale, part.closed)
        for p, part in zip(points, parts, strict=True)
    ]
    return placed, (corner[1], corner[0]), (extent[1], extent[0])


def _raster(
    parts: list[Part], palette: np.ndarray, box: tuple[int, int, int, int], outlined: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the parts inside a box: colours float32 [h, w, 3] and coverage float32 [h, w]."""
    y0, x0, y1, x1 = box
    shape = ((y1 - y0) * _FINE, (x1 - x0) * _FINE)
    colour = np.empty((*shape, 3), dtype=np.uint8)
    colour[:] = palette[0]
    cover = np.zeros(shape, dtype=np.uint8)
    for part in parts:
        fine = ((part.points - (x0, y0)) * _FINE - 0.5) * 2**_SHIFT
        points = np.rint(fine).astype(np.int32)[None]
        layers: list[tuple[np.ndarray, Any]] = [(cover, 0 if part.tone == HOLE else 255)]
        if part.tone != HOLE:
            layers.append((colour, palette[part.tone].tolist()))
        for layer, value in layers:
            if part.width:
                width = max(_FINE, round(part.width * _FINE))
                cv2.polylines(layer, points, part.closed, value, width, cv2.LINE_AA, _SHIFT)
            else:
                cv2.fillPoly(layer, points, value, cv2.LINE_AA, _SHIFT)
        if outlined and not part.width:
            dark = (palette[0] * 0.25).tolist()
            cv2.polylines(colour, points, True, dark, _FINE, cv2.LINE_AA, _SHIFT)
    flat = (x1 - x0, y1 - y0)
    shown, share = (cv2.resize(a, flat, interpolation=cv2.INTER_AREA) for a in (colour, cover))
    return shown.astype(np.float32), share.astype(np.float32) / 255


def _vivid(d: Draws, label: int) -> np.ndarray:
    """Draw an object's colour, float64 [3] in 0..255: its class leans to a hue, no more."""
    hue = label * 0.618 + 0.22 * (d.uniform() - d.uniform()) if d.chance(0.8) else d.uniform()
    return np.array(colorsys.hsv_to_rgb(hue % 1, d.uniform(0.5, 1.0), d.uniform(0.65, 1.0))) * 255


def _muted(d: Draws, brightest: float) -> np.ndarray:
    """Draw a colour for what is behind the object, float64 [3] in 0..255."""
    hue, saturation, value = d.uniform(), d.uniform(0.0, 0.55), d.uniform(0.1, brightest)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255


def _palette(d: Draws, label: int, behind: np.ndarray) -> np.ndarray:
    """Draw an object's tones, float64 [4, 3], which stand off from the colour behind it."""
    body = max((_vivid(d, label) for _ in range(2)), key=lambda c: np.abs(c - behind).sum())
    trim = max((_vivid(d, label + 7) for _ in range(2)), key=lambda c: np.abs(c - body).sum())
    return np.stack([body, trim, body * d.uniform(0.2, 0.4), 255 - (255 - body) * 0.3])


def _texture(d: Draws, high: int, wide: int) -> np.ndarray:
    """Draw a pattern in [-1, 1], float32 [high, wide]: gradient, stripes, checks or noise."""
    kind = d.integer(0, 3)
    if kind == 3:
        grain = d.array(max(2, high // 4), max(2, wide // 4)).astype(np.float32)
        return cv2.resize(grain, (wide, high), interpolation=cv2.INTER_CUBIC) * 2 - 1
    angle, waves = d.uniform(0, pi), d.uniform(2.0, 6.0) * 2 * pi
    y, x = np.ogrid[0 : 1 : high * 1j, 0 : 1 : wide * 1j]
    along, across = cos(angle) * x + sin(angle) * y, cos(angle) * y - sin(angle) * x
    if kind == 0:
        pattern = along - 0.5 * (cos(angle) + sin(angle))
    elif kind == 1:
        pattern = np.sin(waves * along)
    else:
        pattern = np.sin(waves * along) * np.sin(waves * across)
    return pattern.astype(np.float32)


def _background(d: Draws, size: int) -> np.ndarray:
    """Draw a cluttered background, float32 [size, size, 3]."""
    first, second = _muted(d, 0.65), _muted(d, 0.65)
    kind = d.integer(0, 3)
    if kind == 0:
        mix = _clouds(d, size)
    elif kind == 1:
        grid = d.array(d.integer(2, 6), d.integer(2, 6)).astype(np.float32)
        mix = cv2.resize(grid, (size, size), interpolation=cv2.INTER_NEAREST)
    else:
        mix = 0.5 + 0.5 * _texture(d, size, size)
    mix = 0.75 * mix + 0.25 * _clouds(d, size)
    base = first + (second - first) * mix[..., None]
    image = np.clip(base, 0, 255).astype(np.uint8)  # OpenCV antialiases on uint8 only
    for _ in range(d.integer(4, 10)):
        _distract(image, d, size)
    if d.chance(0.4):
        image = cv2.GaussianBlur(image, (0, 0), d.uniform(0.4, 1.2) * size / 64)
    return image.astype(np.float32)


def _clouds(d: Draws, size: int) -> np.ndarray:
    """Sum random grids, each finer and fainter than the one before: float32 [size, size]."""
    total = np.zeros((size, size), dtype=np.float32)
    for cells, weight in ((3, 0.5), (7, 0.3), (15, 0.2)):
        grid = d.array(cells, cells).astype(np.float32)
        total += weight * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
    return total


def _distract(image: np.ndarray, d: Draws, size: int) -> None:
    """Draw one polygon, blob, line or bent line that belongs to no class."""
    kind, colour = d.integer(0, 3), _muted(d, 0.8).tolist()
    reach = size * d.uniform(0.05, 0.22)
    width = max(1, round(size * d.uniform(0.01, 0.06)))
    if kind == 0:
        radii = [reach * d.uniform(0.4, 1.0) for _ in range(d.integer(3, 6))]
        corners = np.array(polar(radii, d.uniform(0, 2 * pi)))
    elif kind == 1:
        angle, flat = d.uniform(0, pi), d.uniform(0.4, 1.0)
        blob = arc(0, 0, reach, reach * flat, n=20)
        corners = blob @ np.array([[cos(angle), sin(angle)], [-sin(angle), cos(angle)]])
    else:
        steps, stride = (2, 8.0 * reach) if kind == 2 else (5, 3.0 * reach)
        corners = np.cumsum((d.array(steps, 2) - 0.5) * stride, axis=0)
    centre = np.array([d.uniform(0, size), d.uniform(0, size)])
    points = np.rint((corners + centre) * 2**_SHIFT).astype(np.int32)[None]
    if kind < 2 and d.chance(0.75):
        cv2.fillPoly(image, points, colour, cv2.LINE_AA, _SHIFT)
    else:
        cv2.polylines(image, points, kind < 2, colour, width, cv2.LINE_AA, _SHIFT)
