"""Boxes that training and test images are cut to, drawn for a batch at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# RandomResizedCrop's aspect ratios (Szegedy et al. 2015), its tries, and where it gives up.
RATIOS = (3 / 4, 4 / 3)
TRIES = 10


def box(top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Crops float32 [B, 4] as (y0, x0, y1, x1), of float64 [B] each.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> box(one, 2 * one, 3 * one, 4 * one)
        tensor([[1., 2., 4., 6.]])
    """
    return torch.stack([top, left, top + height, left + width], 1).float()


def padded(
    height: Tensor, width: Tensor, size: int, padding: int, down: Tensor, across: Tensor
) -> Tensor:
    """Squares of side ``size`` somewhere in an image with ``padding`` pixels more on each side.

    Args:
        height: Of the images, float64 [B].
        width: Likewise.
        size: Side of the square.
        padding: On each side of the image.
        down: How far to the lower edge, from 0 to 1, [B].
        across: How far to the right edge, likewise.

    Example:
        >>> side, luck = torch.full((1,), 2.0).double(), torch.zeros(1).double()
        >>> padded(side, side, 2, 1, luck, luck)
        tensor([[-1., -1.,  1.,  1.]])
    """

    def start(length: Tensor, luck: Tensor) -> Tensor:
        room = length + 2 * padding - size
        within = (luck * (room + 1)).floor() - padding
        return torch.where(room < 0, ((length - size) / 2).floor(), within)

    side = torch.full_like(height, size)
    return box(start(height, down), start(width, across), side, side)


def window(
    height: Tensor, width: Tensor, size: int, resize: int | None, down: Tensor, across: Tensor
) -> Tensor:
    """Squares inside the image, or inside the square of side ``resize`` that it is resized to.

    Args:
        height: Of the images, float64 [B].
        width: Likewise.
        size: Side of the square; an image with a shorter side has one of that side.
        resize: Side that the whole image would be resized to, or None.
        down: How far to the lower edge, from 0 to 1, [B].
        across: How far to the right edge, likewise.

    Returns:
        What the squares show, in pixels of the images as they are: with ``resize`` rectangles, at
        fractions of pixels.

    Example:
        >>> side, luck = torch.full((1,), 8.0).double(), torch.zeros(1).double()
        >>> window(side, 2 * side, 3, 4, luck, luck + 0.5)
        tensor([[ 0.,  4.,  6., 16.]])
    """
    tall = height if resize is None else torch.full_like(height, resize)
    wide = width if resize is None else torch.full_like(width, resize)
    side = torch.minimum(tall, wide).clamp(max=size)
    top, left = (down * (tall - side + 1)).floor(), (across * (wide - side + 1)).floor()
    return box(top * height / tall, left * width / wide, side * height / tall, side * width / wide)


def resized(
    height: Tensor, width: Tensor, min_scale: float, down: Tensor, across: Tensor, tries: Tensor
) -> Tensor:
    """Random parts of the images (RandomResizedCrop, Szegedy et al. 2015).

    Args:
        height: Of the images, float64 [B].
        width: Likewise.
        min_scale: Smallest share of the area.
        down: How far to the lower edge, from 0 to 1, [B].
        across: How far to the right edge, likewise.
        tries: Ten areas and ten ratios, from 0 to 1, [B, 20].

    Example:
        >>> side, luck = torch.full((1,), 8.0).double(), torch.full((1, 20), 0.5).double()
        >>> resized(side, side, 1.0, luck[:, 0], luck[:, 0], luck)
        tensor([[0., 0., 8., 8.]])
    """
    share = min_scale + (1 - min_scale) * tries[:, :TRIES]
    low, high = math.log(RATIOS[0]), math.log(RATIOS[1])
    ratio = (low + (high - low) * tries[:, TRIES:]).exp()
    area = share * (height * width)[:, None]
    wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # [B, 10]
    fits = (wide >= 1) & (wide <= width[:, None]) & (tall >= 1) & (tall <= height[:, None])
    first = fits.int().argmax(1, keepdim=True)
    wide, tall = wide.gather(1, first)[:, 0], tall.gather(1, first)[:, 0]
    top = (down * (height - tall + 1)).floor()
    left = (across * (width - wide + 1)).floor()

    widest = torch.minimum(width, (height * RATIOS[1]).round())
    tallest = torch.minimum(height, (width / RATIOS[0]).round())
    middle = box(((height - tallest) / 2).floor(), ((width - widest) / 2).floor(), tallest, widest)
    return torch.where(fits.any(1)[:, None], box(top, left, tall, wide), middle)
