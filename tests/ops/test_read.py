from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastcil.ops import grids, pack, read, reconstruct
from fastcil.ops.read import reference

SIZES = [(25, 31), (60, 44), (1, 1), (32, 32), (90, 7), (3, 120)]


def read_by_reference(
    arenas: list[Tensor],
    arena: Tensor,
    offsets: Tensor,
    geometry: Tensor,
    size: tuple[int, int],
    crops: Tensor | None = None,
    flips: Tensor | None = None,
    views: Tensor | None = None,
    antialias: bool = True,
) -> Tensor:
    return reference(arenas, arena, offsets, geometry, *size, crops, flips, views, antialias)


@pytest.fixture(params=[read, read_by_reference], ids=["op", "reference"])
def kernel(request: Any) -> Any:
    return request.param


def rows(images: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The first arguments of read, for all images of one buffer."""
    pixels, offsets, geometry = (
        images if isinstance(images, tuple) and len(images) == 3 else (images.store)
    )
    return [pixels], torch.zeros_like(offsets), offsets, geometry


def random_crops(images: Any, seed: int, reach: float) -> Tensor:
    """Crops at fractions of pixels, up to ``reach`` of a side beyond the image."""
    rng = np.random.default_rng(seed)
    crops = []
    for array in images.arrays:
        sides = np.array(array.shape[:2])
        low = rng.uniform(-reach, 0.7, 2) * sides
        crops.append([*low, *(low + rng.uniform(0.05, 0.3 + reach, 2) * sides + 0.1)])
    return torch.tensor(np.array(crops), dtype=torch.float32)


def exact(image: np.ndarray, size: tuple[int, int], crop: Any, antialias: bool) -> np.ndarray:
    """The docstring's equation in float64, one axis after the other; not rounded."""
    out = image.astype(np.float64)
    for axis in range(2):
        begin, end, count = float(crop[axis]), float(crop[axis + 2]), size[axis]
        scale = (end - begin) / count
        width = max(scale, 1.0) if antialias else 1.0
        covered = range(math.floor(begin), math.ceil(end))
        matrix = np.zeros((count, image.shape[axis]))
        for i in range(count):
            centre = begin + (i + 0.5) * scale
            weights = {x: max(0.0, 1 - abs(x + 0.5 - centre) / width) for x in covered}
            for x, weight in weights.items():
                if 0 <= x < image.shape[axis]:
                    matrix[i, x] = weight / sum(weights.values())
        out = np.moveaxis(np.tensordot(matrix, out, (1, axis)), 0, axis)
    return out


def by_pillow(image: np.ndarray, size: tuple[int, int], crop: Any) -> np.ndarray:
    """Cut out the pixels that the crop covers, zeros beyond the image, and resize the crop."""
    y0, x0, y1, x1 = (float(c) for c in crop)
    cut = (math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1))
    box = (x0 - cut[0], y0 - cut[1], x1 - cut[0], y1 - cut[1])
    part = Image.fromarray(image).crop(cut)
    return np.asarray(part.resize(size[::-1], Image.Resampling.BILINEAR, box=box))


def as_array(out: Tensor) -> np.ndarray:
    return out.permute(1, 2, 0).numpy().astype(np.float64)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (24, 33), (1, 5), (70, 64)])
@pytest.mark.parametrize("reach", [0.0, 0.6])
def test_is_the_equation(make_images, kernel, size, reach, antialias):
    images = make_images(SIZES)
    crops = random_crops(images, 1, reach)
    out = kernel(*rows(images), size, crops=crops, antialias=antialias)
    assert out.shape == (len(SIZES), 3, *size) and out.dtype == torch.uint8
    for image, crop, got in zip(images.arrays, crops.tolist(), out, strict=True):
        assert abs(as_array(got) - exact(image, size, crop, antialias)).max() < 0.55


