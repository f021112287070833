from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fastcil import ops
from fastcil.errors import FastcilError
from fastcil.ops.salient_masks import _salient_masks

FINDERS = pytest.mark.parametrize(
    "find", [ops.salient_masks, _salient_masks], ids=["op", "reference"]
)
SIZES = [(1, 1), (1, 9), (7, 1), (5, 7), (32, 32), (9, 31), (300, 2), (2, 700), (32, 32)]


def by_definition(map_, size, threshold):
    """In float64: how far each pixel is above the threshold, in parts of the largest value."""
    full = functional.interpolate(map_[None, None].double(), size, mode="bilinear").flatten()
    low, high = full.aminmax()
    return (full - low - threshold * (high - low)) / max(low.abs(), high.abs())


def undecided(masks, maps, sizes, threshold):
    """Number of pixels that lie on the threshold; raises if any other is not as it should be."""
    assert masks.dtype == torch.bool and masks.shape == (int(sizes.prod(1).sum()),)
    count = 0
    for mask, map_, size in zip(
        masks.split(sizes.prod(1).tolist()), maps, sizes.tolist(), strict=True
    ):
        above = by_definition(map_, size, threshold)
        clear = above.abs() > 2e-6
        # A map of one position is constant, and so is any map at one pixel.
        silent = map_.numel() == 1 or math.prod(size) == 1
        assert torch.equal(mask[clear], (above > 0)[clear]) or (silent and bool(mask.all()))
        count += 0 if silent else int((~clear).sum())
    return count


@FINDERS
def test_masks_are_those_of_the_enlarged_map(find):
    generator = torch.Generator().manual_seed(0)
    open_, pixels = 0, 0
    for case in range(120):
        h, w = torch.randint(1, 13, (2,), generator=generator).tolist()
        sizes = torch.randint(2, 120, (4, 2), generator=generator)
        maps = torch.randn(4, h, w, generator=generator) * 10.0 ** (case % 7 - 3)
        threshold = 0.05 + 0.9 * float(torch.rand((), generator=generator))
        open_ += undecided(find(maps, sizes, threshold), maps, sizes, threshold)
        pixels += int(sizes.prod(1).sum())
    assert open_ < 2e-4 * pixels


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("cells", [(4, 4), (2, 3), (7, 1), (40, 40)])
def test_the_kernel_marks_what_the_reference_does(cells, threshold):
    maps = torch.rand(len(SIZES), *cells, generator=torch.Generator().manual_seed(3))
    sizes = torch.tensor(SIZES)
    masks = ops.salient_masks(maps, sizes, threshold)
    assert int((masks != _salient_masks(maps, sizes, threshold)).sum()) <= 1  # on the threshold
    # Whatever range the map has itself.
    again = ops.salient_masks(8 * maps - 4, sizes, threshold)
    assert int((masks != again).sum()) <= 1


def test_masks_fill_the_boxes_of_cam_boxes():
    features = torch.rand(6, 1, 5, 4, generator=torch.Generator().manual_seed(4))
    low, high = features.flatten(1).aminmax(dim=1)
    maps = (features[:, 0] - low[:, None, None]) / (high - low)[:, None, None]
    boxes, valid = ops.cam_boxes(features, torch.ones(6, 1), (37, 50), 0.6)
    assert bool(valid.all())
    for map_, (y0, x0, y1, x1) in zip(maps, boxes.tolist(), strict=True):
        # Boxes are of the map as it was scaled before it was enlarged.
        full = functional.interpolate(map_[None, None], (37, 50), mode="bilinear")
        low, high = full.aminmax()
        mask = ops.salient_masks(map_[None], (37, 50), float((0.6 - low) / (high - low)))
        rows, columns = (mask.view(37, 50).any(k).nonzero().flatten() for k in (1, 0))
        assert [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1] == [y0, x0, y1, x1]


@FINDERS
def test_maps_that_say_nothing_mark_everything(find):
    ones = torch.ones(2, 3)
    odd = [torch.eye(2, 3) for _ in range(4)]
    for map_, value in zip(odd, (math.nan, math.inf, -math.inf, 3.4e38), strict=True):
        map_[0, 1] = value
    odd[3][1, 1] = -3.4e38  # their difference is infinite
    maps = torch.stack([ones * 0, ones * 0.1, ones * 0.9, ones * -7, *odd, torch.eye(2, 3)])
    sizes = torch.tensor([[11, 13]] * len(maps))
    assert find(maps, sizes, 0.6).view(len(maps), -1).all(1).tolist() == [True] * 8 + [False]
    assert bool(find(maps, sizes, 0.0).all())


@FINDERS
def test_what_no_pixel_reads_has_no_say(find):
    maps, sizes = torch.rand(1, 9, 9), torch.tensor([[3, 3]])
    expected = find(maps, sizes, 0.6)
    assert not bool(expected.all())
    maps[0, 0], maps[0, :, 3] = math.nan, math.inf
    assert torch.equal(find(maps, sizes, 0.6), expected)


@FINDERS
def test_a_peak_between_pixels_is_marked(find):
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 2] = 1.0  # at 0.879 when enlarged to 32 x 32
    mask = find(maps, torch.tensor([[32, 32]]), 0.9).view(32, 32)
    assert mask.nonzero().tolist() == [[11, 19], [11, 20], [12, 19], [12, 20]]


