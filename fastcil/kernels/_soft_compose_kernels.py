"""The kernels of soft compression and its gradient.

Images are planes of rows in memory, [planes, height, length]: of one channel each, or of all
channels of one image interleaved. Nothing of an image's size is stored but the results: the
upsampled map and the downsampled image are computed where they are needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcil.kernels._bilinear import across, blend, divide, first_pixel, taps, upsampled

_SIZES = ["planes", "height", "vectors", "channels", "map_height", "map_width", "cells", "cells_"]
_UNALIGNED = ["cam", "sums", "grad_cam"]
_jit = triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)

# Names that end with an underscore are about columns, their fellows without it about rows.


@triton.jit
def _shown(pixel: tl.tensor, cells: tl.tensor, side: tl.tensor) -> tl.tensor:
    """The pixel that each one shows after nearest down- and upsampling."""
    return pixel * cells // side * side // cells


@triton.jit
def _cell_from(pixel: tl.tensor, cells: tl.tensor, side: tl.tensor) -> tl.tensor:
    """The first cell that shows this pixel or a later one."""
    return (pixel * cells + side - 1) // side


@triton.jit
def _part(
    program: tl.tensor,
    height: tl.tensor,
    length: tl.tensor,
    map_height: tl.tensor,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tuple:
    """What a program works on: its plane, row of the map, first column, first and last row.

    The last is exclusive. All rows of an image that lie between two rows of the map are one
    program's: those two, interpolated across, are then the same for all of them.
    """
    blocks = tl.cdiv(length, COLUMNS)
    plane = program // blocks // map_height
    map_row = program // blocks % map_height
    scale = divide(map_height.to(DTYPE), height.to(DTYPE))
    start = first_pixel(map_row, map_height, height, scale, DTYPE)
    stop = first_pixel(map_row + 1, map_height, height, scale, DTYPE)
    return plane.to(tl.int64), map_row, program % blocks * COLUMNS, start, stop


@triton.jit
def _map_rows(
    cam: tl.tensor,
    map_row: tl.tensor,
    x: tl.tensor,
    width: tl.tensor,
    map_height: tl.tensor,
    map_width: tl.tensor,
    DTYPE: tl.constexpr,
) -> tl.tuple:
    """A row of the map and the next one, in columns x of the image: [columns] each."""
    scale = divide(map_width.to(DTYPE), width.to(DTYPE))
    left, right, aside = taps(x, map_width, scale, DTYPE)
    upper = cam + map_row * map_width
    lower = cam + tl.minimum(map_row + 1, map_height - 1) * map_width
    top = across(upper, left, right, aside, DTYPE)
    return top, across(lower, left, right, aside, DTYPE)


@triton.jit
def _weight_down(
    y: tl.tensor, height: tl.tensor, map_height: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """How far rows are from one row of the map to the next: [rows, 1]."""
    scale = divide(map_height.to(DTYPE), height.to(DTYPE))
    return taps(y, map_height, scale, DTYPE)[2][:, None]


@_jit
def compose_kernel(
    composed: tl.tensor,
    images: tl.tensor,
    cam: tl.tensor,  # [B, map_height, map_width]
    planes: tl.tensor,  # of an image
    height: tl.tensor,
    vectors: tl.tensor,
    channels: tl.tensor,  # of a plane
    map_height: tl.tensor,
    map_width: tl.tensor,
    cells: tl.tensor,
    cells_: tl.tensor,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
) -> None:
    length = vectors * VEC
    width = length // channels
    plane, map_row, column, start, stop = _part(
        tl.program_id(0), height, length, map_height, COLUMNS, DTYPE
    )
    cam += plane // planes * map_height * map_width
    images += plane * height * length
    composed += plane * height * length
    k = (column + tl.arange(0, COLUMNS)).to(INDEX)
    x = tl.minimum(k // channels, width - 1)
    shown_ = _shown(x, cells_, width) * channels + k % channels
    top, low = _map_rows(cam, map_row, x, width, map_height, map_width, DTYPE)
    for first in range(start, stop, ROWS):
        y = (first + tl.arange(0, ROWS)).to(INDEX)
        mask = (y < stop)[:, None] & (k < length)[None, :]
        down = _weight_down(y, height, map_height, DTYPE)
        weight = blend(top[None, :], low[None, :], down)
        own = y[:, None] * length + k[None, :]
        shown = _shown(y, cells, height)[:, None] * length + shown_[None, :]
        full = tl.load(images + own, mask=mask, other=0.0).to(DTYPE)
        coarse = tl.load(images + shown, mask=mask, other=0.0).to(DTYPE)
        value = full * weight + coarse * (1.0 - weight)
        tl.store(composed + own, value.to(composed.dtype.element_ty), mask=mask)


@_jit
def backward_kernel(
    grad_images: tl.tensor,
    sums: tl.tensor,  # [planes of all images, map_height, 2, length]
    gradient: tl.tensor,
    images: tl.tensor,
    cam: tl.tensor,  # [B, map_height, map_width]
    planes: tl.tensor,  # of an image
    height: tl.tensor,
    vectors: tl.tensor,
    channels: tl.tensor,  # of a plane
    map_height: tl.tensor,
    map_width: tl.tensor,
    cells: tl.tensor,
    cells_: tl.tensor,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CELLS: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
) -> None:
    length = vectors * VEC
    width = length // channels
    plane, map_row, column, start, stop = _part(
        tl.program_id(0), height, length, map_height, COLUMNS, DTYPE
    )
    cam += plane // planes * map_height * map_width
    grad_images += plane * height * length
    gradient += plane * height * length
    images += plane * height * length
    k = (column + tl.arange(0, COLUMNS)).to(INDEX)
    x = tl.minimum(k // channels, width - 1)
    shown_ = _shown(x, cells_, width) * channels + k % channels
    top, low = _map_rows(cam, map_row, x, width, map_height, map_width, DTYPE)
    to_top = tl.zeros([ROWS, COLUMNS], DTYPE)
    to_low = tl.zeros([ROWS, COLUMNS], DTYPE)
    for first in range(start, stop, ROWS):
        y = (first + tl.arange(0, ROWS)).to(INDEX)
        mask = (y < stop)[:, None] & (k < length)[None, :]
        down = _weight_down(y, height, map_height, DTYPE)
        weight = blend(top[None, :], low[None, :], down)
        own = y[:, None] * length + k[None, :]
        shown = _shown(y, cells, height)[:, None] * length + shown_[None, :]
        g = tl.load(gradient + own, mask=mask, other=0.0).to(DTYPE)
        full = tl.load(images + own, mask=mask, other=0.0).to(DTYPE)
        coarse = tl.load(images + shown, mask=mask, other=0.0).to(DTYPE)
        tl.store(grad_images + own, (g * weight).to(grad_images.dtype.element_ty), mask=mask)
        slope = g * (full - coarse)
        to_top += slope * (1.0 - down)
        to_low += slope * down
    sums += ((plane * map_height + map_row) * 2) * length
    tl.store(sums + k, tl.sum(to_top, 0), mask=k < length)
    tl.store(sums + length + k, tl.sum(to_low, 0), mask=k < length)
    # A pixel that others show gets from them too: written once more, with that.
    tl.debug_barrier()
    stop_ = tl.minimum(column + COLUMNS, length)
    first_cell = _cell_from(start.to(INDEX), cells, height)
    last_cell = _cell_from(stop.to(INDEX), cells, height)
    first_cell_ = _cell_from((column // channels).to(INDEX), cells_, width) * channels
    last_cell_ = _cell_from(((stop_ - 1) // channels + 1).to(INDEX), cells_, width) * channels
    for first in range(first_cell, last_cell, ROWS):
        for first_ in range(first_cell_, last_cell_, CELLS):
            _add_passed_on(
                grad_images,
                gradient,
                cam,
                (first + tl.arange(0, ROWS)).to(INDEX),
                (first_ + tl.arange(0, CELLS)).to(INDEX),
                last_cell,
                column,
                stop_,
                height,
                width,
                channels,
                map_height,
                map_width,
                cells,
                cells_,
                DTYPE,
            )


@triton.jit
def _add_passed_on(
    grad_images: tl.tensor,
    gradient: tl.tensor,
    cam: tl.tensor,
    cell: tl.tensor,
    cell_: tl.tensor,  # times the number of channels, plus the channel
    last_cell: tl.tensor,
    start_: tl.tensor,
    stop_: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    map_height: tl.tensor,
    map_width: tl.tensor,
    cells: tl.tensor,
    cells_: tl.tensor,
    DTYPE: tl.constexpr,
) -> None:
    """Write the gradients of the pixels that these cells hold, in columns start_ to stop_."""
    channel = cell_ % channels
    cell_ = cell_ // channels
    length = width * channels
    y = cell * height // cells
    x = cell_ * width // cells_
    k = x * channels + channel
    mask = (cell < last_cell)[:, None] & ((k >= start_) & (k < stop_))[None, :]
    own = y[:, None] * length + k[None, :]
    total = tl.load(gradient + own, mask=mask, other=0.0).to(DTYPE)
    total *= upsampled(cam, y, x, height, width, map_height, map_width, DTYPE)
    # The rows and columns of a cell's pixels: from the first to the other, exclusive.
    row = (cell * height + cells - 1) // cells
    row_stop = ((cell + 1) * height + cells - 1) // cells
    column = (cell_ * width + cells_ - 1) // cells_
    column_stop = ((cell_ + 1) * width + cells_ - 1) // cells_
    for i in range(tl.cdiv(height, cells)):
        for j in range(tl.cdiv(width, cells_)):
            there = mask & (row + i < row_stop)[:, None] & (column + j < column_stop)[None, :]
            at = (row + i)[:, None] * length + ((column + j) * channels + channel)[None, :]
            g = tl.load(gradient + at, mask=there, other=0.0).to(DTYPE)
            weight = upsampled(
                cam, row + i, column + j, height, width, map_height, map_width, DTYPE
            )
            total += g * (1.0 - weight)
    tl.store(grad_images + own, total.to(grad_images.dtype.element_ty), mask=mask)


@_jit
def collect_kernel(
    grad_cam: tl.tensor,  # [B, map_height, map_width]
    sums: tl.tensor,  # [B, planes, map_height, 2, length]
    planes: tl.tensor,
    vectors: tl.tensor,
    channels: tl.tensor,
    map_height: tl.tensor,
    map_width: tl.tensor,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    MAP_COLUMNS: tl.constexpr,
) -> None:
    DTYPE: tl.constexpr = sums.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    image = program // map_height
    map_row = program % map_height
    length = vectors * VEC
    last_length = tl.where(map_row == map_height - 1, length, 0)
    length_before = tl.where(map_row > 0, length, 0)
    scale = divide(map_width.to(DTYPE), (length // channels).to(DTYPE))
    for first_column in range(0, map_width, MAP_COLUMNS):
        map_column = first_column + tl.arange(0, MAP_COLUMNS)
        total = tl.zeros([BLOCK, MAP_COLUMNS], DTYPE)
        for start in range(0, length, BLOCK):
            k = start + tl.arange(0, BLOCK)
            left, right, aside = taps(k // channels, map_width, scale, DTYPE)
            value = tl.zeros([BLOCK], DTYPE)
            for plane in range(planes):
                row = sums + ((image * planes + plane) * map_height + map_row) * 2 * length + k
                value += tl.load(row, mask=k < length, other=0.0)
                # As the lower one of two: of itself where it is the last, else of the row before.
                value += tl.load(row + length, mask=k < last_length, other=0.0)
                value += tl.load(row - length, mask=k < length_before, other=0.0)
            share = tl.where(left[:, None] == map_column[None, :], 1.0 - aside[:, None], 0.0)
            share += tl.where(right[:, None] == map_column[None, :], aside[:, None], 0.0)
            total += value[:, None] * share
        value = tl.sum(total, 0).to(grad_cam.dtype.element_ty)
        tl.store(grad_cam + program * map_width + map_column, value, mask=map_column < map_width)
