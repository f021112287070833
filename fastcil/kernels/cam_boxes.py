"""Boxes around the discriminative pixels: one program per image, nothing but its map in memory.

The program sums the map over the channels, scales it to [0, 1], and then tests the few pixels of
each line that can hold the maximum of the upsampled surface on it: between two neighbouring
positions of the map that surface is linear along a line, so these are the first and the last pixel
that fall between them. A program's threads pass the map on through memory, behind a barrier.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcil.kernels._bilinear import across, blend, corner_pixel, divide, taps
from fastcil.kernels._launch import (
    ACCESS_BYTES,
    LONGEST_SIDE,
    check_sides,
    dense,
    launch,
    power_of_two_divisor,
)

_WARPS = 8
_ELEMENTS = 8192  # of the features, loaded at once; half as many in float64
_POSITIONS = 1024  # of the map, scaled at once
_CANDIDATES = 16  # pixels of a line, tested at once
_LINES = 64  # tested at once

_SIZES = ["height", "width", "channels", "vectors", "rows", "columns"]


@triton.jit
def _sum_planes(
    sums: tl.tensor,
    features: tl.tensor,
    weights: tl.tensor,
    channels: tl.tensor,
    positions: tl.tensor,
    vectors: tl.tensor,
    FOLD: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """The weighted sum over channels of [channels, positions], FOLD interleaved parts of it.

    FOLD planes together are a whole number of 128-bit accesses long, as one alone may not be.
    """
    period = vectors * VEC  # FOLD * positions
    lines = channels // FOLD
    for start in range(0, period, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        part = column // positions
        total = tl.zeros([LANES, COLUMNS], DTYPE)
        for line in range(0, lines, ROWS):
            row = line + tl.arange(0, ROWS)
            mask = (row[:, None] < lines) & (column[None, :] < period)
            # An image may have more than 2^31 elements; a tile has not.
            tile = features + (row.to(tl.int64) * period)[:, None]
            value = tl.load(tile + column[None, :], mask=mask, other=0.0).to(DTYPE)
            if FOLD == 1:
                weight = tl.load(weights + row, mask=row < lines, other=0.0)[:, None]
            else:
                channel = row[:, None] * FOLD + part[None, :]
                weight = tl.load(weights + channel, mask=mask, other=0.0)
            # A thread has rows r, r + LANES, ... of the tile: it adds these up itself.
            product = tl.reshape(value * weight.to(DTYPE), [ROWS // LANES, LANES, COLUMNS])
            total += tl.sum(product, 0)
        tl.store(sums + column, tl.sum(total, 0), mask=column < period)


@triton.jit
def _sum_pixels(
    sums: tl.tensor,
    features: tl.tensor,
    weights: tl.tensor,
    positions: tl.tensor,
    vectors: tl.tensor,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """The same of [positions, channels]."""
    channels = vectors * VEC
    for start in range(0, positions, ROWS):
        row = start + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, COLUMNS // VEC], DTYPE)
        for first in range(0, channels, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = (row[:, None] < positions) & (column[None, :] < channels)
            pixel = features + (row.to(tl.int64) * channels)[:, None]
            value = tl.load(pixel + column[None, :], mask=mask, other=0.0).to(DTYPE)
            weight = tl.load(weights + column, mask=column < channels, other=0.0).to(DTYPE)
            product = tl.reshape(value * weight[None, :], [ROWS, COLUMNS // VEC, VEC])
            total += tl.sum(product, 2)
        tl.store(sums + row, tl.sum(total, 1), mask=row < positions)


@triton.jit
def _scale(
    scaled: tl.tensor,
    sums: tl.tensor,
    positions: tl.tensor,
    FOLD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDING: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """The map [positions] from its FOLD parts, scaled to [0, 1]; zeros if it is constant."""
    low = tl.full([BLOCK], float("inf"), DTYPE)
    high = tl.full([BLOCK], float("-inf"), DTYPE)
    odd = tl.zeros([BLOCK], tl.int32)
    for start in range(0, positions, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < positions
        value = tl.load(sums + at, mask=inside, other=0.0)
        for part in tl.static_range(1, FOLD):
            value += tl.load(sums + part * positions + at, mask=inside, other=0.0)
        low = tl.minimum(low, tl.where(inside, value, float("inf")))
        high = tl.maximum(high, tl.where(inside, value, float("-inf")))
        odd |= (value != value).to(tl.int32)
        tl.store(scaled + at, value, mask=inside)
    # What is read again below need not be read by the thread that wrote it.
    tl.debug_barrier()
    least = tl.min(low, 0)
    most = tl.max(high, 0)
    span = most - least
    constant = span <= ROUNDING * tl.maximum(tl.abs(most), tl.abs(least))
    # Minimum and maximum pass over NaN; one of them spoils the map, as it does in PyTorch.
    spoilt = tl.max(odd, 0) > 0
    for start in range(0, positions, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(scaled + at, mask=at < positions, other=0.0)
        value = divide(value - least, tl.where(constant, 1.0, span))
        value = tl.where(spoilt, float("nan"), tl.where(constant, 0.0, value))
        tl.store(scaled + at, value, mask=at < positions)


@triton.jit
def _span(
    scaled: tl.tensor,
    threshold: tl.tensor,
    lines: tl.tensor,  # of the image,
    line_positions: tl.tensor,  # of the map from line to line,
    line_step: tl.tensor,  # and how far apart in memory
    pixels: tl.tensor,  # the same along a line
    positions: tl.tensor,
    step: tl.tensor,
    LINES: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> tl.tuple:
    """First and last (exclusive) line with a pixel above the threshold; (0, 0) without any."""
    DTYPE: tl.constexpr = scaled.dtype.element_ty
    line_scale = divide(line_positions.to(tl.float32), tl.maximum(lines, 1).to(tl.float32))
    scale = divide(positions.to(tl.float32), tl.maximum(pixels, 1).to(tl.float32))
    start = tl.full([LINES], 0x7FFFFFFF, tl.int32)
    stop = tl.zeros([LINES], tl.int32)
    for at in range(0, lines, LINES):
        line = at + tl.arange(0, LINES)
        upper, lower, down = taps(line, line_positions, line_scale, tl.float32)
        upper = scaled + upper[:, None] * line_step
        lower = scaled + lower[:, None] * line_step
        down = down.to(DTYPE)[:, None]
        above = tl.zeros([LINES], tl.int32)
        for first in range(0, 2 * positions, CANDIDATES):
            index = tl.minimum(first + tl.arange(0, CANDIDATES), 2 * positions - 1)
            pixel = corner_pixel(index, positions, pixels, scale, tl.float32)
            left, right, aside = taps(pixel, positions, scale, tl.float32)
            left, right = left[None, :] * step, right[None, :] * step
            aside = aside.to(DTYPE)[None, :]
            top = across(upper, left, right, aside, DTYPE)
            low = across(lower, left, right, aside, DTYPE)
            above |= tl.max((blend(top, low, down) > threshold).to(tl.int32), 1)
        marked = (above > 0) & (line < lines)
        start = tl.minimum(start, tl.where(marked, line, 0x7FFFFFFF))
        stop = tl.maximum(stop, tl.where(marked, line + 1, 0))
    end = tl.max(stop, 0)
    return tl.where(end > 0, tl.min(start, 0), 0), end


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["weights", "sizes"])
def _cam_boxes_kernel(
    boxes: tl.tensor,  # int16 [B, 4]
    valid: tl.tensor,  # uint8 [B]
    scratch: tl.tensor,  # [B, FOLD + 1, height * width]
    features: tl.tensor,  # [B, channels, height, width], or channels last
    weights: tl.tensor,  # [B, channels]
    sizes: tl.tensor,  # int64 [B, 2], or None: (rows, columns) for all
    threshold: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    vectors: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    CHANNELS_LAST: tl.constexpr,
    FOLD: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    LONGEST: tl.constexpr,
    ROUNDING: tl.constexpr,
    LINES: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> None:
    DTYPE: tl.constexpr = scratch.dtype.element_ty
    image = tl.program_id(0).to(tl.int64)
    positions = height * width
    scratch += image * ((FOLD + 1) * positions)
    scaled = scratch + FOLD * positions
    weights += image * channels
    if CHANNELS_LAST:
        features += image * positions * vectors * VEC
        _sum_pixels(scratch, features, weights, positions, vectors, VEC, ROWS, COLUMNS, DTYPE)
    else:
        features += image * (channels // FOLD) * vectors * VEC
        _sum_planes(
            scratch,
            features,
            weights,
            channels,
            positions,
            vectors,
            FOLD,
            VEC,
            ROWS,
            COLUMNS,
            LANES,
            DTYPE,
        )
    tl.debug_barrier()
    _scale(scaled, scratch, positions, FOLD, BLOCK, ROUNDING, DTYPE)
    tl.debug_barrier()
    if sizes is not None:
        rows = tl.load(sizes + 2 * image)
        columns = tl.load(sizes + 2 * image + 1)
        # Checking them on the host would wait for the device; no such image has a box.
        fits = (rows > 0) & (columns > 0) & (rows <= LONGEST) & (columns <= LONGEST)
        rows = tl.where(fits, rows, 0).to(tl.int32)
        columns = tl.where(fits, columns, 0).to(tl.int32)
    y0, y1 = _span(scaled, threshold, rows, height, width, columns, width, 1, LINES, CANDIDATES)
    x0, x1 = _span(scaled, threshold, columns, width, 1, rows, height, width, LINES, CANDIDATES)
    boxes += 4 * image
    tl.store(boxes, y0.to(tl.int16))
    tl.store(boxes + 1, x0.to(tl.int16))
    tl.store(boxes + 2, y1.to(tl.int16))
    tl.store(boxes + 3, x1.to(tl.int16))
    tl.store(valid + image, ((y1 > y0) & (x1 > x0)).to(tl.uint8))


def _sizes(sizes: Tensor, device: torch.device) -> tuple[Tensor | None, int, int]:
    """Sizes on the device, or the one size of all images, which needs no copying there."""
    if sizes.device.type == "cpu" and (len(sizes) == 1 or sizes.stride(0) == 0):
        rows, columns = sizes[0].tolist()
        return None, rows, columns
    return sizes.to(device, torch.int64).contiguous(), 0, 0


def _elements(features: Tensor) -> int:
    return _ELEMENTS // 2 if features.dtype == torch.float64 else _ELEMENTS


def _plane_tiles(features: Tensor) -> dict[str, Any]:
    """How to load [B, channels, positions]."""
    channels, positions = features.shape[1], features.shape[2] * features.shape[3]
    vec = ACCESS_BYTES // features.element_size()
    fold = vec // power_of_two_divisor(positions, vec)
    if channels % fold:  # no whole number of accesses, however many planes go together
        vec, fold = power_of_two_divisor(positions, vec), 1
    columns = min(triton.next_power_of_2(fold * positions), 1024, _elements(features))
    rows = min(triton.next_power_of_2(channels // fold), _elements(features) // columns)
    lanes = min(rows, max(1, 32 * _WARPS * vec // columns))
    tiles = {"FOLD": fold, "VEC": vec, "ROWS": rows, "COLUMNS": columns, "LANES": lanes}
    return {"CHANNELS_LAST": False, "vectors": fold * positions // vec, **tiles}


def _pixel_tiles(features: Tensor) -> dict[str, Any]:
    """How to load [B, positions, channels]."""
    channels, positions = features.shape[1], features.shape[2] * features.shape[3]
    vec = power_of_two_divisor(channels, ACCESS_BYTES // features.element_size())
    columns = min(triton.next_power_of_2(channels), 128, _elements(features))
    rows = min(triton.next_power_of_2(positions), _elements(features) // columns)
    tiles = {"FOLD": 1, "VEC": vec, "ROWS": rows, "COLUMNS": columns, "LANES": 1}
    return {"CHANNELS_LAST": True, "vectors": channels // vec, **tiles}


def cam_boxes(
    features: Tensor, class_weights: Tensor, sizes: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Launch ``fastcil::cam_boxes``: the box around the pixels above the threshold.

    Args:
        features: Feature maps.  # [B, C, h, w]
        class_weights: The classifier's row for each image.  # [B, C]
        sizes: (height, width) of each image, on any device. What is on the GPU is not checked,
            because that would wait for it: an image with a side out of range has no box.
            # int64 [B, 2]
        threshold: What a pixel must exceed.

    Returns:
        Boxes with exclusive ends, and whether there is one.  # int16 [B, 4], bool [B]

    Raises:
        FastcilError: If ``sizes`` is on the CPU and a side is not in 1 ... 32767.
    """
    batch, channels, height, width = features.shape
    if sizes.device.type == "cpu" and batch:
        check_sides(int(sizes.amin()), int(sizes.amax()))
    boxes = features.new_empty((batch, 4), dtype=torch.int16)
    valid = features.new_empty((batch,), dtype=torch.bool)
    if not batch:
        return boxes, valid
    if not features.is_contiguous() and features.is_contiguous(memory_format=torch.channels_last):
        layout = _pixel_tiles(features)
    else:
        features = features.contiguous()
        layout = _plane_tiles(features)
    features = dense(features)
    dtype = torch.promote_types(features.dtype, torch.float32)
    fold, positions = layout["FOLD"], height * width
    on_device, rows, columns = _sizes(sizes, features.device)
    launch(
        _cam_boxes_kernel,
        batch,
        boxes,
        valid.view(torch.uint8),
        features.new_empty((batch, fold + 1, positions), dtype=dtype),
        features,
        class_weights.contiguous(),
        on_device,
        float(threshold),
        height,
        width,
        channels,
        layout.pop("vectors"),
        rows,
        columns,
        BLOCK=min(triton.next_power_of_2(positions), _POSITIONS),
        LONGEST=LONGEST_SIDE,
        ROUNDING=16 * torch.finfo(dtype).eps,
        LINES=_LINES,
        CANDIDATES=min(triton.next_power_of_2(2 * max(height, width)), _CANDIDATES),
        num_warps=_WARPS,
        **layout,
    )
    return boxes, valid