@FINDERS
@pytest.mark.parametrize("size", [(7, 7), (224, 224), (1, 1), (3, 500), (37, 5), (6, 8)], ids=str)
def test_one_size_for_all(find, size):
    maps = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([size] * 3)
    masks = find(maps, sizes, 0.6)
    assert undecided(masks, maps, sizes, 0.6) <= 1
    assert torch.equal(ops.salient_masks(maps, size), ops.salient_masks(maps, sizes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_computed_in_float32(dtype):
    maps = torch.rand(len(SIZES), 5, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    sizes = torch.tensor(SIZES)
    expected = ops.salient_masks(maps.float(), sizes)
    assert torch.equal(ops.salient_masks(maps, sizes), expected)
    assert torch.equal(ops.salient_masks(maps.mT.contiguous().mT, sizes), expected)
    with torch.autocast("cpu"):
        assert torch.equal(ops.salient_masks(maps, sizes), expected)


def test_a_mask_does_not_depend_on_the_batch():
    maps, sizes = torch.rand(len(SIZES), 5, 6), torch.tensor(SIZES)
    parts = ops.salient_masks(maps, sizes).split(sizes.prod(1).tolist())
    for k, part in enumerate(parts):
        assert torch.equal(ops.salient_masks(maps[k : k + 1], sizes[k : k + 1]), part)


def test_threads_memory_and_stretches_change_nothing(threads, poison, monkeypatch):
    maps, sizes = torch.rand(40, 7, 7), torch.randint(1, 100, (40, 2))
    wanted = ops.salient_masks(maps, sizes)
    for count in (1, 2, 3):
        with threads(count), poison():
            assert torch.equal(ops.salient_masks(maps, sizes), wanted)
    wanted = _salient_masks(maps, sizes, 0.6)
    monkeypatch.setattr("fastcil.ops.sizes._TOGETHER", 40)
    with poison():
        assert torch.equal(_salient_masks(maps, sizes, 0.6), wanted)


def test_large_results():
    maps = torch.rand(2, 3, 4)
    sizes = torch.tensor([[2300, 2100], [5, 7]])  # as much as takes the memory of earlier ones
    for _ in range(2):
        masks = ops.salient_masks(maps, sizes)
        assert int((masks != _salient_masks(maps, sizes, 0.6)).sum()) <= 4


@FINDERS
def test_no_images(find):
    masks = find(torch.zeros(0, 4, 4), torch.zeros(0, 2, dtype=torch.int64), 0.6)
    assert masks.shape == (0,) and masks.dtype == torch.bool


@pytest.mark.parametrize(
    "maps",
    [
        torch.rand(3, 5, 6),
        torch.rand(3, 6, 5).mT,
        torch.rand(6, 5, 6)[::2],
        torch.rand(0, 5, 6),
        torch.rand(3, 5, 6, requires_grad=True),
    ],
    ids=["contiguous", "transposed", "strided", "empty", "grad"],
)
def test_opcheck(maps):
    sizes = torch.randint(1, 90, (len(maps), 2))
    checks = ["test_schema", "test_faketensor"]
    if maps.requires_grad:
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(
        torch.ops.fastcil.salient_masks.default, (maps, sizes, 0.6), test_utils=checks
    )
    assert not ops.salient_masks(maps, sizes).requires_grad


def test_compiles_in_one_graph():
    maps = torch.rand(3, 5, 6)
    compiled = torch.compile(ops.salient_masks, fullgraph=True, backend="aot_eager")
    for sizes in ((30, 40), torch.tensor([[8, 9], [20, 33], [64, 64]])):
        assert torch.equal(compiled(maps, sizes), ops.salient_masks(maps, sizes))


@pytest.mark.parametrize(
    ("maps", "sizes", "threshold", "message"),
    [
        (torch.ones(2, 4, 4), (0, 5), 0.6, "sizes holds sides from 0 to 5"),
        (torch.ones(2, 4, 4), (40_000, 5), 0.0, "sizes holds sides from 5 to 40000"),
        (torch.ones(2, 4, 4), torch.ones(2, 2), 0.6, "sizes is torch.float32"),
        (torch.ones(2, 4, 4), (1, 2, 3), 0.6, "sizes is torch.int64"),
        (torch.ones(1, 4, 4), torch.ones(2, 2).long(), 0.6, r"maps is .* \[2, h, w\]"),
        (torch.ones(2, 4), (3, 3), 0.6, "maps is torch.float32 of shape"),
        (torch.ones(2, 4, 4).short(), (3, 3), 0.6, "maps is torch.int16"),
        (torch.ones(2, 0, 4), (3, 3), 0.6, "h and w must be at least 1"),
        (torch.ones(2, 4, 4), (3, 3), 1.0, "threshold is 1.0; it must lie from 0"),
        (torch.ones(2, 4, 4), (3, 3), math.nan, "threshold is nan"),
        (torch.ones(2, 4, 4), (3, 3), True, "threshold is True"),
    ],
)
def test_bad_arguments(maps, sizes, threshold, message):
    with pytest.raises(ValueError, match=message) as caught:
        ops.salient_masks(maps, sizes, threshold)
    assert "sides" in message or isinstance(caught.value, FastcilError)


def test_bad_sides_for_the_reference():
    with pytest.raises(FastcilError, match="sizes holds sides from -1 to 5"):
        _salient_masks(torch.ones(1, 4, 4), torch.tensor([[5, -1]]), 0.6)
