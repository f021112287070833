from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcil.ops import pack, reconstruct
from fastcil.ops.reconstruct import reference

SIZES = [(9, 40), (33, 21), (1, 1), (16, 16), (30, 7), (2, 90), (64, 1)]


@pytest.fixture(params=[reconstruct, reference], ids=["op", "reference"])
def kernel(request):
    return request.param


def naive_show(image: np.ndarray, box: list[int], grid: list[int]) -> np.ndarray:
    """What a packed image shows, pixel by pixel, from the image that it was made of."""
    height, width = image.shape[:2]
    (y0, x0, y1, x1), (rows, columns) = box, grid
    shown = np.empty_like(image)
    for y in range(height):
        for x in range(width):
            if y0 <= y < y1 and x0 <= x < x1:
                shown[y, x] = image[y, x]
            else:
                r, c = y * rows // height, x * columns // width
                shown[y, x] = image[r * height // rows, c * width // columns]
    return shown


@pytest.mark.parametrize("ratio", [1, 2, 4, 9, 300])
@pytest.mark.parametrize("seed", range(3))
def test_shows_the_box_and_nearest_neighbours(make_images, kernel, seed, ratio):
    images = make_images(SIZES, seed)
    packed, offsets, geometry = pack(*images.store, images.boxes(seed), ratio)
    pixels, starts = kernel(packed, offsets, geometry)
    assert starts.tolist() == images.offsets.tolist()
    for image, start, row in zip(images.arrays, starts, geometry.tolist(), strict=True):
        expected = naive_show(image, row[2:6], row[6:])
        assert np.array_equal(pixels[start : start + image.size].numpy(), expected.ravel())


def test_copies_raw_images(make_images, kernel):
    images = make_images(SIZES)
    pixels, starts = kernel(*images.store)
    assert torch.equal(pixels, images.pixels) and torch.equal(starts, images.offsets)
    assert pixels.data_ptr() != images.pixels.data_ptr()


def test_takes_images_in_any_order_and_from_anywhere(make_images, kernel):
    images = make_images(SIZES)
    packed, offsets, geometry = pack(*images.store, images.boxes(0))
    padded = torch.cat([packed.new_full((11,), 99), packed])
    order = torch.tensor([4, 1, 1, 6])
    pixels, starts = kernel(padded, offsets[order] + 11, geometry[order])
    whole, where = reconstruct(packed, offsets, geometry)
    for image, start in zip(order.tolist(), starts.tolist(), strict=True):
        size = images.arrays[image].size
        assert torch.equal(pixels[start : start + size], whole[where[image] : where[image] + size])


def test_accepts_strided_rows(make_images, kernel):
    images = make_images(SIZES)
    parts = pack(*images.store, images.boxes(0))
    strided = [torch.stack([part, part], -1)[..., 0] for part in parts]
    assert torch.equal(kernel(*strided)[0], kernel(*parts)[0])


def test_no_images(make_images, kernel):
    pixels, starts = kernel(*make_images([]).store)
    assert pixels.shape == (0,) and starts.shape == (0,)
    assert pixels.dtype == torch.uint8 and starts.dtype == torch.int64


def test_small_chunks_change_nothing(make_images, kernel, monkeypatch):
    images = make_images(SIZES)
    parts = pack(*images.store, images.boxes(0))
    expected = kernel(*parts)[0]
    monkeypatch.setitem(reference.__globals__, "CHUNK", 100)
    assert torch.equal(kernel(*parts)[0], expected)


def test_writes_every_byte(make_images, kernel, poison):
    images = make_images(SIZES, high=255)
    parts = pack(*images.store, images.boxes(0))
    with poison():
        pixels, _ = kernel(*parts)
    assert not (pixels == 255).any()


def test_threads_change_nothing(make_images, kernel, threads):
    images = make_images(SIZES * 3)
    parts = pack(*images.store, images.boxes(0))
    with threads(1):
        expected = kernel(*parts)[0]
    with threads(2):
        assert torch.equal(kernel(*parts)[0], expected)


@pytest.mark.parametrize(
    ("row", "offset", "says"),
    [
        ([4, 4, 0, 0, 4, 4, 0, 0], 1, r"offsets\[1\] is 1"),
        ([4, 4, 0, 0, 4, 4, 0, 0], -1, r"offsets\[1\] is -1"),
        ([0, 4, 0, 0, 0, 4, 0, 0], 0, r"geometry\[1\]"),
        ([4, 4, 0, 0, 4, 3, 0, 0], 0, r"geometry\[1\]"),
        ([4, 4, 0, 0, 5, 4, 2, 2], 0, r"geometry\[1\]"),
        ([4, 4, -1, 0, 2, 2, 2, 2], 0, r"geometry\[1\]"),
        ([4, 4, 0, 0, 2, 2, 5, 2], 0, r"geometry\[1\]"),
        ([4, 4, 0, 0, 2, 2, 0, 2], 0, r"geometry\[1\]"),
        ([4, 4, 3, 3, 1, 9, 2, 2], 0, r"geometry\[1\]"),
    ],
)
def test_says_which_row_is_wrong(make_images, kernel, row, offset, says):
    images = make_images([(4, 4)])
    geometry = torch.cat([images.geometry, torch.tensor([row]).short()])
    with pytest.raises(ValueError, match=says):
        kernel(images.pixels, torch.tensor([0, offset]), geometry)


def test_opcheck(make_images):
    images = make_images(SIZES)
    parts = pack(*images.store, images.boxes(0))
    torch.library.opcheck(torch.ops.fastcil.reconstruct.default, parts)


def test_compiles_in_one_graph(make_images):
    images = make_images(SIZES)
    parts = pack(*images.store, images.boxes(0))
    compiled = torch.compile(reconstruct, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*parts), reconstruct(*parts), strict=True):
        assert torch.equal(got, want)
