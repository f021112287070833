"""The kernels of soft composition against the reference, in every layout, dtype and size."""

from __future__ import annotations

import pytest
import torch

from fastcil import ops
from fastcil.ops.soft_compose import _soft_compose, _soft_compose_backward

KERNEL = torch.ops.fastcil.soft_compose
BACKWARD = torch.ops.fastcil.soft_compose_backward
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Of the difference from float64's results, relative to the largest of these.
ROUNDING = dict(zip(DTYPES, (1e-12, 1e-5, 2.0**-7, 2.0**-9), strict=True))
# Size of image and map, eta.
CASES = {
    "even": ((32, 32), (7, 7), 4.0),
    "odd": ((33, 47), (5, 3), 4.0),
    "narrow": ((19, 1), (2, 4), 2.0),
    "flat": ((1, 41), (3, 2), 9.0),
    "all shown": ((9, 14), (4, 4), 1.0),
    "one cell": ((11, 13), (3, 3), 1e6),
    "map larger than the image": ((5, 6), (12, 9), 4.0),
    "one position": ((17, 18), (1, 1), 2.5),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def draw(case, dtype=torch.float32, channels=3, batch=2):
    size, positions, ratio = CASES[case]
    generator = torch.Generator().manual_seed(0)
    images, gradient = (
        torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    cam = torch.rand(batch, *positions, generator=generator, dtype=torch.float64)
    return images, cam.to(torch.promote_types(dtype, torch.float32)), gradient, ratio


def everything(images, cam, gradient, ratio):
    return KERNEL(images, cam, ratio), *BACKWARD(gradient, images, cam, ratio)


def exact(images, cam, gradient, ratio):
    images, cam, gradient = images.double(), cam.double(), gradient.double()
    composed = _soft_compose(images, cam, ratio)
    return composed, *_soft_compose_backward(gradient, images, cam, ratio)


def compare(arguments, dtype):
    images, cam, *_ = arguments
    found = everything(*arguments)
    for got, truth, like in zip(found, exact(*arguments), (images, images, cam), strict=True):
        assert (got.dtype, got.shape) == (like.dtype, like.shape)
        assert got.stride() == torch.empty_like(like).stride()
        rounding = ROUNDING[torch.promote_types(dtype, torch.float32) if like is cam else dtype]
        assert (got.double() - truth).abs().max() <= rounding * truth.abs().max()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case, dtype, layout, poison):
    images, *others = draw(case, dtype)
    with poison():
        compare((LAYOUTS[layout](images), *others), dtype)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_images", LAYOUTS)
def test_layouts(of_images, of_gradient, channels):
    images, cam, gradient, ratio = draw("odd", channels=channels)
    cam = cam.mT.contiguous().mT
    images, gradient = LAYOUTS[of_images](images), LAYOUTS[of_gradient](gradient)
    compare((images, cam, gradient, ratio), torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_number_of_threads_changes_no_bit(layout, threads):
    images, *others = draw("odd", batch=9)
    arguments = (LAYOUTS[layout](images), *others)
    with threads(1):
        once = everything(*arguments)
    for count in (1, 2, 3):
        with threads(count):
            for got, expected in zip(everything(*arguments), once, strict=True):
                assert torch.equal(got, expected)


def test_no_image_changes_another():
    images, cam, gradient, ratio = draw("even", batch=3)
    alone = everything(images[1:2], cam[1:2], gradient[1:2], ratio)
    images[0], gradient[2] = torch.nan, torch.inf
    for got, expected in zip(everything(images, cam, gradient, ratio), alone, strict=True):
        assert torch.equal(got[1:2], expected)


@pytest.mark.parametrize("map_only", [False, True])
def test_it_keeps_images_and_map_only(map_only):
    images, cam, _, ratio = draw("odd")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.soft_compose(images.requires_grad_(not map_only), cam.requires_grad_(), ratio)
    assert {tensor.shape for tensor in kept} == {images.shape, cam.shape} and len(kept) == 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_opcheck(layout):
    images, cam, gradient, ratio = draw("odd")
    images = LAYOUTS[layout](images)
    torch.library.opcheck(KERNEL, (images.requires_grad_(), cam.requires_grad_(), ratio))
    torch.library.opcheck(BACKWARD, (gradient, images.detach(), cam.detach(), ratio))
