"""Pillow's image operations over a whole batch, each image with its own magnitude.

Every function takes uint8 images [B, 3, H, W] on any device, in any memory format, and returns
new uint8 images [B, 3, H, W] in channels_last memory. A magnitude is a tensor [B]; nothing loops
over images and nothing waits for the device. An argument of another type or shape raises a
ValueError that names it. The results are Pillow's bit for bit, where products and sums are not
contracted (as in its x86-64 builds).

`fastcil.ops.pixel_program` strings them together; ``csrc/pixel_ops.h`` does the same in C++.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pixel_rows(images: Tensor) -> Tensor:
    """Checks a batch uint8 [B, 3, H, W] and gives it as [B, H, W, 3], contiguous.

    Args:
        images: uint8 [B, 3, H, W]; in channels_last memory nothing is copied.

    Example:
        >>> pixel_rows(torch.zeros(2, 3, 4, 5, dtype=torch.uint8)).shape
        torch.Size([2, 4, 5, 3])
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images is {kind}; pass a uint8 tensor [B, 3, H, W].")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(
            f"images has shape {list(images.shape)}; pass [B, 3, H, W] with H and W at least 1."
        )
    return images.permute(0, 2, 3, 1).contiguous()


def _images(pixels: Tensor) -> Tensor:
    """[B, H, W, 3] as [B, 3, H, W] in channels_last memory."""
    return pixels.permute(0, 3, 1, 2)


def _each(value: Tensor, name: str, pixels: Tensor) -> Tensor:
    """Checks a magnitude [B] and brings it to the images' device."""
    if not isinstance(value, Tensor) or value.shape != pixels.shape[:1]:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {got}; pass a tensor [{pixels.shape[0]}], a value per image.")
    return value.to(pixels.device, non_blocking=True)


def _colours(fill: Tensor, pixels: Tensor) -> Tensor:
    """Checks fill colours and brings them to the images' device, uint8 [B, 3]."""
    wanted = (len(pixels), 3)
    if not isinstance(fill, Tensor) or fill.dtype != torch.uint8 or fill.shape != wanted:
        kind = f"{fill.dtype} {list(fill.shape)}" if isinstance(fill, Tensor) else repr(fill)
        raise ValueError(f"fill is {kind}; pass a uint8 tensor [{len(pixels)}, 3].")
    return fill.to(pixels.device, non_blocking=True)


def _plane_index(pixels: Tensor) -> Tensor:
    """Each value's place in tables [B, 3, 256] laid out flat, int32 [B * H * W * 3]."""
    count, height, width, _ = pixels.shape
    plane = torch.arange(0, count * 768, 256, dtype=torch.int32, device=pixels.device)
    plane = plane.view(count, 1, 3).repeat(1, 1, width)  # whole rows, so that adding them is fast
    return (pixels.view(count, height, width * 3) + plane).view(-1)


