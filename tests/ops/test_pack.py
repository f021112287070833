from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from fastcil.errors import FastcilError
from fastcil.ops import grids, pack, packed_nbytes, reconstruct

CASES = {  # H, W, box
    "one pixel, kept": (1, 1, (0, 0, 1, 1)),
    "one pixel, no box": (1, 1, (0, 0, 0, 0)),
    "odd, inside": (25, 31, (3, 4, 19, 22)),
    "even, inside": (24, 32, (4, 6, 18, 26)),
    "odd box in even": (24, 32, (5, 7, 17, 25)),
    "whole": (17, 23, (0, 0, 17, 23)),
    "empty": (17, 23, (5, 5, 5, 9)),
    "upside down": (17, 23, (9, 5, 4, 9)),
    "top": (20, 21, (0, 6, 9, 15)),
    "bottom": (20, 21, (11, 6, 20, 15)),
    "left": (20, 21, (6, 0, 15, 9)),
    "right": (20, 21, (6, 12, 15, 21)),
    "corner": (20, 21, (0, 0, 13, 8)),
    "full height": (19, 22, (0, 5, 19, 16)),
    "full width": (19, 22, (5, 0, 16, 22)),
    "one pixel box": (15, 15, (7, 8, 8, 9)),
    "flat": (2, 60, (0, 7, 1, 40)),
    "tall": (61, 1, (8, 0, 50, 1)),
}
RATIOS = [1, 2, 4, 9, 10_000]


