from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

kernels = pytest.importorskip("fastcil.kernels.cam_boxes", reason="triton is not installed")


def naive(features, weights, sizes, threshold):
    """Boxes from the upsampled map, and how near its nearest pixel is to the threshold."""
    maps = torch.einsum("bchw,bc->bhw", features.double(), weights.double())
    rows = []
    for image, (height, width) in zip(maps, sizes.tolist(), strict=True):
        low, high = image.min(), image.max()
        constant = high - low <= 1e-5 * max(high.abs(), low.abs())
        image = torch.zeros_like(image) if constant else (image - low) / (high - low)
        big = functional.interpolate(image[None, None], (height, width), mode="bilinear")[0, 0]
        y, x = np.nonzero((big > threshold).numpy())
        box = (y.min(), x.min(), y.max() + 1, x.max() + 1) if len(y) else (0, 0, 0, 0)
        rows.append((list(map(int, box)), len(y) > 0, float((big - threshold).abs().min())))
    return rows


def compare(features, weights, sizes, threshold, given=None):
    boxes, valid = kernels.cam_boxes(
        features, weights, sizes if given is None else given, threshold
    )
    assert boxes.dtype == torch.int16 and valid.dtype == torch.bool
    agreed = 0
    for ours, ok, (box, some, distance) in zip(
        boxes.tolist(), valid.tolist(), naive(features, weights, sizes, threshold), strict=True
    ):
        # A pixel that lies on the threshold may fall on either side of it.
        assert (ours, ok) == (box, some) or distance < 1e-5, (sizes, threshold, ours, box)
        agreed += (ours, ok) == (box, some)
    return agreed


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_boxes_equal_those_of_the_upsampled_map(memory_format, dtype):
    generator = torch.Generator().manual_seed(0)
    agreed = 0
    for channels in (1, 3, 12, 64):
        h, w = torch.randint(1, 12, (2,), generator=generator).tolist()
        features = torch.randn(3, channels, h, w, generator=generator).to(dtype)
        features = features.to(memory_format=memory_format)
        weights = torch.randn(3, channels, generator=generator).to(dtype)
        sizes = torch.randint(1, 100, (3, 2), generator=generator)
        agreed += compare(features, weights, sizes, 0.1 + 0.8 * channels / 64)
    assert agreed >= 11


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("size", [(7, 7), (64, 70), (1, 1), (3, 200), (6, 8), (130, 2)], ids=str)
def test_one_size_for_all(size):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 4, 7, 7, generator=generator)
    weights = torch.randn(3, 4, generator=generator)
    sizes = torch.tensor([size] * 3)
    given = torch.tensor(size).expand(3, -1)
    assert compare(features, weights, sizes, 0.6, given) == 3


@pytest.mark.usefixtures("interpreted")
def test_maps_larger_than_the_block_and_than_the_image(monkeypatch):
    monkeypatch.setattr(kernels, "_ELEMENTS", 256)
    monkeypatch.setattr(kernels, "_POSITIONS", 32)
    generator = torch.Generator().manual_seed(2)
    strided = torch.randn(2, 48, 33, 35, generator=generator)[:, :, ::4, ::4]
    weights = torch.randn(2, 48, generator=generator)
    for features in (strided, strided.contiguous(memory_format=torch.channels_last)):
        assert compare(features, weights, torch.tensor([[4, 90], [70, 3]]), 0.5) == 2


@pytest.mark.usefixtures("interpreted")
def test_maps_that_mark_nothing_or_everything():
    features = torch.randn(5, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(5, 4)
    features[0] = 0.3  # constant
    features[1] = 0.0
    features[2, 1, 0, 0] = float("nan")
    features[3, 1, 0, 0] = float("inf")
    sizes = torch.tensor([[20, 30]] * 5)
    boxes, valid = kernels.cam_boxes(features, weights, sizes, 0.5)
    assert valid.tolist() == [False] * 4 + [True]
    assert not boxes[:4].any()
    boxes, valid = kernels.cam_boxes(features, weights, sizes, -0.5)
    # Zeros exceed a negative threshold, NaN does not.
    assert valid.tolist() == [True, True, False, True, True]
    assert boxes[0].tolist() == [0, 0, 20, 30]
    assert not kernels.cam_boxes(features, weights, sizes, 1.0)[1].any()


@pytest.mark.usefixtures("interpreted")
def test_a_threshold_just_below_the_peak():
    features = torch.zeros(1, 1, 4, 4)
    features[0, 0, 1, 2] = 3.0
    boxes, valid = kernels.cam_boxes(features, torch.ones(1, 1), torch.tensor([[4, 4]]), 0.999999)
    assert (boxes.tolist(), valid.tolist()) == ([[1, 2, 2, 3]], [True])


@pytest.mark.usefixtures("interpreted")
def test_sides_out_of_range_have_no_box_where_nobody_could_check(monkeypatch):
    features, weights = torch.randn(3, 2, 4, 4), torch.ones(3, 2)
    sizes = torch.tensor([[0, 5], [5, 40000], [8, 8]])
    with pytest.raises(ValueError, match="sizes holds sides from 0 to 40000"):
        kernels.cam_boxes(features, weights, sizes, 0.5)
    monkeypatch.setattr(kernels, "check_sides", lambda *_: None)
    boxes, valid = kernels.cam_boxes(features, weights, sizes, 0.5)
    assert valid.tolist() == [False, False, True]
    assert not boxes[:2].any()


@pytest.mark.usefixtures("interpreted")
def test_no_images():
    boxes, valid = kernels.cam_boxes(
        torch.zeros(0, 2, 3, 3), torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int64), 0.5
    )
    assert boxes.shape == (0, 4) and valid.shape == (0,)
