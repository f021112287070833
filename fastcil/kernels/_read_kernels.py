"""The kernel that reads: a program makes a tile of rows and columns of one output image.

Nothing is kept between programs. For each column tap a program blends the rows that meet there,
rounds, and adds the result to its pixels: the integers of `fastcil.ops.read`, in its order. Taps
that lie beyond the image or the filter have no weight and are not loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcil.kernels._packed import column_terms, open_image, row_terms

_SIZES = ["count", "height", "width", "vectors", "row_blocks", "column_blocks"]
_SIZES += [f"{name}_{channel}" for name in ("scale", "shift") for channel in range(3)]


@triton.jit
def _limited(value: tl.tensor, FARTHEST: tl.constexpr) -> tl.tensor:
    return tl.minimum(tl.maximum(value.to(tl.float64), -FARTHEST), FARTHEST)


@triton.jit
def _weight(
    source: tl.tensor, centre: tl.tensor, width: tl.tensor, low: tl.tensor, high: tl.tensor
) -> tl.tensor:
    """The triangle filter at pixels, zero at those that the crop does not cover."""
    weight = tl.maximum(1.0 - tl.abs(source + 0.5 - centre) / width, 0.0)
    return tl.where((source >= low) & (source < high), weight, 0.0)


@triton.jit
def _whole(value: tl.tensor) -> tl.tensor:
    """The nearest whole number, ties to even, of a float64 from 0 to 2^51."""
    return ((value + 4503599627370496.0) - 4503599627370496.0).to(tl.int32)


@triton.jit
def fit(
    index: tl.tensor, begin: tl.tensor, end: tl.tensor, size: tl.tensor, ANTIALIAS: tl.constexpr
) -> tl.tuple:
    """What outputs along one axis are made of, before their taps are weighed.

    Returns:
        Each one's centre, first pixel and factor from sums of weights to 14 bits; and the filter's
        width, the pixels that the crop covers, and the number of taps.
    """
    step = tl.zeros([], tl.float64)
    width = step + 1.0
    if ANTIALIAS:
        width = tl.maximum((end - begin) / size, 1.0)
    centre = (index.to(tl.float64) + 0.5) * (end - begin) / size + begin
    first = tl.floor(centre - width + 0.5)
    low, high = tl.floor(begin), tl.ceil(end)
    taps = tl.ceil(2.0 * width).to(tl.int32)
    total = centre * 0.0
    for k in range(0, taps):
        total += _weight(first + k, centre, width, low, high)
    return centre, first, 16384.0 / total, width, low, high, taps


@triton.jit(
    do_not_specialize=_SIZES,
    do_not_specialize_on_alignment=["buffers", "offsets", "geometry", "crops", "flips", "views"],
)
def read_kernel(
    out: tl.tensor,  # [B, height, width, 3]
    buffers: tl.tensor,  # int64 [count, 2]: address and number of bytes
    arena: tl.tensor,  # int64 [B]
    offsets: tl.tensor,  # int64 [B]
    geometry: tl.tensor,  # int16 [B, 8]
    crops: tl.tensor,  # float32 [B, 4], or None
    flips: tl.tensor,  # uint8 [B], or None
    views: tl.tensor,  # int16 [B, 6], or None
    count: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    vectors: tl.tensor,  # of an output row
    row_blocks: tl.tensor,
    column_blocks: tl.tensor,
    scale_0: tl.tensor,
    scale_1: tl.tensor,
    scale_2: tl.tensor,
    shift_0: tl.tensor,
    shift_1: tl.tensor,
    shift_2: tl.tensor,
    ANTIALIAS: tl.constexpr,
    FARTHEST: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    image = (program // (row_blocks * column_blocks)).to(tl.int64)
    line = program // column_blocks % row_blocks * ROWS + tl.arange(0, ROWS)
    sample = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    there = (line[:, None] < height) & (sample[None, :] < vectors * VEC)

    number = tl.load(arena + image)
    known = (number >= 0) & (number < count)
    number = tl.where(known, number, 0)
    pixels = tl.load(buffers + 2 * number).to(tl.pointer_type(tl.uint8))
    offset = tl.load(offsets + image)
    room = tl.where(known & (offset >= 0), tl.load(buffers + 2 * number + 1) - offset, 0)
    pixels += tl.where(room > 0, offset, 0)
    room = tl.minimum(tl.maximum(room, 0), 0xFFFFFFFF).to(tl.uint32)
    view = None if views is None else views + 6 * image
    sides = open_image(geometry + 8 * image, view)
    source_height, source_width, box, grid, hole, simulated = sides
    top = tl.zeros([], tl.float64)
    left, bottom, right = top, source_height.to(tl.float64), source_width.to(tl.float64)
    if crops is not None:
        top = _limited(tl.load(crops + 4 * image), FARTHEST)
        left = _limited(tl.load(crops + 4 * image + 1), FARTHEST)
        bottom = _limited(tl.load(crops + 4 * image + 2), FARTHEST)
        right = _limited(tl.load(crops + 4 * image + 3), FARTHEST)
    column, channel = sample // 3, sample % 3
    if flips is not None:
        column = tl.where(tl.load(flips + image) != 0, width - 1 - column, column)
    y_centre, y_first, y_factor, y_width, y_low, y_high, y_taps = fit(
        line, top, bottom, height, ANTIALIAS
    )
    x_centre, x_first, x_factor, x_width, x_low, x_high, x_taps = fit(
        column, left, right, width, ANTIALIAS
    )

    pixel = tl.full([ROWS, COLUMNS], 1 << 20, tl.int32)
    x_total = x_centre * 0.0
    x_before = tl.zeros([COLUMNS], tl.int32)
    for j in range(0, x_taps):
        x_total += _weight(x_first + j, x_centre, x_width, x_low, x_high)
        x_now = _whole(x_total * x_factor)
        x = (x_first + j).to(tl.int32)
        x_weight = tl.where((x >= 0) & (x < source_width), x_now - x_before, 0)
        x_before = x_now
        x = tl.minimum(tl.maximum(x, 0), source_width - 1)
        within, in_grid, beyond = column_terms(x, source_width, box, grid, hole, simulated)
        blended = tl.full([ROWS, COLUMNS], 64, tl.int32)
        y_total = y_centre * 0.0
        y_before = tl.zeros([ROWS], tl.int32)
        for i in range(0, y_taps):
            y_total += _weight(y_first + i, y_centre, y_width, y_low, y_high)
            y_now = _whole(y_total * y_factor)
            y = (y_first + i).to(tl.int32)
            y_weight = tl.where((y >= 0) & (y < source_height), y_now - y_before, 0)
            y_before = y_now
            y = tl.minimum(tl.maximum(y, 0), source_height - 1)
            crosses, box_row, grid_row, holed = row_terms(
                y, source_height, source_width, box, grid, hole, simulated
            )
            place = tl.where(
                crosses[:, None] & within[None, :],
                box_row[:, None] + x[None, :],
                grid_row[:, None] + in_grid[None, :] - tl.where(holed[:, None], beyond[None, :], 0),
            )
            byte = place.to(tl.uint32) * 3 + channel[None, :].to(tl.uint32)
            meets = (y_weight[:, None] > 0) & (x_weight[None, :] > 0) & there
            level = tl.load(pixels + byte, mask=meets & (byte < room), other=0)
            blended += y_weight[:, None] * level.to(tl.int32)
        pixel += x_weight[None, :] * (blended >> 7)
    level = pixel >> 21
    at = image * height + line
    target = out + at[:, None] * (vectors * VEC) + sample[None, :]
    if out.dtype.element_ty == tl.uint8:
        tl.store(target, level.to(tl.uint8), mask=there)
    else:
        scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
        shift = tl.where(channel == 0, shift_0, tl.where(channel == 1, shift_1, shift_2))
        scale, shift = scale[None, :] + pixel * 0.0, shift[None, :] + pixel * 0.0
        value = tl.fma(level.to(tl.float32), scale, shift)
        tl.store(target, value.to(out.dtype.element_ty), mask=there)
