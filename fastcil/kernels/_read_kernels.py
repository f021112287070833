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
def _whole(value: tl.tensor) -> tl.tensor:
    """The nearest whole number, ties to even, of a float64 from 0 to 2^51."""
    return ((value + 4503599627370496.0) - 4503599627370496.0).to(tl.int32)


@triton.jit
def _add_weight(total: tl.tensor, k: tl.tensor, filters: tl.tuple) -> tl.tensor:
    """A sum of weights with tap k's, which is zero at pixels that the crop does not cover."""
    centre, first, width, low, high = filters
    source = first + k
    weight = tl.maximum(1.0 - tl.abs(source + 0.5 - centre) / width, 0.0)
    return total + tl.where((source >= low) & (source < high), weight, 0.0)


@triton.jit
def _fit(
    index: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    size: tl.tensor,
    side: tl.tensor,
    ANTIALIAS: tl.constexpr,
) -> tl.tuple:
    """What outputs along one axis are made of, before their taps are weighed.

    Returns:
        The filters; the factor from sums of weights to 14 bits; each one's first tap that meets
        the image and the sum of those before; and how many taps from there on may meet it.
    """
    index = tl.minimum(index, size - 1).to(tl.float64)
    cells = size.to(tl.float64)
    width = begin * 0.0 + 1.0
    if ANTIALIAS:
        width = tl.maximum((end - begin) / cells, 1.0)
    centre = (index + 0.5) * (end - begin) / cells + begin
    first = tl.floor(centre - width + 0.5)
    filters = (centre, first, width, tl.floor(begin), tl.ceil(end))
    taps = tl.ceil(2.0 * width).to(tl.int32)
    start = tl.maximum(-first, 0.0).to(tl.int32)
    stop = tl.minimum(side.to(tl.float64) - first, taps.to(tl.float64)).to(tl.int32)
    total = centre * 0.0
    skipped = total
    for k in range(0, taps):
        total = _add_weight(total, k, filters)
        skipped = tl.where(k < start, total, skipped)
    return filters, 16384.0 / total, start, skipped, tl.max(stop - start, 0)


@triton.jit
def _tap(
    k: tl.tensor, total: tl.tensor, filters: tl.tuple, factor: tl.tensor, side: tl.tensor
) -> tl.tuple:
    """Tap k after those that add up to a total: the new total, the weight, and the pixel."""
    now = _add_weight(total, k, filters)
    source = (filters[1] + k).to(tl.int32)
    weight = _whole(now * factor) - _whole(total * factor)
    weight = tl.where((source >= 0) & (source < side), weight, 0)
    return now, weight, tl.minimum(tl.maximum(source, 0), side - 1)


@triton.jit
def _levels(
    pixels: tl.tensor,
    room: tl.tensor,
    rows: tl.tuple,
    columns: tl.tuple,
    channel: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """What the image shows where rows and columns meet, int32."""
    crosses, box_row, grid_row, holed = rows
    x, within, in_grid, beyond = columns
    place = tl.where(
        crosses[:, None] & within[None, :],
        box_row[:, None] + x[None, :],
        grid_row[:, None] + in_grid[None, :] - tl.where(holed[:, None], beyond[None, :], 0),
    )
    byte = place.to(tl.uint32) * 3 + channel[None, :].to(tl.uint32)
    return tl.load(pixels + byte, mask=mask & (byte < room), other=0).to(tl.int32)


@triton.jit
def _open_buffer(
    buffers: tl.tensor, count: tl.tensor, number: tl.tensor, offset: tl.tensor
) -> tl.tuple:
    """Where an image begins, and how many bytes there are from there on; 0 if it is nowhere."""
    known = (number >= 0) & (number < count)
    number = tl.where(known, number, 0)
    pixels = tl.load(buffers + 2 * number).to(tl.pointer_type(tl.uint8))
    room = tl.load(buffers + 2 * number + 1) - offset
    room = tl.where(known & (offset >= 0) & (room > 0), room, 0)
    # No image has more bytes than uint32 can count.
    return pixels + tl.where(room > 0, offset, 0), tl.minimum(room, 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def store_samples(
    target: tl.tensor,
    level: tl.tensor,
    channel: tl.tensor,
    mask: tl.tensor,
    scales: tl.tuple,
    shifts: tl.tuple,
) -> None:
    """Store levels, normalised in one multiply-add unless they are to stay bytes."""
    if target.dtype.element_ty == tl.uint8:
        tl.store(target, level.to(tl.uint8), mask=mask)
    else:
        scale = tl.where(channel == 0, scales[0], tl.where(channel == 1, scales[1], scales[2]))
        shift = tl.where(channel == 0, shifts[0], tl.where(channel == 1, shifts[1], shifts[2]))
        value = level.to(tl.float32)
        scale, shift = tl.broadcast_to(scale, value.shape), tl.broadcast_to(shift, value.shape)
        tl.store(target, tl.fma(value, scale, shift).to(target.dtype.element_ty), mask=mask)


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

    offset = tl.load(offsets + image)
    pixels, room = _open_buffer(buffers, count, tl.load(arena + image), offset)
    view = None if views is None else views + 6 * image
    rows, columns, box, grid, hole, simulated = open_image(geometry + 8 * image, view)
    top = tl.zeros([], tl.float64)
    left, bottom, right = top, rows.to(tl.float64), columns.to(tl.float64)
    if crops is not None:
        top = _limited(tl.load(crops + 4 * image), FARTHEST)
        left = _limited(tl.load(crops + 4 * image + 1), FARTHEST)
        bottom = _limited(tl.load(crops + 4 * image + 2), FARTHEST)
        right = _limited(tl.load(crops + 4 * image + 3), FARTHEST)
    column, channel = sample // 3, sample % 3
    if flips is not None:
        column = tl.where(tl.load(flips + image) != 0, width - 1 - column, column)
        column = tl.maximum(column, 0)
    y_filters, y_factor, y_start, y_skipped, y_taps = _fit(
        line, top, bottom, height, rows, ANTIALIAS
    )
    x_filters, x_factor, x_start, x_total, x_taps = _fit(
        column, left, right, width, columns, ANTIALIAS
    )

    pixel = tl.full([ROWS, COLUMNS], 1 << 20, tl.int32)
    for j in range(0, x_taps):
        x_total, x_weight, x = _tap(x_start + j, x_total, x_filters, x_factor, columns)
        within, in_grid, beyond = column_terms(x, columns, box, grid, hole, simulated)
        terms = (x, within, in_grid, beyond)
        wanted = (x_weight[None, :] > 0) & there
        blended = tl.full([ROWS, COLUMNS], 64, tl.int32)
        total = y_skipped
        for i in range(0, y_taps):
            total, y_weight, y = _tap(y_start + i, total, y_filters, y_factor, rows)
            row = row_terms(y, rows, columns, box, grid, hole, simulated)
            mask = (y_weight[:, None] > 0) & wanted
            blended += y_weight[:, None] * _levels(pixels, room, row, terms, channel, mask)
        pixel += x_weight[None, :] * (blended >> 7)
    at = image * height + line
    target = out + at[:, None] * (vectors * VEC) + sample[None, :]
    scales, shifts = (scale_0, scale_1, scale_2), (shift_0, shift_1, shift_2)
    store_samples(target, pixel >> 21, channel[None, :], there, scales, shifts)
