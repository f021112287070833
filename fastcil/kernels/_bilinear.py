"""Where a pixel reads a small map that is upsampled bilinearly (align_corners=False)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(value: tl.tensor, by: tl.tensor) -> tl.tensor:
    """Rounded to nearest, which Triton's own division of float32 is not."""
    if value.dtype == tl.float64:
        return value / by
    else:
        return tl.div_rn(value, by)


@triton.jit
def taps(pixel: tl.tensor, positions: tl.tensor, scale: tl.tensor, DTYPE: tl.constexpr) -> tl.tuple:
    """The two positions between which each pixel lies, and the weight of the second.

    Those of ``torch.nn.functional.interpolate``; product and sum are rounded once.
    """
    source = tl.maximum(tl.fma(pixel.to(DTYPE) + 0.5, scale, -0.5), 0.0)
    first = tl.minimum(source.to(tl.int32), positions - 1)
    weight = tl.minimum(source - first.to(DTYPE), 1.0)
    return first, tl.minimum(first + 1, positions - 1), weight


@triton.jit
def first_pixel(
    position: tl.tensor,
    positions: tl.tensor,
    pixels: tl.tensor,
    scale: tl.tensor,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """The first pixel that lies at or behind a position of the map, ``pixels`` behind the last."""
    guess = tl.ceil((position.to(DTYPE) + 0.5) / scale - 0.5).to(tl.int32) - 1
    for _ in tl.static_range(2):
        guess += (taps(guess, positions, scale, DTYPE)[0] < position).to(tl.int32)
    return tl.where(position == 0, 0, tl.where(position >= positions, pixels, guess))


@triton.jit
def corner_pixel(
    index: tl.tensor, positions: tl.tensor, pixels: tl.tensor, scale: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """The first (even index) and the last pixel (odd) from each position of the map to the next.

    There are ``2 * positions`` of them; where no pixel lies, it is one from beside it.
    """
    last = index % 2
    pixel = first_pixel(index // 2 + last, positions, pixels, scale, DTYPE) - last
    return tl.minimum(tl.maximum(pixel, 0), pixels - 1)


@triton.jit
def blend(first: tl.tensor, second: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """Between two values, in the numbers of csrc/bilinear.h, whatever the compiler would fuse."""
    return tl.fma(first, 1.0 - weight, second * weight)


@triton.jit
def across(
    row: tl.tensor, left: tl.tensor, right: tl.tensor, aside: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """A row of the map, interpolated between positions in it."""
    return blend(tl.load(row + left).to(DTYPE), tl.load(row + right).to(DTYPE), aside)


@triton.jit
def upsampled(
    map_: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    map_height: tl.tensor,
    map_width: tl.tensor,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """The map in rows y and columns x of the image, anywhere: [rows, columns]."""
    scale = divide(map_height.to(DTYPE), height.to(DTYPE))
    upper, lower, down = taps(y, map_height, scale, DTYPE)
    scale_ = divide(map_width.to(DTYPE), width.to(DTYPE))
    left, right, aside = taps(x, map_width, scale_, DTYPE)
    upper, lower, down = upper[:, None] * map_width, lower[:, None] * map_width, down[:, None]
    left, right, aside = left[None, :], right[None, :], aside[None, :]
    top = across(map_, upper + left, upper + right, aside, DTYPE)
    return blend(top, across(map_, lower + left, lower + right, aside, DTYPE), down)
