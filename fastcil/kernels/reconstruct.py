"""Unpacking images: the programs share each image's bytes, and write them one after the other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcil.kernels._launch import launch
from fastcil.kernels._packed import column_terms, open_image, row_terms

_BLOCK = 2048  # bytes of a program


@triton.jit(do_not_specialize=["room", "blocks"], do_not_specialize_on_alignment=["pixels"])
def _reconstruct_kernel(
    out: tl.tensor,
    starts: tl.tensor,  # int64 [N]
    pixels: tl.tensor,
    offsets: tl.tensor,  # int64 [N]
    geometry: tl.tensor,  # int16 [N, 8]
    room: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    first = (program % blocks) * BLOCK
    height, width, box, grid, hole, simulated = open_image(geometry + 8 * image, None)
    if first < 3 * height.to(tl.int64) * width:
        sample = first + tl.arange(0, BLOCK)
        pixel = (sample // 3).to(tl.int32)
        there = pixel < height * width
        y, x = pixel // width, pixel % width
        crosses, in_box, in_grid, holed = row_terms(y, height, width, box, grid, hole, simulated)
        within, column, beyond = column_terms(x, width, box, grid, hole, simulated)
        place = tl.where(
            crosses & within, in_box + x, in_grid + column - tl.where(holed, beyond, 0)
        )
        byte = tl.load(offsets + image) + place.to(tl.int64) * 3 + sample % 3
        value = tl.load(pixels + byte, mask=there & (byte >= 0) & (byte < room), other=0)
        tl.store(out + tl.load(starts + image) + sample, value, mask=there)


def unpack(
    out: Tensor, starts: Tensor, pixels: Tensor, offsets: Tensor, geometry: Tensor, largest: int
) -> None:
    """Write the raw images to ``out``, from ``starts`` on; the largest has so many bytes."""
    blocks = -(-largest // _BLOCK)
    launch(
        _reconstruct_kernel,
        blocks * len(geometry),
        out,
        starts,
        pixels.contiguous(),
        offsets.contiguous(),
        geometry.contiguous(),
        pixels.numel(),
        blocks,
        BLOCK=_BLOCK,
    )


def reconstruct(pixels: Tensor, offsets: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor]:
    """Launch ``fastcil::reconstruct``: the raw pixels that packed images show.

    It waits for the device to learn how long the result is. Rows are not checked: what one of them
    takes from outside ``pixels`` is 0.

    Args:
        pixels: Packed or raw images.  # uint8 [P]
        offsets: First byte of each image.  # int64 [N]
        geometry: Rows (H, W, y0, x0, y1, x1, gh, gw).  # int16 [N, 8]

    Returns:
        The raw images one after the other, and the first byte of each.  # uint8 [Q], int64 [N]
    """
    sides = geometry[:, :2].long().clamp(min=1)  # as the kernel takes them
    sizes = 3 * sides[:, 0] * sides[:, 1]
    ends = sizes.cumsum(0)
    if not len(sizes):
        return pixels.new_empty(0), ends
    total, largest = torch.stack([ends[-1], sizes.amax()]).tolist()
    out, starts = pixels.new_empty(total), ends - sizes
    unpack(out, starts, pixels, offsets, geometry, largest)
    return out, starts
