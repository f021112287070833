"""Launcher of ``read``, and what ``read_batch`` shares with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.kernels._launch import ACCESS_BYTES, launch, power_of_two_divisor
from fastcil.kernels._read_kernels import read_kernel

FARTHEST = 65536.0  # that of fastcil.ops.read, which imports this folder
_SAMPLES = 1024  # of a program
_COLUMNS = 256  # of them in a row, at most


def affine(mean: Sequence[float], std: Sequence[float]) -> list[float]:
    """The factors of three channels and then their terms: (v / 255 - mean) / std."""
    terms = [-middle / value for middle, value in zip(mean, std, strict=True)]
    return [1 / (255 * value) for value in std] + terms


def read_into(
    out: Tensor,
    arenas: list[Tensor],
    arena: Tensor,
    offsets: Tensor,
    geometry: Tensor,
    crops: Tensor | None,
    flips: Tensor | None,
    views: Tensor | None,
    antialias: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Read a batch into ``out``: bytes, or normalised in a floating type.

    Args:
        out: Channels last.  # [B, 3, h, w]
        arenas: As ``fastcil::read_batch`` takes them, like all that follows.
        arena: Which of them each image is in.
        offsets: First byte of each image.
        geometry: Rows (H, W, y0, x0, y1, x1, gh, gw).
        crops: Rows (y0, x0, y1, x1), or None.
        flips: Which images to mirror, or None.
        views: Compression to simulate, or None.
        antialias: Whether to widen the filter where an image shrinks.
        mean: Of the channels.
        std: Of the channels.

    Raises:
        FastcilError: If an arena is on another device.
    """
    batch, _, height, width = out.shape
    if not batch:
        return
    device = out.device
    for k, pixels in enumerate(arenas):
        if pixels.device != device:  # its address would mean nothing there
            raise FastcilError(f"arenas[{k}] is on {pixels.device}; it must be on {device}.")
    arenas = [pixels.contiguous() for pixels in arenas]
    where = [[pixels.data_ptr(), pixels.numel()] for pixels in arenas]
    vec = power_of_two_divisor(3 * width, ACCESS_BYTES // out.element_size())
    columns = min(triton.next_power_of_2(3 * width), _COLUMNS)
    rows = min(triton.next_power_of_2(height), max(1, _SAMPLES // columns))
    row_blocks, column_blocks = -(-height // rows), -(-3 * width // columns)

    def given(value: Tensor | None) -> Any:
        return None if value is None else value.to(device, non_blocking=True).contiguous()

    launch(
        read_kernel,
        batch * row_blocks * column_blocks,
        out,
        torch.tensor(where).to(device, non_blocking=True),
        given(arena),
        given(offsets),
        given(geometry),
        given(crops),
        None if flips is None else given(flips).view(torch.uint8),
        given(views),
        len(arenas),
        height,
        width,
        3 * width // vec,
        row_blocks,
        column_blocks,
        *affine(mean, std),
        ANTIALIAS=antialias,
        FARTHEST=FARTHEST,
        VEC=vec,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
        maxnreg=224,  # left to itself the assembler may aim at fewer and spill
        enable_fp_fusion=False,  # weights are rounded after each step, as on the CPU
    )


def read(
    arenas: list[Tensor],
    arena: Tensor,
    offsets: Tensor,
    geometry: Tensor,
    height: int,
    width: int,
    crops: Tensor | None,
    flips: Tensor | None,
    views: Tensor | None,
    antialias: bool,
) -> Tensor:
    """Launch ``fastcil::read``: crop, resize and flip images out of their packed form.

    Values are not checked, because that would wait for the device. Nothing outside the arenas is
    read whatever they are: what an image has there is zeros.

    Args:
        arenas: The pixel buffers.  # uint8 [P_k] each
        arena: Which of them each image is in.  # int64 [B]
        offsets: First byte of each image.  # int64 [B]
        geometry: Rows (H, W, y0, x0, y1, x1, gh, gw).  # int16 [B, 8]
        height: Of the result.
        width: Of the result.
        crops: Rows (y0, x0, y1, x1); None: whole images.  # float32 [B, 4]
        flips: Which images to mirror.  # bool [B]
        views: Compression to simulate on raw images.  # int16 [B, 6]
        antialias: Whether to widen the filter where an image shrinks.

    Returns:
        The images, in channels_last memory.  # uint8 [B, 3, h, w]
    """
    out = torch.empty(
        (len(geometry), 3, height, width),
        dtype=torch.uint8,
        device=geometry.device,
        memory_format=torch.channels_last,
    )
    # Bytes stay bytes, whatever their mean and standard deviation.
    given = arenas, arena, offsets, geometry, crops, flips, views, antialias
    read_into(out, *given, [0.0] * 3, [1.0] * 3)
    return out
