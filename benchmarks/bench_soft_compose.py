"""Soft composition, forward and backward, beside the same in PyTorch's operations.

Images [64, 3, 224, 224] and maps [64, 7, 7], contiguous and channels_last, float32 and bfloat16.
"eager" composes with index_select, interpolate and lerp under autograd; "compiled" is that under
torch.compile. "map only" needs no gradient by the images, as in CIM's mask-level step; "copies"
are as many clones as there are tensors of the images' size to read and write, in pairs.

A way is timed only after its results have been compared with float64's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from op_case import OURS, OpCase, Step
from torch import Tensor
from torch.nn import functional

from fastcil import ops

RATIO = 4.0


@dataclass(frozen=True)
class Form:
    """What is composed; the images are a leaf of autograd unless ``map_only``."""

    dtype: torch.dtype
    channels_last: bool
    map_only: bool

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{str(self.dtype)[6:]} {layout}{', map only' if self.map_only else ''}"


@dataclass(frozen=True)
class Work:
    images: Tensor
    cam: Tensor
    gradient: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in (self.images, self.cam) if tensor.requires_grad]


def make_work(form: Form, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Work:
    """The same numbers for each dtype, rounded to it."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    images, gradient = (
        torch.randn(shape, generator=generator).to(device, form.dtype, memory_format=layout)
        for _ in range(2)
    )
    cam = torch.rand((shape[0], 7, 7), generator=generator).to(device).requires_grad_()
    return Work(images.requires_grad_(not form.map_only), cam, gradient)


def in_double(work: Work) -> Work:
    images = work.images.detach().double().requires_grad_(work.images.requires_grad)
    return Work(images, work.cam.detach().double().requires_grad_(), work.gradient.double())


def shown(side: int, device: torch.device) -> Tensor:
    cells = max(1, math.floor(side / math.sqrt(RATIO)))
    return torch.arange(side, device=device) * cells // side * side // cells


def eager(images: Tensor, cam: Tensor) -> Tensor:
    height, width = images.shape[2:]
    rows, columns = (shown(side, images.device) for side in (height, width))
    downsampled = images.index_select(2, rows).index_select(3, columns)
    mask = functional.interpolate(cam[:, None], (height, width), mode="bilinear")
    return torch.lerp(images, downsampled, 1 - mask.to(images.dtype))


def ours(images: Tensor, cam: Tensor) -> Tensor:
    return ops.soft_compose(images, cam, RATIO)


def copies(work: Work) -> Step:
    """One for the composition, and one and a half for the gradient: g and x in, that by x out."""
    if work.images.requires_grad:
        return lambda: (work.images.clone(), work.gradient.clone(), work.gradient.sum())
    return lambda: (work.images.clone(), work.images.sum(), work.gradient.sum())


def make_step(name: str, work: Work) -> Step:
    if name == "copies":
        return copies(work)
    compose = {
        OURS: ours,
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
    }[name]

    def step() -> tuple[Tensor, ...]:
        composed = compose(work.images, work.cam)
        return composed, *torch.autograd.grad(composed, work.leaves, work.gradient)

    return step


def check(
    name: str, form: Form, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> None:
    """Compares a way's results with float64's on a few images."""
    work = make_work(form, (min(shape[0], 2), *shape[1:]), device)
    truth = make_step("eager", in_double(work))()
    allowed = 1e-5 if form.dtype == torch.float32 else 2e-2
    for got, exact in zip(make_step(name, work)(), truth, strict=True):
        gap = float((got - exact).detach().norm() / exact.detach().norm())
        assert gap < allowed, f"{name} computes something else: relative error {gap}"


def make(form: Form, name: str, full: bool) -> Step:
    """A way to compose and differentiate, checked."""
    shape = (64, 3, 224, 224) if full else (2, 3, 18, 20)
    if name != "copies":
        check(name, form, shape)
    return make_step(name, make_work(form, shape))


FORMS = [
    Form(dtype, channels_last, map_only)
    for map_only, dtype, channels_last in product(
        (False, True), (torch.float32, torch.bfloat16), (False, True)
    )
]
CASES = [
    OpCase(
        "soft_compose",
        f"forward and backward, 64x3x224x224, {form}",
        (OURS, "copies", "eager", "compiled"),
        partial(make, form),
        aims={"eager": 4},
    )
    for form in FORMS
]