def naive_pack(image: np.ndarray, box: tuple[int, ...], ratio: float) -> np.ndarray:
    """The layout, pixel by pixel."""
    height, width = image.shape[:2]
    y0, x0, y1, x1 = box
    rows = max(1, math.floor(height / math.sqrt(ratio)))
    columns = max(1, math.floor(width / math.sqrt(ratio)))
    kept = [image[y, x] for y in range(y0, y1) for x in range(x0, x1)]
    seen = {
        (y * rows // height, x * columns // width)
        for y in range(height)
        for x in range(width)
        if not (y0 <= y < y1 and x0 <= x < x1)
    }
    for r in range(rows):
        for c in range(columns):
            if (r, c) in seen:
                kept.append(image[r * height // rows, c * width // columns])
    return np.array(kept, dtype=np.uint8).ravel()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bytes_are_those_of_a_loop_over_pixels(make_images, case, ratio):
    height, width, box = case
    images = make_images([(height, width)])
    pixels, offsets, geometry = pack(*images.store, torch.tensor([box]).short(), ratio)
    expected = naive_pack(images.arrays[0], box, ratio)
    assert np.array_equal(pixels.numpy(), expected)
    assert packed_nbytes(geometry).tolist() == [len(expected)]
    assert offsets.tolist() == [0]


@pytest.mark.parametrize("chunk", [1, 700, 1 << 20])
def test_images_lie_one_after_the_other(make_images, monkeypatch, chunk):
    monkeypatch.setitem(pack.__globals__, "CHUNK", chunk)
    images = make_images([(9, 40), (33, 21), (1, 1), (16, 16), (30, 7)])
    boxes = images.boxes(1)
    pixels, offsets, geometry = pack(*images.store, boxes)
    alone = [
        pack(images.pixels, images.offsets[i : i + 1], images.geometry[i : i + 1], boxes[i : i + 1])
        for i in range(5)
    ]
    assert torch.equal(pixels, torch.cat([part[0] for part in alone]))
    assert torch.equal(geometry, torch.cat([part[2] for part in alone]))
    ends = packed_nbytes(geometry).cumsum(0)
    assert offsets.tolist() == [0, *ends[:-1].tolist()]
    assert len(pixels) == ends[-1]


def opencv(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST)


def pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST))


# At other ratios OpenCV's rounding of its step falls one short of some whole numbers.
@pytest.mark.parametrize(
    ("resize", "ratio"),
    [*((opencv, ratio) for ratio in (1, 4)), *((pillow, ratio) for ratio in (1, 2, 4, 9, 300))],
)
@pytest.mark.parametrize("seed", range(6))
def test_shows_what_others_compose(make_images, seed, resize, ratio):
    rng = np.random.default_rng(seed)
    images = make_images([tuple(rng.integers(1, 160, 2).tolist()) for _ in range(8)], seed)
    boxes = images.boxes(seed)
    packed, offsets, geometry = pack(*images.store, boxes, ratio, nearest=resize.__name__)
    nbytes = packed_nbytes(geometry, nearest=resize.__name__)
    assert len(packed) == nbytes.sum() and torch.equal(offsets, nbytes.cumsum(0) - nbytes)
    shown, starts = reconstruct(packed, offsets, geometry, nearest=resize.__name__)
    for k, (image, start, (y0, x0, y1, x1)) in enumerate(
        zip(images.arrays, starts, boxes.tolist(), strict=True)
    ):
        height, width = image.shape[:2]
        grid = geometry[k, 6:].tolist()
        expected = resize(resize(image, *grid), height, width).copy()
        if y1 > y0 and x1 > x0:
            expected[y0:y1, x0:x1] = image[y0:y1, x0:x1]
        assert np.array_equal(shown[start : start + image.size].numpy(), expected.ravel())
        # Each cell that shows anywhere is kept, and no other one.
        numbers = np.arange(grid[0] * grid[1], dtype=np.int32).reshape(grid)
        seen = resize(numbers, height, width).copy()
        seen[y0:y1, x0:x1] = -1 if y1 > y0 and x1 > x0 else seen[y0:y1, x0:x1]
        cells = len(np.unique(seen[seen >= 0]))
        box = max(y1 - y0, 0) * max(x1 - x0, 0)
        assert nbytes[k] == 3 * (box + cells)


@pytest.mark.parametrize("seed", range(4))
def test_bytes_are_those_of_equation_4_to_one_percent(seed):
    rng = np.random.default_rng(seed)
    for _ in range(200):
        sides = rng.integers(200, 700, 2)
        low = (sides * rng.uniform(0, 0.6, 2)).astype(int)
        high = low + (np.minimum(sides - low, sides * rng.uniform(0.1, 0.9, 2))).astype(int)
        grid = grids(torch.tensor(sides)[None], 4.0)[0].tolist()
        geometry = torch.tensor([[*sides, *low, *high, *grid]], dtype=torch.int16)
        box = (high - low).prod() / sides.prod()
        expected = 3 * sides.prod() * (1 - (1 - 1 / 4.0) * (1 - box))
        assert packed_nbytes(geometry).item() == pytest.approx(expected, rel=0.01)


def test_raw_images_count_whole(make_images):
    images = make_images([(5, 7), (1, 1)])
    assert packed_nbytes(images.geometry).tolist() == [105, 3]


def test_no_images(make_images):
    pixels, offsets, geometry = pack(*make_images([]).store, torch.empty(0, 4).short())
    assert pixels.shape == (0,) and offsets.shape == (0,) and geometry.shape == (0, 8)
    assert packed_nbytes(geometry).shape == (0,)


def test_accepts_strided_rows(make_images):
    images = make_images([(9, 12), (20, 5), (8, 8)])
    boxes = images.boxes(0)
    expected = pack(*images.store, boxes)
    wide = [torch.stack([t, t], -1)[..., 0] for t in (images.offsets, images.geometry, boxes)]
    assert not any(t.is_contiguous() for t in wide)
    for got, want in zip(pack(images.pixels, *wide), expected, strict=True):
        assert torch.equal(got, want)


def test_grid_has_a_cell_at_least():
    assert grids(torch.tensor([[1, 1], [3, 100]]), 400.0).tolist() == [[1, 1], [1, 5]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ratio": 0.5}, "ratio is 0.5"),
        ({"nearest": "cv2"}, "nearest is 'cv2'; it must be 'opencv' or 'pillow'"),
        ({"ratio": math.nan}, "ratio is nan"),
        ({"ratio": math.inf}, "ratio is inf"),
        ({"boxes": torch.tensor([[0, 0, 9, 8]]).short()}, "boxes"),
        ({"boxes": torch.tensor([[-1, 0, 4, 4]]).short()}, "boxes"),
        ({"boxes": torch.zeros(2, 4).short()}, "boxes has shape"),
        ({"geometry": torch.tensor([[8, 8, 0, 0, 4, 4, 4, 4]]).short()}, "packed already"),
        ({"offsets": torch.tensor([1])}, r"offsets\[0\] is 1"),
        ({"geometry": torch.tensor([[0, 8, 0, 0, 0, 8, 0, 0]]).short()}, r"geometry\[0\]"),
    ],
)
def test_says_what_is_wrong(make_images, changes, says):
    images = make_images([(8, 8)])
    arguments = images._asdict() | {"boxes": torch.tensor([[2, 2, 6, 6]]).short()} | changes
    del arguments["arrays"]
    with pytest.raises(FastcilError, match=says):
        pack(**arguments)


def test_says_which_dtype(make_images):
    with pytest.raises(TypeError, match=r"boxes has dtype torch\.int64"):
        pack(*make_images([(8, 8)]).store, torch.tensor([[2, 2, 6, 6]]))
