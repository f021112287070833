"""``pack``: raw images into a box at full resolution and a coarse grid of what is around it.

It runs once per task, over the exemplars that were chosen, and is vectorised PyTorch everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.ops._nearest import Nearest, check_nearest, shown
from fastcil.ops._packed import (
    check_images,
    check_rows,
    check_tensor,
    fetch,
    layout,
    stored_pixels,
)

CHUNK = 1 << 20  # pixels gathered at a time


def grids(sizes: Tensor, ratio: float) -> Tensor:
    """Rows and columns of the background grid, side / sqrt(ratio) rounded down, at least 1.

    Args:
        sizes: heights and widths, integers [N, 2].
        ratio: pixels of background per cell (the paper's eta), at least 1.

    Returns:
        int64 [N, 2].

    Raises:
        ValueError: ``ratio`` is below 1 or not finite.

    Example:
        >>> grids(torch.tensor([[225, 300], [1, 1]]), 4.0)
        tensor([[112, 150],
                [  1,   1]])
    """
    if not 1 <= ratio < math.inf:
        raise FastcilError(f"ratio is {ratio}; it must be a finite number of at least 1")
    # By a number, CUDA would multiply with the reciprocal, which may end below a whole quotient.
    cell = torch.full((), math.sqrt(ratio), dtype=torch.float64, device=sizes.device)
    return (sizes.double() / cell).floor().clamp(min=1).long()


def packed_nbytes(geometry: Tensor, nearest: Nearest = "opencv") -> Tensor:
    r"""Bytes of pixels that each image keeps, by the formula of the layout.

    .. math::
        m = 3\,\big((y_1-y_0)(x_1-x_0) + gh\,gw - h\big)

    with h the cells wholly under the box: for a box well inside a large image this is Luo et al.
    2023, Eq. 4, times 3*H*W, to within about 1 %. A raw image has 3*H*W.

    Args:
        geometry: int16 [N, 8], rows (H, W, y0, x0, y1, x1, gh, gw).
        nearest: whose nearest neighbours, ``"opencv"`` or ``"pillow"``; h differs.

    Returns:
        int64 [N].

    Raises:
        TypeError: ``geometry`` has the wrong dtype.
        ValueError: ``geometry`` has the wrong shape, or ``nearest`` is neither of the two.

    Example:
        >>> raw, packed = [4, 6, 0, 0, 4, 6, 0, 0], [4, 6, 0, 0, 2, 2, 2, 3]
        >>> packed_nbytes(torch.tensor([raw, packed], dtype=torch.int16))
        tensor([72, 27])
    """
    check_tensor("geometry", geometry, torch.int16, (None, 8))
    check_nearest(nearest)
    offsets = geometry.new_zeros(len(geometry), dtype=torch.int64)
    return 3 * stored_pixels(layout(offsets, geometry, nearest=nearest))


def pack(
    pixels: Tensor,
    offsets: Tensor,
    geometry: Tensor,
    boxes: Tensor,
    ratio: float = 4.0,
    nearest: Nearest = "opencv",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Compress raw images as CIM does (Luo et al. 2023, Eq. 3): background at 1/ratio the pixels.

    The box is kept as it is. Around it cell (r, c) of a grid of gh x gw cells keeps pixel
    (floor(r*H/gh), floor(c*W/gw)), with gh = floor(H / sqrt(ratio)) and
    gw = floor(W / sqrt(ratio)), at least 1 each; cells wholly under the box are left out.
    ``reconstruct`` and ``read`` undo it.

    At the paper's ratio of 4 these are the pixels that OpenCV's ``INTER_NEAREST`` takes, whatever
    the size. At others OpenCV, which rounds the step H/gh, falls one short of some whole numbers.

    Args:
        pixels: raw images, uint8 [P].
        offsets: first byte of each image, int64 [N].
        geometry: int16 [N, 8], of raw images (gh = gw = 0).
        boxes: int16 [N, 4], rows (y0, x0, y1, x1) with exclusive ends, inside their images. An
            empty box makes everything background.
        ratio: pixels of background per cell, the paper's eta: an area ratio, at least 1.
        nearest: whose nearest neighbours, ``"opencv"``, which the paper's supplement names, or
            ``"pillow"``, as in its released code; only ``reconstruct`` undoes the latter.

    Returns:
        The packed images, uint8; the first byte of each, int64 [N]; their geometry, int16 [N, 8].

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, an image is packed already, a box reaches
            beyond its image, ``ratio`` is below 1, or ``nearest`` is neither of the two.

    Example:
        >>> pixels = torch.arange(4, dtype=torch.uint8).repeat_interleave(3)  # a grey 2 x 2
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> geometry = torch.tensor([[2, 2, 0, 0, 2, 2, 0, 0]], dtype=torch.int16)
        >>> boxes = torch.tensor([[1, 1, 2, 2]], dtype=torch.int16)
        >>> packed, _, row = pack(pixels, zero, geometry, boxes)
        >>> packed.tolist(), row.tolist()
        ([3, 3, 3, 0, 0, 0], [[2, 2, 1, 1, 2, 2, 1, 1]])
    """
    check_images(pixels, offsets, geometry)
    check_tensor("boxes", boxes, torch.int16, (len(offsets), 4))
    check_nearest(nearest)
    if bool((geometry[:, 6:] != 0).any()):
        raise FastcilError("geometry has images that are packed already; give raw ones")
    check_rows(pixels.numel(), offsets, geometry)
    sizes = geometry[:, :2]
    if bool(((boxes < 0) | (boxes > sizes.repeat(1, 2))).any()):
        raise FastcilError("boxes has one that reaches beyond its image; clip it to (0, 0, H, W)")
    boxes = boxes * (boxes[:, 2:] > boxes[:, :2]).all(1, keepdim=True)
    packed = torch.cat([sizes, boxes, grids(sizes, ratio).short()], 1)
    table = layout(offsets, packed, nearest=nearest)
    nbytes = 3 * stored_pixels(table)
    box_area = (table[:, 5] - table[:, 3]) * (table[:, 6] - table[:, 4])
    largest = max((box_area + table[:, 7] * table[:, 8]).tolist(), default=1)
    parts = [pixels.new_empty(0)]
    for images in table.split(max(1, CHUNK // largest)) if len(table) else ():
        sources = [_box_sources(images), _cell_sources(images, nearest)]
        place = torch.cat([begin.flatten(1) for begin, _ in sources], 1)
        kept = torch.cat([keep.flatten(1) for _, keep in sources], 1)
        parts.append(fetch(pixels, place[kept]).view(-1))
    return torch.cat(parts), nbytes.cumsum(0) - nbytes, packed


def _count(numbers: Tensor) -> Tensor:
    """0, 1, ... below the largest of these numbers."""
    return torch.arange(int(numbers.max()), device=numbers.device)


def _box_sources(table: Tensor) -> tuple[Tensor, Tensor]:
    """First byte of each pixel of the boxes, padded to the largest, and which are no padding."""
    offset, _, width, y0, x0, y1, x1 = table[:, :7, None, None].unbind(1)
    y, x = _count(y1 - y0)[:, None], _count(x1 - x0)
    return offset + 3 * ((y0 + y) * width + x0 + x), (y < y1 - y0) & (x < x1 - x0)


def _cell_sources(table: Tensor, nearest: Nearest) -> tuple[Tensor, Tensor]:
    """First byte of the pixel that each cell takes, padded likewise, and which are to be kept."""
    offset, _, width = table[:, :3, None, None].unbind(1)
    rows, columns, *hole = table[:, 7:13, None, None].unbind(1)
    r, c = _count(rows), _count(columns)
    y = shown(r, table[:, 1], table[:, 7], nearest)[:, :, None]  # [N, R, 1]
    x = shown(c, table[:, 2], table[:, 8], nearest)[:, None]  # [N, 1, C]
    r = r[:, None]
    under = (r >= hole[0]) & (r < hole[0] + hole[2]) & (c >= hole[1]) & (c < hole[1] + hole[3])
    place = offset + 3 * (y * width + x)
    return place, (r < rows) & (c < columns) & ~under
