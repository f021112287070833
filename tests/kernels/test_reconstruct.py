from __future__ import annotations

import pytest
import torch

from fastcil import ops

kernels = pytest.importorskip("fastcil.kernels.reconstruct", reason="triton is not installed")

SIDES = [(1, 1), (7, 5), (20, 33)]


def packed_images(generator):
    """Images of several sizes with boxes of all kinds, raw ones between them."""
    raw, offsets, geometry, boxes = [], [], [], []
    for height, width in SIDES:
        for _ in range(4):
            a, b = torch.randint(0, height + 1, (2,), generator=generator).tolist()
            c, d = torch.randint(0, width + 1, (2,), generator=generator).tolist()
            box = [min(a, b), min(c, d), max(a, b), max(c, d)]
            boxes.append([box, [0, 0, height, width], box, [a, c, b, d]][len(boxes) % 4])
            offsets.append(sum(map(len, raw)))
            geometry.append([height, width, 0, 0, height, width, 0, 0])
            raw.append(torch.randint(0, 256, (3 * height * width,), generator=generator).byte())
    pixels, begins = torch.cat(raw), torch.tensor(offsets)
    rows = torch.tensor(geometry, dtype=torch.int16)
    packed = ops.pack(pixels, begins, rows, torch.tensor(boxes, dtype=torch.int16), 3.0)
    gap = len(packed[0])
    store = torch.cat([packed[0], pixels])
    return store, torch.cat([packed[1], begins + gap]), torch.cat([packed[2], rows])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("seed", range(2))
def test_same_bytes_as_the_op(seed, monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK", 256 if seed else 2048)
    store = packed_images(torch.Generator().manual_seed(seed))
    for ours, theirs in zip(kernels.reconstruct(*store), ops.reconstruct(*store), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("interpreted")
def test_no_images():
    pixels, starts = kernels.reconstruct(
        torch.zeros(5, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, 8, dtype=torch.int16),
    )
    assert (pixels.shape, starts.shape) == ((0,), (0,))


@pytest.mark.usefixtures("interpreted")
def test_nothing_is_read_outside_the_pixels():
    rows = [[2, 2, 0, 0, 2, 2, 0, 0], [-3, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0]]
    pixels, starts = kernels.reconstruct(
        torch.full((12,), 7).byte(),
        torch.tensor([3, -5, 100]),
        torch.tensor(rows, dtype=torch.int16),
    )
    assert starts.tolist() == [0, 12, 15]
    assert pixels.tolist() == [7] * 9 + [0] * 9


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_compiled(launches, assemble, architecture):
    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    (launch,) = launches(
        kernels,
        "unpack",
        empty(9000, dtype=torch.uint8),
        empty(4),
        empty(9000, dtype=torch.uint8),
        empty(4),
        empty(4, 8, dtype=torch.int16),
        4500,
    )
    code = assemble(launch, architecture)
    assert code.stack == 0
    assert code.count(r"\b(LDL|STL|ATOM\w*|REDG?)\b") == 0