def _blend(pixels: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    """Takes base + factor * (pixels - base) in single precision, cut off to a byte."""
    weight = _each(factor, "factor", pixels).float()[:, None, None, None]
    # Cast first: torch's mixed-type arithmetic is twenty times slower on the CPU.
    return pixels.float().sub_(base).mul_(weight).add_(base).clamp_(0, 255).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """Pillow's "L": ITU-R 601-2 luma with 16-bit weights, rounded; int32 [B, H, W]."""
    red, green, blue = pixels.to(torch.int32).unbind(3)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def affine(images: Tensor, coefficients: Tensor, fill: Tensor) -> Tensor:
    """Shows at (x, y) what lies at (a x + b y + c, d x + e y + f): shears, shifts and turns.

    Pixel centres lie at halves, as in Pillow's `Image.transform(AFFINE, NEAREST)`.

    Args:
        images: uint8 [B, 3, H, W].
        coefficients: (a, b, c, d, e, f) for each image, [B, 6].
        fill: Colours of what lies outside the images, uint8 [B, 3].

    Example:
        >>> images, grey = torch.zeros(1, 3, 1, 3).byte(), torch.full((1, 3), 128).byte()
        >>> affine(images, torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0, 0.0]]), grey)[0, 0, 0]
        tensor([  0,   0, 128], dtype=torch.uint8)
    """
    pixels = pixel_rows(images)
    count, height, width, _ = pixels.shape
    if not isinstance(coefficients, Tensor) or coefficients.shape != (count, 6):
        kind = list(coefficients.shape) if isinstance(coefficients, Tensor) else coefficients
        raise ValueError(f"coefficients is {kind}; pass a tensor [{count}, 6].")
    a, b, c, d, e, f = coefficients.to(pixels.device, non_blocking=True).double().unbind(1)
    columns = torch.arange(width, dtype=torch.int32, device=pixels.device)
    lines = torch.arange(height, dtype=torch.int32, device=pixels.device)

    def fixed(value: Tensor) -> Tensor:
        # Pillow walks through the source in 16.16 fixed point.
        return (value * 65536.0 + 0.5).floor().to(torch.int32)[:, None]

    def source(by_column: Tensor, by_line: Tensor, shift: Tensor) -> Tensor:
        start = fixed(shift + by_column * 0.5 + by_line * 0.5)
        down, across = start + lines * fixed(by_line), columns * fixed(by_column)
        return (down[:, :, None] + across[:, None, :]) >> 16  # [B, H, W]

    x, y = source(a, b, c), source(d, e, f)
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    number = torch.arange(count, dtype=torch.int32, device=pixels.device)[:, None, None]
    index = y.mul_(width).add_(x).add_(number * (height * width))
    # The fill colours are more source pixels, behind all others.
    index = torch.where(outside, count * height * width + number, index).view(-1)
    palette = torch.cat([pixels.view(-1, 3), _colours(fill, pixels)])
    return _images(palette.index_select(0, index).view_as(pixels))


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """Coefficients of a turn counter-clockwise about the centre: Pillow's `rotate(degrees)`.

    Args:
        degrees: Angle, [...].
        height: Height of the image.
        width: Width of the image.

    Returns:
        float64 [..., 6], for `affine`.

    Example:
        >>> rotation(torch.tensor(0.0), 4, 6).tolist()
        [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    """
    angle = degrees.double().remainder(360.0) * (math.pi / 180.0)
    cosine, sine = angle.cos(), angle.sin()
    y, x = height / 2, width / 2
    right = x - cosine * x + sine * y
    below = y - sine * x - cosine * y
    return torch.stack([cosine, 0.0 - sine, right, sine, cosine, below], -1)


def autocontrast(images: Tensor) -> Tensor:
    """Stretches each channel from [low, high] to [0, 255]: Pillow's `ImageOps.autocontrast`.

    v becomes trunc(v * s - low * s) with s = 255 / (high - low); a flat channel stays.

    Args:
        images: uint8 [B, 3, H, W].

    Example:
        >>> row = torch.tensor([51, 68, 102], dtype=torch.uint8).expand(1, 3, 1, 3)
        >>> autocontrast(row)[0, 0, 0]
        tensor([  0,  85, 255], dtype=torch.uint8)
    """
    pixels = pixel_rows(images)
    low, high = (bound.double()[..., None] for bound in pixels.flatten(1, 2).aminmax(dim=1))
    # A tensor over a tensor: 255.0 / tensor would be a reciprocal and a product, rounded twice.
    scale = torch.where(high > low, torch.full_like(high, 255.0) / (high - low), 1.0)  # [B, 3, 1]
    offset = torch.where(high > low, -low * scale, 0.0)
    levels = torch.arange(256, dtype=torch.float64, device=pixels.device)
    table = (levels * scale + offset).clamp_(0, 255).to(torch.uint8)  # [B, 3, 256]
    return _images(table.view(-1).index_select(0, _plane_index(pixels)).view_as(pixels))


def equalize(images: Tensor) -> Tensor:
    """Spreads each channel's histogram h evenly: Pillow's `ImageOps.equalize`.

    v becomes (step // 2 + sum of h below v) // step with step = (H W - h[highest]) // 255; a
    channel with step 0 stays.

    Args:
        images: uint8 [B, 3, H, W].

    Example:
        >>> ramp = torch.arange(0, 128, dtype=torch.uint8).repeat(3, 8, 1)[None]
        >>> equalize(ramp)[0, 0, 0, :4]
        tensor([0, 3, 5, 8], dtype=torch.uint8)
    """
    pixels = pixel_rows(images)
    index, count = _plane_index(pixels), pixels.shape[0]
    one = torch.ones(1, dtype=torch.int32, device=pixels.device).expand(index.shape)
    bins = torch.zeros(count * 768, dtype=torch.int32, device=pixels.device)
    histogram = bins.index_add_(0, index, one).view(count, 3, 256)
    below = histogram.cumsum(2, dtype=torch.int32).sub_(histogram)
    levels = torch.arange(256, dtype=torch.int32, device=pixels.device)
    highest = (levels * (histogram > 0)).amax(2, keepdim=True)  # [B, 3, 1]
    step = below.gather(2, highest.long()) // 255
    spread = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, spread, levels).to(torch.uint8)
    return _images(table.view(-1).index_select(0, index).view_as(pixels))