@pytest.mark.parametrize("size", [(8, 8), (24, 33), (70, 64)])
@pytest.mark.parametrize("reach", [0.0, 0.5])
def test_is_pillows_resize(make_images, kernel, size, reach):
    images = make_images(SIZES)
    crops = random_crops(images, 2, reach)
    out = kernel(*rows(images), size, crops=crops)
    for image, crop, got in zip(images.arrays, crops.tolist(), out, strict=True):
        assert abs(as_array(got) - by_pillow(image, size, crop)).max() <= 1


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (24, 33), (70, 64)])
def test_is_torchs_interpolate(make_images, kernel, size, antialias):
    images = make_images(SIZES)
    out = kernel(*rows(images), size, antialias=antialias)
    for image, got in zip(images.arrays, out, strict=True):
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(image).permute(2, 0, 1)[None].double(),
            size,
            mode="bilinear",
            antialias=antialias,
        )
        assert (got - expected[0]).abs().max() < 0.55


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("corner", [(0, 0), (3, 9), (-4, -2), (20, 25), (-40, 0), (400, 400)])
def test_whole_pixels_at_the_same_size_are_copied(make_images, kernel, corner, antialias):
    images = make_images(SIZES)
    height, width = size = 16, 19
    crop = torch.tensor([*corner, corner[0] + height, corner[1] + width]).float()
    out = kernel(*rows(images), size, crops=crop.repeat(len(SIZES), 1), antialias=antialias)
    for image, got in zip(images.arrays, out, strict=True):
        expected = np.zeros((height, width, 3))
        for y in range(height):
            for x in range(width):
                at = y + corner[0], x + corner[1]
                if 0 <= at[0] < image.shape[0] and 0 <= at[1] < image.shape[1]:
                    expected[y, x] = image[at]
        assert np.array_equal(as_array(got), expected)


@pytest.mark.parametrize("level", [1, 128, 255])
@pytest.mark.parametrize("side", [1, 7, 97, 801])
def test_one_colour_stays_one_colour(make_images, kernel, side, level):
    images = make_images([(side, side + 1)])
    plain = images._replace(pixels=torch.full_like(images.pixels, level))
    for size in ((1, 1), (9, 8), (50, 51)):
        assert (kernel(*rows(plain), size) == level).all()


def test_mirrors_the_images_named(make_images, kernel):
    images = make_images(SIZES)
    crops = random_crops(images, 3, 0.4)
    flips = torch.tensor([True, False, True, False, True, True])
    plain = kernel(*rows(images), (9, 13), crops=crops)
    flipped = kernel(*rows(images), (9, 13), crops=crops, flips=flips)
    assert torch.equal(flipped[flips], plain[flips].flip(3))
    assert torch.equal(flipped[~flips], plain[~flips])


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("ratio", [1, 2, 4, 9, 300])
@pytest.mark.parametrize("size", [(12, 12), (33, 61)])
def test_packed_images_and_views_read_like_unpacked_ones(
    make_images, kernel, size, ratio, antialias
):
    images = make_images(SIZES * 3, seed=int(ratio))
    boxes = images.boxes(4)
    packed = pack(*images.store, boxes, ratio)
    unpacked = (*reconstruct(*packed), images.geometry)
    views = torch.cat([boxes, grids(images.geometry[:, :2], ratio).short()], 1)
    for crops in (None, random_crops(images, 5, 0.5)):
        options = {"crops": crops, "antialias": antialias}
        expected = kernel(*rows(unpacked), size, **options)
        assert torch.equal(kernel(*rows(packed), size, **options), expected)
        assert torch.equal(kernel(*rows(images), size, views=views, **options), expected)
    views[::2, 4:] = 0
    some = kernel(*rows(images), size, views=views)
    plain = kernel(*rows(images), size)
    assert torch.equal(some[::2], plain[::2])


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_kernels_agree_bit_for_bit(make_images, seed, antialias):
    rng = np.random.default_rng(seed)
    images = make_images([tuple(rng.integers(1, 110, 2).tolist()) for _ in range(12)], seed)
    packed = pack(*images.store, images.boxes(seed), float(rng.choice([1, 2, 4, 9])))
    size = tuple(rng.integers(1, 50, 2).tolist())
    crops = random_crops(images, seed, 0.5)
    flips = torch.from_numpy(rng.integers(0, 2, 12).astype(bool))
    for source in (images, packed):
        arguments = (*rows(source), size, crops, flips)
        expected = read_by_reference(*arguments, antialias=antialias)
        got = read(*arguments, antialias=antialias)
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()


