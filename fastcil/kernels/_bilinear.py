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
def across(
    row: tl.tensor, left: tl.tensor, right: tl.tensor, aside: tl.tensor, DTYPE: tl.constexpr
) -> tl.tensor:
    """A row of the map, interpolated between positions in it."""
    first = tl.load(row + left).to(DTYPE)
    second = tl.load(row + right).to(DTYPE)
    return first * (1.0 - aside) + second * aside
