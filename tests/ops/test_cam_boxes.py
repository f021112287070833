from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from fastcil import ops
from fastcil.ops.cam_boxes import _cam_boxes


def naive(features, weights, sizes, threshold):
    """Boxes from the upsampled map, and how near its nearest pixel is to the threshold."""
    rows = []
    for image, (height, width) in zip(ops.cam(features, weights), sizes.tolist(), strict=True):
        map_ = functional.interpolate(image[None, None], (height, width), mode="bilinear")[0, 0]
        y, x = np.nonzero(map_.numpy() > map_.numpy().dtype.type(threshold))
        box = (y.min(), x.min(), y.max() + 1, x.max() + 1) if len(y) else (0, 0, 0, 0)
        rows.append((list(map(int, box)), len(y) > 0, float((map_ - threshold).abs().min())))
    return rows


def compare(features, weights, sizes, threshold):
    boxes, valid = ops.cam_boxes(features, weights, sizes, threshold)
    assert boxes.dtype == torch.int16 and valid.dtype == torch.bool
    agreed = 0
    for ours, ok, (box, some, distance) in zip(
        boxes.tolist(), valid.tolist(), naive(features, weights, sizes, threshold), strict=True
    ):
        # Two ways to round may disagree about a pixel that lies on the threshold.
        assert (ours, ok) == (box, some) or distance < 1e-6, (sizes, threshold, ours, box)
        agreed += (ours, ok) == (box, some)
    return agreed


LAYOUTS = [torch.contiguous_format, torch.channels_last]


def test_boxes_equal_those_of_the_upsampled_map():
    generator = torch.Generator().manual_seed(0)
    agreed = 0
    for case in range(250):
        h, w = torch.randint(1, 13, (2,), generator=generator).tolist()
        channels = int(torch.randint(1, 40, (), generator=generator))
        sizes = torch.randint(1, 200, (4, 2), generator=generator)
        features = torch.randn(4, channels, h, w, generator=generator)
        features = features.contiguous(memory_format=LAYOUTS[case % 2])
        weights = torch.randn(4, channels, generator=generator)
        if case % 10 == 3:
            features[1] = 0.7
        threshold = float(torch.rand((), generator=generator))
        threshold = {7: 0.0, 8: 1.0, 9: -0.5}.get(case % 30, threshold)
        agreed += compare(features, weights, sizes, threshold)
    assert agreed >= 996


