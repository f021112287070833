from __future__ import annotations

import math

import pytest
import torch

from fastcil.ops.salient_masks import ROUNDING, _salient_masks

kernels = pytest.importorskip("fastcil.kernels.salient_masks", reason="triton is not installed")


def differing(maps, sizes, threshold):
    """Number of pixels that the reference marks and the kernel does not, or the reverse."""
    masks = kernels.salient_masks(maps, sizes, threshold)
    reference = _salient_masks(maps.float(), sizes, threshold)
    assert masks.dtype == torch.bool and masks.shape == reference.shape
    return int((masks != reference).sum())


def test_constant_maps_are_those_of_the_op():
    assert kernels.ROUNDING == ROUNDING


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("cells", [(7, 7), (1, 3)])
def test_same_masks_as_the_reference(cells):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(5, *cells, generator=generator)
    sizes = torch.tensor([[24, 30], [1, 1], [3, 60], [7, 7], [65, 2]])
    # A pixel that lies on the threshold may fall on either side of it.
    assert differing(maps.mT.contiguous().mT, sizes, 0.6) <= 1
    assert differing(maps, sizes, 0.0) == 0


@pytest.mark.usefixtures("interpreted")
def test_images_and_maps_larger_than_the_blocks(monkeypatch):
    for name, value in {"_BAND": 8, "_PIXELS": 32, "_COLUMNS": 8, "_CORNERS": 4}.items():
        monkeypatch.setattr(kernels, name, value)
    maps = torch.rand(2, 9, 5, generator=torch.Generator().manual_seed(1))
    assert differing(maps, torch.tensor([[10, 19], [17, 3]]), 0.5) <= 1


@pytest.mark.usefixtures("interpreted")
def test_maps_that_say_nothing_mark_everything():
    maps = torch.rand(7, 3, 5, generator=torch.Generator().manual_seed(2))
    maps[0] = 0.1
    maps[1] = 0.0
    maps[2, 1, 4] = math.nan
    maps[3, 0, 0] = math.inf
    maps[4, 2, 2], maps[4, 0, 4] = 3e38, -3e38
    maps[5] = 1000 + 1e-4 * maps[5]
    sizes = torch.tensor([[20, 31]] * 7)
    masks = kernels.salient_masks(maps, sizes, 0.5).view(7, -1)
    assert masks.all(1).tolist() == [True] * 6 + [False]


@pytest.mark.usefixtures("interpreted")
def test_no_images_and_bad_sides():
    assert kernels.salient_masks(torch.zeros(0, 3, 3), torch.zeros(0, 2).long(), 0.5).numel() == 0
    with pytest.raises(ValueError, match="sizes holds sides from 0 to 40000"):
        kernels.salient_masks(torch.zeros(1, 3, 3), torch.tensor([[0, 40000]]), 0.5)


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("side", [32, 224])
def test_compiled(launches, assemble, side, architecture):
    maps = torch.empty(40, 7, 7, device="meta")
    (launch,) = launches(kernels, "salient_masks", maps, torch.full((40, 2), side), 0.6)
    code = assemble(launch, architecture)
    assert code.stack == 0
    assert code.count(r"\b(LDL|STL|ATOM\w*|REDG?)\b") == 0