def invert(images: Tensor) -> Tensor:
    """Inverts: v becomes 255 - v. Pillow's `ImageOps.invert`.

    Args:
        images: uint8 [B, 3, H, W].

    Example:
        >>> invert(torch.full((1, 3, 1, 1), 55, dtype=torch.uint8)).flatten()
        tensor([200, 200, 200], dtype=torch.uint8)
    """
    return _images(pixel_rows(images).bitwise_not())


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts the values v >= threshold. Pillow's `ImageOps.solarize`.

    Args:
        images: uint8 [B, 3, H, W].
        threshold: Level from 0 (all inverted) to 256 (none), fractions allowed, [B].

    Example:
        >>> solarize(torch.full((1, 3, 1, 1), 55, dtype=torch.uint8), torch.ones(1)).flatten()
        tensor([200, 200, 200], dtype=torch.uint8)
    """
    pixels = pixel_rows(images)
    level = _each(threshold, "threshold", pixels).ceil().to(torch.int16)[:, None, None, None]
    flip = (pixels < level).to(torch.uint8).sub_(1)  # 0 keeps a value, 255 inverts it
    return _images(flip.bitwise_xor_(pixels))


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest bits of each value and clears the others. Pillow's `ImageOps.posterize`.

    Args:
        images: uint8 [B, 3, H, W].
        bits: How many to keep, whole numbers from 0 to 8, [B].

    Example:
        >>> posterize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), torch.ones(1)).flatten()
        tensor([128, 128, 128], dtype=torch.uint8)
    """
    pixels = pixel_rows(images)
    kept = 2.0 ** (8 - _each(bits, "bits", pixels).double())
    return _images(pixels & (256 - kept).to(torch.uint8)[:, None, None, None])


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with black: v becomes factor * v. Pillow's `ImageEnhance.Brightness`.

    Args:
        images: uint8 [B, 3, H, W].
        factor: Weight of the image, at least 0; 1 leaves it as it is; [B].

    Example:
        >>> brightness(torch.full((1, 3, 1, 1), 10, dtype=torch.uint8), torch.ones(1) / 2)[0, 0]
        tensor([[5]], dtype=torch.uint8)
    """
    pixels = pixel_rows(images)
    weight = _each(factor, "factor", pixels).float()[:, None, None, None]
    return _images(pixels.float().mul_(weight).clamp_(0, 255).to(torch.uint8))


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the image's mean grey m: v becomes m + factor * (v - m).

    Pillow's `ImageEnhance.Contrast`; m is rounded to a whole level.

    Args:
        images: uint8 [B, 3, H, W].
        factor: Weight of the image, at least 0; 1 leaves it as it is; [B].

    Example:
        >>> row = torch.tensor([50, 150], dtype=torch.uint8).expand(1, 3, 1, 2)
        >>> contrast(row, torch.full((1,), 0.5))[0, 0]
        tensor([[ 75, 125]], dtype=torch.uint8)
    """
    pixels = pixel_rows(images)
    area = pixels.shape[1] * pixels.shape[2]
    mean = (2 * _grey(pixels).sum((1, 2)) + area) // (2 * area)
    return _images(_blend(pixels, mean.float()[:, None, None, None], factor))