@pytest.mark.parametrize(
    ("dtype", "distance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=str
)
def test_a_threshold_next_to_a_pixel(dtype, distance):
    generator = torch.Generator().manual_seed(1)
    agreed = 0
    for _ in range(100):
        h, w = torch.randint(1, 9, (2,), generator=generator).tolist()
        sizes = torch.randint(65, 150, (2, 2), generator=generator)  # ATen has two kernels
        features = torch.randn(2, 1, h, w, generator=generator, dtype=dtype)
        weights = torch.ones(2, 1)
        image = ops.cam(features, weights)[:1, None]
        pixels = functional.interpolate(image, tuple(sizes[0].tolist()), mode="bilinear")
        place = int(torch.randint(pixels.numel(), (), generator=generator))
        agreed += compare(features, weights, sizes, float(pixels.flatten()[place]) + distance)
    assert agreed > 150


# Shape [B, C, h, w], memory format, and whether each channel is constant.
KINDS = {
    "sequential": ((3, 21, 5, 6), torch.contiguous_format, False),
    "channels_last": ((3, 21, 5, 6), torch.channels_last, False),
    "channels_last, many channels": ((2, 150, 3, 3), torch.channels_last, False),
    "many channels": ((2, 150, 3, 3), torch.contiguous_format, False),
    "large map": ((2, 9, 40, 33), torch.contiguous_format, False),
    "fewer positions than lanes": ((2, 19, 2, 3), torch.contiguous_format, False),
    "one position": ((2, 5, 1, 1), torch.contiguous_format, False),
    "one channel": ((2, 1, 5, 6), torch.contiguous_format, False),
    "constant": ((2, 300, 7, 7), torch.contiguous_format, True),
    "constant, channels_last": ((2, 300, 7, 7), torch.channels_last, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_and_kernel_agree(kind, dtype):
    shape, layout, constant = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
    weights = torch.randn(shape[:2], generator=generator)
    if constant:
        # Of terms that cancel out the rounding is left, which is not constant.
        features, weights = features[..., :1, :1].abs().expand(shape).clone(), weights.abs()
        features = features.contiguous(memory_format=layout)
    sizes = torch.randint(1, 150, (len(features), 2), generator=generator)
    for threshold in (0.0, 0.37, 0.6, 1.0):
        compare(features, weights, sizes, threshold)
        for ours, reference in zip(
            ops.cam_boxes(features, weights, sizes, threshold),
            _cam_boxes(features, weights, sizes, threshold),
            strict=True,
        ):
            assert ours.dtype == reference.dtype
            assert threshold in (0.0, 1.0) or torch.equal(ours, reference)


@pytest.mark.parametrize("find", [ops.cam_boxes, _cam_boxes], ids=["op", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("position", [0, 17, 29])
def test_features_that_are_no_numbers_have_no_box(find, layout, position):
    features = torch.randn(3, 4, 5, 6)
    features[1, 2].view(-1)[position] = math.nan
    features[2, 0].view(-1)[position] = math.inf
    features = features.contiguous(memory_format=layout)
    sizes = torch.tensor([[50, 60]] * 3)
    boxes, valid = find(features, torch.rand(3, 4) + 0.1, sizes, 0.6)
    assert valid.tolist() == [True, False, False]
    assert boxes[1:].tolist() == [[0] * 4] * 2
    # NaN exceeds nothing; an infinite map counts as constant, which is zero.
    _, valid = find(features, torch.rand(3, 4) + 0.1, sizes, -0.5)
    assert valid.tolist() == [True, False, True]


def test_threads_and_memory_change_nothing(threads, poison):
    features, weights = torch.randn(40, 30, 7, 7), torch.randn(40, 30)
    sizes = torch.randint(1, 300, (40, 2))
    wanted = ops.cam_boxes(features, weights, sizes)
    for count in (1, 2, 3):
        with threads(count), poison():
            for ours, theirs in zip(ops.cam_boxes(features, weights, sizes), wanted, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [(7, 7), (224, 224), (1, 1), (3, 500), (37, 5), (6, 8)], ids=str)
def test_one_size_for_all(size):
    features, weights = torch.randn(3, 4, 7, 7), torch.randn(3, 4)
    sizes = torch.tensor([size] * 3)
    assert compare(features, weights, sizes, 0.6) == 3
    for ours, theirs in zip(
        ops.cam_boxes(features, weights, size), ops.cam_boxes(features, weights, sizes), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_box_does_not_depend_on_the_batch():
    features, weights = torch.randn(4, 4, 5, 6), torch.randn(4, 4)
    sizes = torch.tensor([[50, 60], [300, 20], [7, 7], [128, 255]])
    boxes, valid = ops.cam_boxes(features, weights, sizes)
    for i in range(4):
        box, ok = ops.cam_boxes(features[i : i + 1], weights[i : i + 1], sizes[i : i + 1])
        assert torch.equal(box[0], boxes[i]) and ok[0] == valid[i]


def test_no_pixel_above_gives_an_empty_box():
    features = torch.randn(2, 3, 4, 4)
    features[0] = 1.5
    boxes, valid = ops.cam_boxes(features, torch.rand(2, 3) + 0.1, (32, 40))
    assert boxes[0].tolist() == [0, 0, 0, 0] and valid.tolist() == [False, True]
    boxes, valid = ops.cam_boxes(features, torch.rand(2, 3), (32, 40), threshold=1.0)
    assert boxes.any() == False and valid.tolist() == [False, False]  # noqa: E712


@pytest.mark.parametrize(
    "features",
    [
        torch.randn(3, 4, 5, 6),
        torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        torch.randn(3, 6, 5, 4).transpose(1, 3),
        torch.randn(6, 4, 5, 6)[::2],
        torch.randn(3, 4, 5, 6).bfloat16(),
        torch.randn(0, 4, 5, 6),
        torch.randn(3, 4, 5, 6, requires_grad=True),
    ],
    ids=["contiguous", "channels_last", "transposed", "strided", "bfloat16", "empty", "grad"],
)
def test_opcheck(features):
    weights = torch.randn(len(features), 4)
    sizes = torch.randint(1, 90, (len(features), 2))
    arguments = (features, weights, sizes, 0.6)
    checks = ["test_schema", "test_faketensor"]
    if features.requires_grad:
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.fastcil.cam_boxes.default, arguments, test_utils=checks)
    compare(features.detach(), weights, sizes, 0.6)
    assert not ops.cam_boxes(features, weights, (8, 8))[0].requires_grad


def test_compiles_in_one_graph():
    features, weights = torch.randn(3, 4, 5, 6), torch.randn(3, 4)
    compiled = torch.compile(ops.cam_boxes, fullgraph=True, backend="aot_eager")
    for sizes in ((30, 40), torch.tensor([[8, 9], [20, 33], [64, 64]])):
        for ours, theirs in zip(
            compiled(features, weights, sizes),
            ops.cam_boxes(features, weights, sizes),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 5), "sides from 0 to 5"),
        ((40_000, 5), "sides from 5 to 40000"),
        (torch.tensor([[3, 4]]), r"sizes is torch.int64 of shape \(1, 2\)"),
        (torch.ones(2, 2), "sizes is torch.float32"),
        ((1, 2, 3), "sizes is"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        ops.cam_boxes(torch.randn(2, 3, 4, 4), torch.randn(2, 3), sizes)


def test_bad_features():
    with pytest.raises(ValueError, match="class_weights has shape"):
        ops.cam_boxes(torch.randn(2, 3, 4, 4), torch.randn(2, 4), (8, 8))
