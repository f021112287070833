"""The kernel that takes images through their programs: `fastcil.ops.pixel_ops` for one image.

One program per image goes from step to step over the image's bytes, which stay in the L2 cache.
Operations on single pixels work in place; the others write to the image's second buffer, and the
two change places. Threads see what others wrote behind a barrier only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcil.kernels._read_kernels import store_samples

_SIZES = ["height", "width", "steps", "vectors"]
_SIZES += [f"{name}_{channel}" for name in ("scale", "shift") for channel in range(3)]


@triton.jit
def _load(image: tl.tensor, at: tl.tensor, there: tl.tensor) -> tl.tuple:
    """The three levels of pixels, int32."""
    red = tl.load(image + 3 * at, mask=there, other=0).to(tl.int32)
    green = tl.load(image + 3 * at + 1, mask=there, other=0).to(tl.int32)
    return red, green, tl.load(image + 3 * at + 2, mask=there, other=0).to(tl.int32)


@triton.jit
def _store(image: tl.tensor, at: tl.tensor, there: tl.tensor, levels: tl.tuple) -> None:
    for channel in tl.static_range(3):
        tl.store(image + 3 * at + channel, levels[channel].to(tl.uint8), mask=there)


@triton.jit
def _grey(levels: tl.tuple) -> tl.tensor:
    return (levels[0] * 19595 + levels[1] * 38470 + levels[2] * 7471 + 0x8000) >> 16


@triton.jit
def _blend(level: tl.tensor, base: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """Single precision, product and sum rounded apart."""
    ground = base.to(tl.float32)
    mixed = (level.to(tl.float32) - ground) * weight + ground
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _fixed(value: tl.tensor) -> tl.tensor:
    """Pillow's 16.16 fixed point."""
    return tl.floor(value * 65536.0 + 0.5).to(tl.int32)


