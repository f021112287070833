"""Launchers of soft compression and its gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcil.kernels._launch import (
    ACCESS_BYTES,
    arranged,
    beside,
    dense,
    launch,
    power_of_two_divisor,
)
from fastcil.kernels._soft_compose_kernels import backward_kernel, collect_kernel, compose_kernel

_TILE = 1024  # elements worked on at once; half as many in float64
_COLUMNS = 256  # of a row, at most


class _Plan(NamedTuple):
    """Images as planes of rows."""

    tensor: Tensor
    planes: int  # of an image
    height: int
    length: int
    channels: int  # of a plane
    cell_rows: int
    cell_columns: int
    constants: dict[str, Any]

    @property
    def vectors(self) -> int:
        """128-bit accesses of a row, if it is a whole number of them."""
        return self.length // int(self.constants["VEC"])

    def programs(self, cam: Tensor) -> int:
        blocks = -(-self.length // int(self.constants["COLUMNS"]))
        return len(self.tensor) * self.planes * cam.shape[1] * blocks

    def sizes(self, cam: Tensor) -> tuple[int, ...]:
        """What the kernels take, in their order."""
        of_map = cam.shape[1], cam.shape[2]
        of_images = self.planes, self.height, self.vectors, self.channels
        return *of_images, *of_map, self.cell_rows, self.cell_columns


def _as_planes(images: Tensor, ratio: float) -> _Plan:
    channels, height, width = images.shape[1:]
    last = images.is_contiguous(memory_format=torch.channels_last)
    if last and not images.is_contiguous():
        planes, interleaved = 1, channels
    else:
        images, planes, interleaved = images.contiguous(), channels, 1
    length = width * interleaved
    double = images.dtype == torch.float64
    columns = min(triton.next_power_of_2(length), _COLUMNS)
    # A pixel's number times that of the cells must fit the type of indices, and so must a place in
    # a plane.
    wide = max(height, width, length) ** 2 >= 2**31 or height * length >= 2**31
    constants = {
        "VEC": power_of_two_divisor(length, ACCESS_BYTES // images.element_size()),
        "ROWS": (_TILE // 2 if double else _TILE) // columns,
        "COLUMNS": columns,
        "DTYPE": tl.float64 if double else tl.float32,
        "INDEX": tl.int64 if wide else tl.int32,
    }
    rows, columns = (max(1, math.floor(side / math.sqrt(ratio))) for side in (height, width))
    return _Plan(dense(images), planes, height, length, interleaved, rows, columns, constants)


def soft_compose(images: Tensor, cam: Tensor, ratio: float) -> Tensor:
    """Launch ``fastcil::soft_compose``: M x + (1 - M) x_eta.

    Args:
        images: x, floating point.  # [B, C, H, W]
        cam: The map that, upsampled, is M.  # [B, h, w]
        ratio: eta.

    Returns:
        The composed images, with the dtype of ``images`` and the strides of
        ``torch.empty_like(images)``.
    """
    if not images.numel():
        return torch.empty_like(images)
    plan = _as_planes(images, ratio)
    composed = torch.empty_like(plan.tensor)
    launch(
        compose_kernel,
        plan.programs(cam),
        composed,
        plan.tensor,
        cam.contiguous(),
        *plan.sizes(cam),
        **plan.constants,
    )
    return arranged(composed, images)


def soft_compose_backward(
    gradient: Tensor, images: Tensor, cam: Tensor, ratio: float
) -> tuple[Tensor, Tensor]:
    """Launch ``fastcil::soft_compose_backward``: the gradients by images and map.

    Args:
        gradient: That by the composed images, of any strides.  # [B, C, H, W]
        images: As ``soft_compose`` took them.
        cam: As ``soft_compose`` took it.
        ratio: As ``soft_compose`` took it.

    Returns:
        Gradients with the shapes and dtypes of ``images`` and ``cam``, the same bits in every run.
    """
    if not images.numel():
        return torch.empty_like(images), torch.zeros_like(cam)
    plan = _as_planes(images, ratio)
    map_height, map_width = cam.shape[1:]
    grad_images = torch.empty_like(plan.tensor)
    grad_cam = torch.empty_like(cam, memory_format=torch.contiguous_format)
    sums = images.new_empty(
        (plan.planes * len(images), map_height, 2, plan.length),
        dtype=torch.promote_types(images.dtype, torch.float32),
    )
    launch(
        backward_kernel,
        plan.programs(cam),
        grad_images,
        sums,
        beside(gradient, plan.tensor),
        plan.tensor,
        cam.contiguous(),
        *plan.sizes(cam),
        # As many cells as lie under so many columns: more would be masked threads.
        CELLS=max(plan.constants["COLUMNS"] // 2, 1),
        # Left to itself the assembler aims at fewer in float64 and spills.
        maxnreg=128,
        **plan.constants,
    )
    launch(
        collect_kernel,
        len(cam) * map_height,
        grad_cam,
        sums,
        plan.planes,
        plan.vectors,
        plan.channels,
        map_height,
        map_width,
        VEC=plan.constants["VEC"],
        BLOCK=128,
        MAP_COLUMNS=min(triton.next_power_of_2(map_width), 8),
    )
    return arranged(grad_images, images), arranged(grad_cam, cam)
