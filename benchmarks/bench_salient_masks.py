"""Masks of salient pixels: fastcil.ops.salient_masks beside the same in PyTorch's operations.

Maps [500, 7, 7] to images of 224 x 224, as of photographs, and [500, 4, 4] to 32 x 32, as of CIFAR.
"eager" is the definition, all images at once: enlarged, its least and greatest values found, scaled
and compared; "compiled" is that under torch.compile. "copy" only copies the masks.

A way is timed only after its masks have been compared with those of maps in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from op_case import OURS, OpCase, Step
from torch import Tensor
from torch.nn import functional

from fastcil import ops

THRESHOLD = 0.6


@dataclass(frozen=True)
class Form:
    images: int
    positions: int  # of a map, along a side
    side: int

    def __str__(self) -> str:
        shape = f"{self.images}x{self.positions}x{self.positions}"
        return f"{shape} to {self.side}x{self.side}"


@dataclass(frozen=True)
class Work:
    maps: Tensor  # [N, h, w]
    side: int


def make_work(form: Form, full: bool, device: torch.device | str = "cpu") -> Work:
    """Maps; a few of them, to small images, unless all are to be timed."""
    if not full:
        form = replace(form, images=3, side=20)
    shape = (form.images, form.positions, form.positions)
    maps = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return Work(maps.to(device), form.side)


def enlarged(maps: Tensor, side: int) -> Tensor:
    """Maps enlarged and scaled to [0, 1]: [N, side * side]."""
    large = functional.interpolate(maps[:, None], (side, side), mode="bilinear").flatten(1)
    low, high = large.amin(1, keepdim=True), large.amax(1, keepdim=True)
    return (large - low) / (high - low)


def eager(maps: Tensor, side: int) -> Tensor:
    return enlarged(maps, side).flatten() > THRESHOLD


def ours(maps: Tensor, side: int) -> Tensor:
    return ops.salient_masks(maps, (side, side), THRESHOLD)


def make_step(name: str, work: Work) -> Step:
    """A way to the masks, checked on some of them."""
    find = {OURS: ours, "eager": eager, "compiled": torch.compile(eager, dynamic=False)}[name]
    few = work.maps[:8]
    above = enlarged(few.double(), work.side).flatten() - THRESHOLD
    clear = above.abs() > 1e-5
    same = (find(few, work.side) == (above > 0)) | ~clear
    assert bool(same.all()), f"{name} marks other pixels"
    return partial(find, work.maps, work.side)


def make(form: Form, name: str, full: bool) -> Step:
    work = make_work(form, full)
    if name == "copy":
        return ours(work.maps, work.side).clone
    return make_step(name, work)


CASES = [
    OpCase(
        "salient_masks",
        str(form),
        (OURS, "copy", "eager", "compiled"),
        partial(make, form),
        aims={"eager": 10},
    )
    for form in (Form(500, 7, 224), Form(500, 4, 32))
]