def colour(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the image in grey L: v becomes L + factor * (v - L), the saturation.

    Pillow's `ImageEnhance.Color`; L = 0.299 R + 0.587 G + 0.114 B (ITU-R 601-2), rounded.

    Args:
        images: uint8 [B, 3, H, W].
        factor: Weight of the image, at least 0; 1 leaves it as it is; [B].

    Example:
        >>> red = torch.tensor([200, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
        >>> colour(red, torch.zeros(1)).flatten()
        tensor([60, 60, 60], dtype=torch.uint8)
    """
    pixels = pixel_rows(images)
    return _images(_blend(pixels, _grey(pixels).float()[..., None], factor))


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the smoothed image s: v becomes s + factor * (v - s).

    Pillow's `ImageEnhance.Sharpness`; s weighs the pixel by 5/13 and its eight neighbours by 1/13,
    rounded, and is the pixel itself on the image's border.

    Args:
        images: uint8 [B, 3, H, W].
        factor: Weight of the image, at least 0; 1 leaves it as it is; [B].

    Example:
        >>> dot = torch.zeros(1, 3, 3, 3, dtype=torch.uint8)
        >>> dot[:, :, 1, 1] = 130
        >>> sharpness(dot, torch.zeros(1))[0, 0, 1]
        tensor([ 0, 50,  0], dtype=torch.uint8)
    """
    pixels = pixel_rows(images)
    level = pixels.float()
    column = level[:, :-2] + level[:, 1:-1] + level[:, 2:]
    block = column[:, :, :-2] + column[:, :, 1:-1] + column[:, :, 2:]
    smooth, inner = level.clone(), level[:, 1:-1, 1:-1]
    smooth[:, 1:-1, 1:-1] = block.add_(inner, alpha=4.0).div_(13.0).add_(0.5).floor_()
    return _images(_blend(pixels, smooth, factor))


def cutout(images: Tensor, y: Tensor, x: Tensor, side: Tensor, fill: Tensor) -> Tensor:
    """Covers a square, cut off at the image's border (DeVries & Taylor 2017).

    Args:
        images: uint8 [B, 3, H, W].
        y: Row of the square's centre, whole numbers, [B]; the square starts at y - side // 2.
        x: Column of its centre, likewise.
        side: Its side in pixels, whole numbers, [B].
        fill: Its colour, uint8 [B, 3].

    Example:
        >>> white, black = torch.full((1, 3, 1, 4), 255).byte(), torch.zeros(1, 3).byte()
        >>> cutout(white, torch.zeros(1), torch.zeros(1), torch.tensor([2]), black)[0, 0]
        tensor([[  0, 255, 255, 255]], dtype=torch.uint8)
    """
    pixels = pixel_rows(images)
    _, height, width, _ = pixels.shape
    sides = _each(side, "side", pixels).to(torch.int32)[:, None]

    def covered(centre: Tensor, length: int) -> Tensor:
        place = torch.arange(length, dtype=torch.int32, device=pixels.device)
        place = place - centre.to(torch.int32)[:, None] + sides // 2
        return (place >= 0) & (place < sides)

    lines = covered(_each(y, "y", pixels), height)[:, :, None]
    columns = covered(_each(x, "x", pixels), width).repeat_interleave(3, 1)[:, None, :]
    rows = pixels.flatten(2)
    colours = _colours(fill, pixels).repeat(1, width)[:, None]
    return _images(torch.where(lines & columns, colours, rows).view_as(pixels))