@triton.jit
def _affine(
    source: tl.tensor,
    target: tl.tensor,
    amounts: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    a, b, c = tl.load(amounts), tl.load(amounts + 1), tl.load(amounts + 2)
    d, e, f = tl.load(amounts + 3), tl.load(amounts + 4), tl.load(amounts + 5)
    first_x, first_y = _fixed(c + a * 0.5 + b * 0.5), _fixed(f + d * 0.5 + e * 0.5)
    right_x, down_x, right_y, down_y = _fixed(a), _fixed(b), _fixed(d), _fixed(e)
    for start in range(0, height * width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < height * width
        line, column = at // width, at % width
        x = (first_x + line * down_x + column * right_x) >> 16
        y = (first_y + line * down_y + column * right_y) >> 16
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        place = tl.where(inside, y * width + x, 0)
        red, green, blue = _load(source, place, there & inside)
        red = tl.where(inside, red, tl.load(amounts + 6).to(tl.int32))
        green = tl.where(inside, green, tl.load(amounts + 7).to(tl.int32))
        blue = tl.where(inside, blue, tl.load(amounts + 8).to(tl.int32))
        _store(target, at, there, (red, green, blue))


@triton.jit
def _sharpness(
    source: tl.tensor,
    target: tl.tensor,
    weight: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    samples = 3 * height * width
    for start in range(0, samples, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < samples
        line, column = at // 3 // width, at // 3 % width
        inner = there & (line > 0) & (line < height - 1) & (column > 0) & (column < width - 1)
        level = tl.load(source + at, mask=there, other=0).to(tl.int32)
        total = 4 * level
        for y in tl.static_range(-1, 2):
            for x in tl.static_range(-1, 2):
                near = source + at + 3 * (y * width + x)
                total += tl.load(near, mask=inner, other=0).to(tl.int32)
        smooth = tl.where(inner, (2 * total + 13) // 26, level)
        tl.store(target + at, _blend(level, smooth, weight).to(tl.uint8), mask=there)


@triton.jit
def _look_up(image: tl.tensor, table: tl.tensor, area: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Replace levels by what the table, [3, 256], has for them."""
    for start in range(0, 3 * area, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < 3 * area
        level = tl.load(image + at, mask=there, other=0).to(tl.int32)
        tl.store(image + at, tl.load(table + at % 3 * 256 + level), mask=there)


@triton.jit
def _autocontrast(image: tl.tensor, table: tl.tensor, area: tl.tensor, BLOCK: tl.constexpr) -> None:
    levels = tl.arange(0, 256)
    for channel in tl.static_range(3):
        low, high = tl.full([BLOCK], 255, tl.int32), tl.zeros([BLOCK], tl.int32)
        for start in range(0, area, BLOCK):
            at = tl.minimum(start + tl.arange(0, BLOCK), area - 1)
            level = tl.load(image + 3 * at + channel).to(tl.int32)
            low, high = tl.minimum(low, level), tl.maximum(high, level)
        least, most = tl.min(low, 0), tl.max(high, 0)
        span = tl.maximum(most - least, 1).to(tl.float64)
        scale = 255.0 / span
        value = levels.to(tl.float64) * scale + -least.to(tl.float64) * scale
        value = tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)
        value = tl.where(most > least, value, levels)
        tl.store(table + channel * 256 + levels, value.to(tl.uint8))


@triton.jit
def _histogram(
    image: tl.tensor, channel: tl.tensor, area: tl.tensor, WARPS: tl.constexpr, GROUP: tl.constexpr
) -> tl.tensor:
    """How many pixels have each level of a channel, int32 [256].

    A matrix product counts pairs of a level's upper and lower half, for `tl.histogram` would add
    up the warps' counts by atomics.
    """
    halves = tl.arange(0, 16)
    counts = tl.zeros([WARPS, 16, 16], tl.int32)
    for start in range(0, area, WARPS * GROUP):
        at = start + tl.arange(0, WARPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        # What lies beyond the end has no upper half.
        level = tl.load(image + 3 * at + channel, mask=at < area, other=0).to(tl.int32)
        level = tl.where(at < area, level, 256)
        upper = ((level >> 4)[:, None, :] == halves[None, :, None]).to(tl.int8)
        lower = ((level & 15)[:, :, None] == halves[None, None, :]).to(tl.int8)
        counts = tl.dot(upper, lower, counts, out_dtype=tl.int32)
    return tl.reshape(tl.sum(counts, 0), [256])


@triton.jit
def _equalize(
    image: tl.tensor, table: tl.tensor, area: tl.tensor, WARPS: tl.constexpr, GROUP: tl.constexpr
) -> None:
    levels = tl.arange(0, 256)
    for channel in range(3):
        counts = _histogram(image, channel, area, WARPS, GROUP)
        below = tl.cumsum(counts, 0) - counts
        highest = tl.max(tl.where(counts > 0, levels, 0), 0)
        step = tl.sum(tl.where(levels == highest, below, 0), 0) // 255
        spread = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
        value = tl.where(step > 0, spread, levels)
        tl.store(table + channel * 256 + levels, value.to(tl.uint8))


@triton.jit
def _mean_grey(image: tl.tensor, area: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, area, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += _grey(_load(image, at, at < area))
    return ((2 * tl.sum(total, 0) + area) // (2 * area.to(tl.int64))).to(tl.int32)


@triton.jit
def _points(
    image: tl.tensor,
    operation: tl.tensor,
    amounts: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    mean: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The operations that look at one pixel at a time."""
    number = tl.load(amounts)
    weight = number.to(tl.float32)
    threshold = tl.ceil(number).to(tl.int32)
    bits = tl.minimum(tl.maximum(number, 0.0), 8.0).to(tl.int32)
    kept = 256 - (1 << (8 - bits))
    side = tl.load(amounts + 2).to(tl.int32)
    top = tl.load(amounts).to(tl.int32) - side // 2
    left = tl.load(amounts + 1).to(tl.int32) - side // 2
    for start in range(0, height * width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < height * width
        line, column = at // width - top, at % width - left
        covered = (line >= 0) & (line < side) & (column >= 0) & (column < side)
        levels = _load(image, at, there)
        grey = _grey(levels)
        for channel in tl.static_range(3):
            level = levels[channel]
            base = tl.where(operation == 9, grey, tl.where(operation == 8, mean, 0))
            value = _blend(level, base, weight)
            value = tl.where(operation == 4, 255 - level, value)
            inverted = tl.where(level >= threshold, 255 - level, level)
            value = tl.where(operation == 5, inverted, value)
            value = tl.where(operation == 6, level & kept, value)
            fill = tl.load(amounts + 6 + channel).to(tl.int32)
            value = tl.where(operation == 11, tl.where(covered, fill, level), value)
            tl.store(image + 3 * at + channel, value.to(tl.uint8), mask=there)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["operations", "amounts"])
def program_kernel(
    out: tl.tensor,  # [B, height, width, 3]
    buffers: tl.tensor,  # uint8 [2, B, height, width, 3], the images in the first
    tables: tl.tensor,  # uint8 [B, 3, 256]
    operations: tl.tensor,  # int8 as uint8 [B, steps]
    amounts: tl.tensor,  # float64 [B, steps, 9]
    height: tl.tensor,
    width: tl.tensor,
    steps: tl.tensor,
    vectors: tl.tensor,  # of an image
    scale_0: tl.tensor,
    scale_1: tl.tensor,
    scale_2: tl.tensor,
    shift_0: tl.tensor,
    shift_1: tl.tensor,
    shift_2: tl.tensor,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    GROUP: tl.constexpr,
    LAST: tl.constexpr,  # samples finished at once
) -> None:
    image = tl.program_id(0).to(tl.int64)
    samples, area = vectors * VEC, height * width
    there_and_back = tl.num_programs(0).to(tl.int64) * samples
    first = buffers + image * samples
    table = tables + image * 768
    turn = tl.zeros([], tl.int64)
    for step in range(0, steps):
        operation = tl.load(operations + image * steps + step).to(tl.int32)
        numbers = amounts + (image * steps + step) * 9
        source = first + turn * there_and_back
        target = first + (1 - turn) * there_and_back
        if operation == 1:
            _affine(source, target, numbers, height, width, BLOCK)
            turn = 1 - turn
        elif operation == 10:
            weight = tl.load(numbers).to(tl.float32)
            _sharpness(source, target, weight, height, width, BLOCK)
            turn = 1 - turn
        elif (operation == 2) | (operation == 3):
            if operation == 2:
                _autocontrast(source, table, area, BLOCK)
            else:
                _equalize(source, table, area, WARPS, GROUP)
            tl.debug_barrier()
            _look_up(source, table, area, BLOCK)
        elif (operation >= 4) & (operation <= 11):
            mean = operation * 0
            if operation == 8:
                mean = _mean_grey(source, area, BLOCK)
                tl.debug_barrier()
            _points(source, operation, numbers, height, width, mean, BLOCK)
        tl.debug_barrier()
    source = first + turn * there_and_back
    out += image * samples
    scales, shifts = (scale_0, scale_1, scale_2), (shift_0, shift_1, shift_2)
    for start in range(0, samples, LAST):
        at = start + tl.arange(0, LAST)
        there = at < samples
        level = tl.load(source + at, mask=there, other=0)
        store_samples(out + at, level, at % 3, there, scales, shifts)
