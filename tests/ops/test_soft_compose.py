from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

from fastcil import ops


def naive(images, cam, ratio):
    """Eq. S1c with OpenCV's nearest neighbour (the supplement's), image by image."""
    results = []
    for image, map_ in zip(images.double(), cam.double(), strict=True):
        pixels = image.permute(1, 2, 0).numpy()
        height, width = pixels.shape[:2]
        small = tuple(max(1, math.floor(s / math.sqrt(ratio))) for s in (width, height))
        down = cv2.resize(pixels, small, interpolation=cv2.INTER_NEAREST)
        coarse = cv2.resize(down, (width, height), interpolation=cv2.INTER_NEAREST)
        mask = functional.interpolate(map_[None, None], (height, width), mode="bilinear")
        mask = mask[0, 0].numpy()[:, :, None]
        results.append(mask * pixels + (1 - mask) * coarse.reshape(pixels.shape))
    return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("ratio", [4.0, 9.0, 2.0, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (5, 7), (1, 3)], ids=str)
def test_value(shape, ratio):
    images, cam = torch.randn(2, 3, *shape, dtype=torch.float64), torch.rand(2, 3, 4).double()
    torch.testing.assert_close(ops.soft_compose(images, cam, ratio), naive(images, cam, ratio))


def test_the_ends_are_exact():
    images = torch.randn(2, 3, 9, 10)
    assert torch.equal(ops.soft_compose(images, torch.ones(2, 9, 10)), images)
    coarse = ops.soft_compose(images, torch.zeros(2, 3, 3))
    # floor(9 / 2) = 4 rows hold rows 0, 2, 4, 6; row y shows row y * 4 // 9 of them.
    rows = [y * 4 // 9 * 9 // 4 for y in range(9)]
    columns = [x // 2 * 2 for x in range(10)]
    assert torch.equal(coarse, images[:, :, rows][:, :, :, columns])


def test_first_and_second_derivatives():
    images = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    cam = torch.rand(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.soft_compose, (images, cam))
    assert torch.autograd.gradgradcheck(ops.soft_compose, (images, cam))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_and_layout_are_those_of_the_images(layout, dtype):
    images = torch.randn(2, 3, 8, 8).to(dtype, memory_format=layout)
    composed = ops.soft_compose(images, torch.rand(2, 2, 2))
    assert composed.dtype == dtype
    assert composed.is_contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.soft_compose(images, torch.rand(2, 2, 2)).dtype == dtype


def test_empty_batch_and_compile():
    assert ops.soft_compose(torch.rand(0, 3, 8, 8), torch.rand(0, 2, 2)).shape == (0, 3, 8, 8)
    images, cam = torch.rand(2, 3, 9, 7), torch.rand(2, 3, 2)
    compiled = torch.compile(ops.soft_compose, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, cam), ops.soft_compose(images, cam))


@pytest.mark.parametrize(
    ("images", "cam", "ratio", "message"),
    [
        (
            torch.ones(2, 3, 4, 4, dtype=torch.uint8),
            torch.ones(2, 2, 2),
            4,
            "images is torch.uint8",
        ),
        (torch.ones(3, 4, 4), torch.ones(2, 2, 2), 4, "images is"),
        (torch.ones(2, 3, 4, 4), torch.ones(1, 2, 2), 4, "cam has shape"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 1, 2, 2), 4, "cam has shape"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 2, 2), 0.5, "ratio is 0.5"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 2, 2), float("nan"), "ratio is nan"),
    ],
)
def test_bad_arguments(images, cam, ratio, message):
    with pytest.raises(ValueError, match=message):
        ops.soft_compose(images, cam, ratio)