def test_reads_a_mixture_from_several_buffers(make_images, kernel):
    first, second = make_images(SIZES, 1), make_images([(40, 30), (8, 9)], 2)
    packed = pack(*second.store, second.boxes(1))
    arena = torch.tensor([1, 0, 0, 1, 0])
    index = torch.tensor([1, 5, 0, 0, 0])
    offsets = torch.where(arena == 0, first.offsets[index], packed[1][index.clamp(max=1)])
    geometry = torch.where(
        arena[:, None] == 0, first.geometry[index], packed[2][index.clamp(max=1)]
    )
    out = kernel([first.pixels, packed[0]], arena, offsets, geometry, (10, 11))
    one, two = kernel(*rows(first), (10, 11)), kernel(*rows(packed), (10, 11))
    expected = [(one, two)[k][i] for k, i in zip(arena.tolist(), index.tolist(), strict=True)]
    assert torch.equal(out, torch.stack(expected))


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 7), (6, 6)])
def test_is_channels_last(make_images, kernel, size):
    out = kernel(*rows(make_images(SIZES)), size)
    wanted = torch.empty(out.shape, memory_format=torch.channels_last)
    assert out.stride() == wanted.stride()


def test_empty_batch(make_images, kernel):
    images = make_images([])
    out = kernel(*rows(images), (6, 5), crops=torch.empty(0, 4), flips=torch.empty(0).bool())
    assert out.shape == (0, 3, 6, 5) and out.dtype == torch.uint8


def test_accepts_strided_arguments(make_images, kernel):
    images = make_images(SIZES)
    boxes = images.boxes(0)
    tensors = {
        "arena": torch.zeros_like(images.offsets),
        "offsets": images.offsets,
        "geometry": images.geometry,
        "crops": random_crops(images, 0, 0.3),
        "flips": torch.tensor([True, False, True, False, True, True]),
        "views": torch.cat([boxes, grids(images.geometry[:, :2], 4.0).short()], 1),
    }
    strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in tensors.items()}
    pixels = torch.stack([images.pixels, images.pixels], -1)[:, 0]
    expected = kernel(arenas=[images.pixels], size=(7, 9), **tensors)
    assert torch.equal(kernel(arenas=[pixels], size=(7, 9), **strided), expected)


def test_writes_every_byte(make_images, kernel, poison):
    images = make_images(SIZES, high=250)
    for size in ((1, 1), (5, 9), (16, 64)):
        with poison():
            out = kernel(*rows(images), size, crops=random_crops(images, 0, 0.5))
        assert not (out == 255).any()


def test_threads_change_nothing(make_images, kernel, threads):
    images = make_images(SIZES * 3)
    packed = pack(*images.store, images.boxes(0))
    with threads(1):
        expected = kernel(*rows(packed), (20, 20))
    with threads(2):
        assert torch.equal(kernel(*rows(packed), (20, 20)), expected)


def test_small_chunks_change_nothing(make_images, monkeypatch):
    images = make_images(SIZES)
    expected = read_by_reference(*rows(images), (9, 9))
    monkeypatch.setitem(reference.__globals__, "CHUNK", 100)
    assert torch.equal(read_by_reference(*rows(images), (9, 9)), expected)


def test_opcheck(make_images):
    images = make_images(SIZES)
    views = torch.cat([images.boxes(0), grids(images.geometry[:, :2], 4.0).short()], 1)
    for crops, seen in ((None, None), (random_crops(images, 0, 0.3), views)):
        flips = None if crops is None else torch.arange(6) > 2
        arguments = (*rows(images), 9, 13, crops, flips, seen, True)
        torch.library.opcheck(torch.ops.fastcil.read.default, arguments)


