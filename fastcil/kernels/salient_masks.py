"""Masks of salient pixels: a program writes some rows of one image, and no enlarged map.

It finds the least and the greatest value of the enlarged map by itself, from the pixels at the
corners between positions of the map: at most four for each, or all pixels if these are fewer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcil.kernels._bilinear import corner_pixel, divide, upsampled
from fastcil.kernels._launch import check_sides, launch

ROUNDING = 2.0**-20  # that of fastcil.ops.salient_masks, which imports this folder
_BAND = 64  # rows of an image, of a program
_PIXELS = 1024  # worked on at once
_COLUMNS = 128  # of these, at most
_CORNERS = 16  # along each side, looked at at once
_WARPS = 4


@triton.jit
def _corners(
    first: tl.tensor, positions: tl.tensor, pixels: tl.tensor, COUNT: tl.constexpr
) -> tl.tensor:
    """Some of the pixels of a side at which the enlarged map may have its least value."""
    index = tl.minimum(first + tl.arange(0, COUNT), tl.minimum(2 * positions, pixels) - 1)
    scale = divide(positions.to(tl.float32), pixels.to(tl.float32))
    corner = corner_pixel(index, positions, pixels, scale, tl.float32)
    return tl.where(2 * positions < pixels, corner, index)


@triton.jit
def _bounds(
    map_: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    map_height: tl.tensor,
    map_width: tl.tensor,
    CORNERS: tl.constexpr,
) -> tl.tuple:
    """The least and the greatest value of the enlarged map, and whether one is not a number."""
    low = tl.full([CORNERS, CORNERS], float("inf"), tl.float32)
    high = tl.full([CORNERS, CORNERS], float("-inf"), tl.float32)
    odd = tl.zeros([CORNERS, CORNERS], tl.int32)
    for row in range(0, tl.minimum(2 * map_height, height), CORNERS):
        y = _corners(row, map_height, height, CORNERS)
        for column in range(0, tl.minimum(2 * map_width, width), CORNERS):
            x = _corners(column, map_width, width, CORNERS)
            value = upsampled(map_, y, x, height, width, map_height, map_width, tl.float32)
            low = tl.minimum(low, value)
            high = tl.maximum(high, value)
            # Minimum and maximum pass over NaN.
            odd |= (value != value).to(tl.int32)
    return tl.min(tl.min(low, 1), 0), tl.max(tl.max(high, 1), 0), tl.max(tl.max(odd, 1), 0) > 0


@triton.jit(
    do_not_specialize=["map_height", "map_width", "bands"],
    do_not_specialize_on_alignment=["masks", "maps"],
)
def _salient_masks_kernel(
    masks: tl.tensor,  # uint8 [sum of height * width]
    maps: tl.tensor,  # float32 [N, map_height, map_width]
    sizes: tl.tensor,  # int64 [N, 2]
    starts: tl.tensor,  # int64 [N]
    threshold: tl.tensor,
    map_height: tl.tensor,
    map_width: tl.tensor,
    bands: tl.tensor,
    ROUNDING: tl.constexpr,
    CORNERS: tl.constexpr,
    BAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    image = (program // bands).to(tl.int64)
    first = (program % bands) * BAND
    height = tl.load(sizes + 2 * image).to(tl.int32)
    width = tl.load(sizes + 2 * image + 1).to(tl.int32)
    if first < height:
        maps += image * map_height * map_width
        masks += tl.load(starts + image)
        low, high, odd = _bounds(maps, height, width, map_height, map_width, CORNERS)
        span = high - low
        rounding = ROUNDING * tl.maximum(tl.abs(low), tl.abs(high))
        silent = odd | (span <= rounding) | (span == float("inf")) | (span != span)
        bound = threshold * span
        for row in range(first, tl.minimum(first + BAND, height), ROWS):
            y = row + tl.arange(0, ROWS)
            for column in range(0, width, COLUMNS):
                x = column + tl.arange(0, COLUMNS)
                value = upsampled(maps, y, x, height, width, map_height, map_width, tl.float32)
                salient = (value - low > bound) | silent
                there = (y < height)[:, None] & (x < width)[None, :]
                tl.store(masks + y[:, None] * width + x[None, :], salient.to(tl.uint8), mask=there)


def salient_masks(maps: Tensor, sizes: Tensor, threshold: float) -> Tensor:
    """Launch ``fastcil::salient_masks``: which pixels of each image are salient.

    It waits for the device to learn how long the result is, if the sizes are there.

    Args:
        maps: float32 [N, h, w].
        sizes: (height, width) of each image, on any device.  # int64 [N, 2]
        threshold: What a pixel must exceed; at 0 all do.

    Returns:
        The masks one after the other.  # bool [sum of H W]

    Raises:
        FastcilError: If a side is not in 1 ... 32767.
    """
    if not len(maps):
        return maps.new_empty(0, dtype=torch.bool)
    areas = sizes.prod(1)
    facts = torch.stack([areas.sum(), sizes[:, 0].amax(), sizes[:, 1].amax(), sizes.amin()])
    total, height, width, least = facts.tolist()
    check_sides(least, max(height, width))
    if threshold == 0:
        return maps.new_ones(total, dtype=torch.bool)
    masks = maps.new_empty(total, dtype=torch.bool)
    starts = (areas.cumsum(0) - areas).to(maps.device)
    columns = min(triton.next_power_of_2(width), _COLUMNS)
    bands = triton.cdiv(height, _BAND)
    launch(
        _salient_masks_kernel,
        bands * len(maps),
        masks.view(torch.uint8),
        maps.contiguous(),
        sizes.to(maps.device).contiguous(),
        starts,
        float(threshold),
        maps.shape[1],
        maps.shape[2],
        bands,
        ROUNDING=ROUNDING,
        CORNERS=_CORNERS,
        BAND=_BAND,
        ROWS=_PIXELS // columns,
        COLUMNS=columns,
        num_warps=_WARPS,
    )
    return masks
