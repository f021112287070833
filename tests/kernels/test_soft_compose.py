from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

kernels = pytest.importorskip("fastcil.kernels.soft_compose", reason="triton is not installed")

ULP = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def naive(images, cam, ratio):
    """Luo et al. 2023, Eq. S1c, pixel by pixel where the cells are concerned."""
    shown = []
    for side in images.shape[2:]:
        cells = max(1, math.floor(side / math.sqrt(ratio)))
        shown.append(torch.tensor([i * cells // side * side // cells for i in range(side)]))
    coarse = images[:, :, shown[0]][:, :, :, shown[1]]
    mask = functional.interpolate(cam[:, None], images.shape[2:], mode="bilinear")
    return mask * images + (1 - mask) * coarse


def compare(images, cam, ratio, gradient):
    wide = [t.detach().double().requires_grad_() for t in (images, cam)]
    expected = naive(*wide, ratio)
    expected = (expected.detach(), *torch.autograd.grad(expected, wide, gradient.double()))
    composed = kernels.soft_compose(images, cam, ratio)
    found = (composed, *kernels.soft_compose_backward(gradient, images, cam, ratio))
    for one, like, other in zip(found, (images, images, cam), expected, strict=True):
        assert (one.dtype, one.shape) == (like.dtype, like.shape)
        assert one.stride() == torch.empty_like(like).stride()
        bound = ULP[one.dtype] * other.abs() + 2e-6 * other.abs().max() + 1e-30
        bound = bound if one.dtype != torch.float64 else 1e-12 * (other.abs().max() + 1e-30)
        assert bool(((one.double() - other).abs() <= bound).all())


def draw(shape, positions, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(shape, generator=generator).to(dtype)
    gradient = torch.randn(shape, generator=generator).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    cam = torch.rand(shape[0], *positions, generator=generator).to(wide)
    return images, cam, gradient


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("shape", "positions", "ratio", "memory_format"),
    [
        ((1, 3, 15, 22), (2, 5), 4.0, torch.contiguous_format),
        ((2, 3, 15, 9), (2, 5), 4.0, torch.channels_last),
        ((1, 2, 16, 16), (4, 4), 4.0, torch.contiguous_format),
        ((2, 3, 17, 9), (1, 1), 2.5, torch.contiguous_format),
        ((1, 2, 9, 11), (3, 2), 9.0, torch.channels_last),
        ((1, 2, 6, 5), (2, 3), 1.0, torch.contiguous_format),
        ((1, 1, 5, 4), (8, 9), 4.0, torch.contiguous_format),
        ((1, 1, 7, 6), (2, 2), 1e4, torch.contiguous_format),
    ],
    ids=str,
)
def test_value_and_gradients(shape, positions, ratio, memory_format):
    images, cam, gradient = draw(shape, positions)
    compare(images.to(memory_format=memory_format), cam, ratio, gradient)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_types_compute_in_float32(dtype):
    images, cam, gradient = draw((1, 2, 10, 16), (1, 3), dtype)
    compare(images, cam, 4.0, gradient)
    compare(images, cam.to(dtype), 4.0, gradient)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((1, 1, 12, 20), torch.contiguous_format), ((1, 3, 13, 7), torch.channels_last)],
    ids=str,
)
def test_blocks_that_end_within_a_cell_or_a_pixel(shape, memory_format, monkeypatch):
    monkeypatch.setattr(kernels, "_COLUMNS", 16)
    monkeypatch.setattr(kernels, "_TILE", 64)
    images, cam, gradient = draw(shape, (2, 5))
    compare(images.to(memory_format=memory_format), cam, 4.0, gradient)


@pytest.mark.usefixtures("interpreted")
def test_any_strides():
    images, cam, gradient = draw((2, 6, 10, 2), (1, 4))
    images, gradient = images.permute(0, 3, 1, 2), gradient.permute(0, 3, 2, 1).mT
    cam = torch.stack([cam, cam], -1)[..., 0]
    compare(images, cam, 4.0, gradient)
    compare(images.transpose(0, 1), cam, 4.0, gradient.transpose(0, 1))
    compare(images[:1].expand(2, -1, -1, -1), cam, 4.0, gradient[:1].expand(2, -1, -1, -1))


@pytest.mark.usefixtures("interpreted")
def test_indices_of_64_bits(monkeypatch):
    monkeypatch.setattr(kernels, "_COLUMNS", 2**16)
    monkeypatch.setattr(kernels, "_TILE", 2**16)
    images, cam, _ = draw((1, 1, 1, 46342), (1, 2), torch.float32)
    composed = kernels.soft_compose(images, cam, 1.1)
    expected = naive(images.double(), cam.double(), 1.1)
    torch.testing.assert_close(composed.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_nothing(shape):
    images, cam = torch.zeros(shape), torch.zeros(shape[0], 2, 2)
    assert kernels.soft_compose(images, cam, 4.0).shape == shape
    grads = kernels.soft_compose_backward(images, images, cam, 4.0)
    assert [grad.shape for grad in grads] == [images.shape, cam.shape]
    assert not grads[1].any()
