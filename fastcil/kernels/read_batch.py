"""Launcher of ``read_batch``: one kernel, or where there are programs of pixel operations two."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcil.kernels._launch import ACCESS_BYTES, launch, power_of_two_divisor
from fastcil.kernels._pixel_kernels import program_kernel
from fastcil.kernels.read import affine, read_into

_BLOCK = 2048  # samples, or pixels, that a program works on at once
_GROUP = 32  # pixels of a histogram that a warp counts at once
_WARPS = 16


def read_batch(
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
    operations: Tensor | None,
    amounts: Tensor | None,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """Launch ``fastcil::read_batch``: read, programs of pixel operations, normalisation.

    Values are not checked, because that would wait for the device. A number that is no
    operation's does nothing.

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
        operations: Numbers of `fastcil.ops.pixel_program.OPERATIONS`.  # int8 [B, K]
        amounts: Of the operations.  # float64 [B, K, 9]
        mean: Of the channels.
        std: Of the channels.
        dtype: Of the result; uint8 is not normalised.

    Returns:
        The batch, in channels_last memory.  # [B, 3, h, w]
    """
    batch, device = len(geometry), geometry.device
    out = torch.empty(
        (batch, 3, height, width), dtype=dtype, device=device, memory_format=torch.channels_last
    )
    given = arenas, arena, offsets, geometry, crops, flips, views, antialias
    if operations is None or amounts is None or not operations.numel():
        read_into(out, *given, mean, std)
        return out
    buffers = torch.empty((2, batch, height, width, 3), dtype=torch.uint8, device=device)
    read_into(buffers[0].permute(0, 3, 1, 2), *given, mean, std)
    samples = 3 * height * width
    vec = power_of_two_divisor(samples, ACCESS_BYTES // out.element_size())
    launch(
        program_kernel,
        batch,
        out,
        buffers,
        torch.empty((batch, 3, 256), dtype=torch.uint8, device=device),
        operations.to(device, non_blocking=True).contiguous().view(torch.uint8),
        amounts.to(device, non_blocking=True).contiguous(),
        height,
        width,
        operations.shape[1],
        samples // vec,
        *affine(mean, std),
        VEC=vec,
        BLOCK=_BLOCK,
        WARPS=_WARPS,
        GROUP=_GROUP,
        LAST=32 * _WARPS * vec,
        num_warps=_WARPS,
        enable_fp_fusion=False,  # a product and a sum are rounded apart, as on the CPU
    )
    return out
