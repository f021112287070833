from __future__ import annotations

import pytest
import torch

from fastcil import ops
from fastcil.ops.read import FARTHEST

kernels = pytest.importorskip("fastcil.kernels.read", reason="triton is not installed")

SIDES = [(9, 13), (12, 6), (15, 18)]


def rows(generator, views=False):
    """Raw and packed images in two arenas, and views of the raw ones."""
    raw, offsets, geometry, boxes = [], [], [], []
    for height, width in SIDES:
        y0, x0 = int(height * 0.2), int(width * 0.3)
        boxes.append([y0, x0, y0 + height // 2, x0 + width // 2])
        offsets.append(sum(map(len, raw)))
        geometry.append([height, width, 0, 0, height, width, 0, 0])
        raw.append(torch.randint(0, 256, (3 * height * width,), generator=generator).byte())
    store = torch.cat(raw), torch.tensor(offsets), torch.tensor(geometry, dtype=torch.int16)
    boxes = torch.tensor(boxes, dtype=torch.int16)
    packed = ops.pack(*store, boxes, 3.0)
    count = len(offsets)
    arena = torch.tensor([1] * count + [0] * count)
    places = torch.cat([store[1], packed[1]])
    shapes = torch.cat([store[2], packed[2]])
    seen = None
    if views:
        seen = torch.cat([packed[2][:, 2:], torch.zeros(count, 6, dtype=torch.int16)])
        seen[0] = 0
    return [packed[0], store[0]], arena, places, shapes, seen


def random_crops(shapes, generator):
    sides = shapes[:, :2].float()
    corner = (torch.rand(len(shapes), 2, generator=generator) - 0.2) * sides
    extent = (0.1 + 1.3 * torch.rand(len(shapes), 2, generator=generator)) * sides
    return torch.cat([corner, corner + extent], 1)


def test_crops_reach_as_far_as_the_ops_do():
    assert kernels.FARTHEST == FARTHEST


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)], ids=str)
def test_same_bytes_as_the_op(size, antialias):
    generator = torch.Generator().manual_seed(size[1])
    arenas, arena, offsets, shapes, views = rows(generator, views=size[0] != 8)
    crops = random_crops(shapes, generator)
    flips = torch.rand(len(shapes), generator=generator) < 0.5
    ours = kernels.read(arenas, arena, offsets, shapes, *size, crops, flips, views, antialias)
    theirs = ops.read(arenas, arena, offsets, shapes, size, crops, flips, views, antialias)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("interpreted")
def test_whole_images_in_several_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "_COLUMNS", 32)
    monkeypatch.setattr(kernels, "_SAMPLES", 64)
    arenas, arena, offsets, shapes, _ = rows(torch.Generator().manual_seed(0))
    keep = slice(2, 4)
    given = arena[keep], offsets[keep], shapes[keep]
    ours = kernels.read(arenas, *given, 9, 10, None, None, None, True)
    assert torch.equal(ours, ops.read(arenas, *given, (9, 10)))


@pytest.mark.usefixtures("interpreted")
def test_reads_zeros_where_there_is_no_buffer():
    arenas, arena, offsets, shapes, _ = rows(torch.Generator().manual_seed(0))
    arena[0] = 7
    offsets[1] = -(10**15)
    offsets[2] = 10**15
    out = kernels.read(arenas, arena, offsets, shapes, 9, 9, None, None, None, False)
    assert not out[:3].any() and out[3:].any()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("antialias", [True, False])
def test_crops_that_reach_far_beyond_the_image(antialias):
    """Only what meets the image takes time for each pixel: else these would take hours."""
    arenas, arena, offsets, shapes, _ = rows(torch.Generator().manual_seed(3))
    given = arena[:4], offsets[:4], shapes[:4]
    far = [[-300.0, -250.0, 90.0, 40.0], [-20.0, 5.0, 2.0, 300.0], [50.0, 50.0, 99.0, 70.0]]
    crops = torch.tensor([*far, [-0.75, 2.25, 9.5, 3.0]])
    ours = kernels.read(arenas, *given, 2, 3, crops, None, None, antialias)
    assert torch.equal(ours, ops.read(arenas, *given, (2, 3), crops, antialias=antialias))


@pytest.mark.usefixtures("interpreted")
def test_an_arena_on_another_device_is_refused():
    arenas, *given, _ = rows(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"arenas\[1\] is on meta; it must be on cpu"):
        kernels.read([arenas[0], arenas[1].to("meta")], *given, 4, 4, None, None, None, True)


@pytest.mark.usefixtures("interpreted")
def test_no_images():
    arenas, arena, offsets, shapes, _ = rows(torch.Generator().manual_seed(0))
    out = kernels.read(arenas, arena[:0], offsets[:0], shapes[:0], 4, 4, None, None, None, True)
    assert out.shape == (0, 3, 4, 4)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_compiled(launches, assemble, architecture, antialias):
    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    given = empty(8), empty(8), empty(8, 8, dtype=torch.int16), 224, 224
    crops, flips = empty(8, 4, dtype=torch.float32), empty(8, dtype=torch.bool)
    views = empty(8, 6, dtype=torch.int16)
    pixels = [empty(99, dtype=torch.uint8)] * 2
    (launch,) = launches(kernels, "read", pixels, *given, crops, flips, views, antialias)
    code = assemble(launch, architecture)
    assert code.stack == 0
    assert code.count(r"\b(LDL|STL|ATOM\w*|REDG?)\b") == 0