def test_compiles_in_one_graph(make_images):
    images = make_images(SIZES)
    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    arguments = (*rows(images), (9, 13), random_crops(images, 0, 0.3))
    assert torch.equal(compiled(*arguments), read(*arguments))


RAW = [4, 4, 0, 0, 4, 4, 0, 0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arena": [0, 1]}, r"arena.* 1 arenas"),
        ({"arena": [0, -1]}, r"arena.* 1 arenas"),
        ({"offsets": [0, 1]}, r"offsets\[1\] is 1"),
        ({"offsets": [-3, 0]}, r"offsets\[0\] is -3"),
        ({"geometry": [RAW, [4, 4, 0, 0, 4, 4, 0, 5]]}, r"geometry\[1\]"),
        ({"geometry": [RAW, [4, 0, 0, 0, 4, 0, 0, 0]]}, r"geometry\[1\]"),
        ({"crops": [[0, 0, 1, 1], [1, 0, 1, 1]]}, "crops"),
        ({"crops": [[0, 0, 1, 1], [0, 2, 1, 1]]}, "crops"),
        ({"crops": [[0, 0, 1, 1], [0, 0, 1, math.nan]]}, "crops"),
        ({"crops": [[0, 0, 1, 1], [0, 0, 1, math.inf]]}, "crops"),
        ({"crops": [[0, 0, 1, 1], [0, 0, 1e6, 1]]}, "crops"),
        ({"views": [[0] * 6, [0, 0, 2, 2, 5, 2]]}, r"views\[1\]"),
        ({"views": [[0] * 6, [0, 0, 2, 6, 2, 2]]}, r"views\[1\]"),
        (
            {"geometry": [RAW, [4, 4, 0, 0, 2, 2, 2, 2]], "views": [[0] * 6, [0, 0, 2, 2, 2, 2]]},
            r"views\[1\]",
        ),
    ],
)
def test_says_which_row_is_wrong(kernel, changes, says):
    dtypes = {"crops": torch.float32, "geometry": torch.int16, "views": torch.int16}
    arguments = {"arena": [0, 0], "offsets": [0, 0], "geometry": [RAW, RAW]} | changes
    tensors = {
        name: torch.tensor(value, dtype=dtypes.get(name, torch.int64))
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=says):
        kernel(arenas=[torch.zeros(48, dtype=torch.uint8)], size=(2, 2), **tensors)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"arenas": torch.zeros(48).byte()}, TypeError, "arenas must be a sequence"),
        ({"arenas": []}, TypeError, "arenas must be a sequence"),
        ({"arenas": [torch.zeros(48)]}, TypeError, r"arenas\[0\] has dtype torch.float32"),
        ({"arenas": [torch.zeros(4, 12).byte()]}, ValueError, r"arenas\[0\] has shape"),
        ({"offsets": torch.zeros(1).int()}, TypeError, "offsets has dtype"),
        ({"arena": torch.zeros(2).long()}, ValueError, "arena has shape"),
        ({"geometry": torch.zeros(1, 7).short()}, ValueError, "geometry has shape"),
        ({"geometry": [RAW]}, TypeError, "geometry is of type list"),
        ({"size": (0, 4)}, ValueError, "size is"),
        ({"size": (4, 40_000)}, ValueError, "size is"),
        ({"crops": torch.zeros(1, 4).double()}, TypeError, "crops has dtype"),
        ({"crops": torch.zeros(4)}, ValueError, "crops has shape"),
        ({"flips": torch.zeros(1)}, TypeError, "flips has dtype"),
        ({"views": torch.zeros(1, 4).short()}, ValueError, "views has shape"),
    ],
)
def test_says_which_argument_is_wrong(changes, error, says):
    zero = torch.zeros(1, dtype=torch.int64)
    arguments = {
        "arenas": [torch.zeros(48, dtype=torch.uint8)],
        "arena": zero,
        "offsets": zero,
        "geometry": torch.tensor([RAW]).short(),
        "size": (2, 2),
    }
    with pytest.raises(error, match=says):
        read(**(arguments | changes))
