"""``read``: a batch of crops, resized, straight out of packed images.

Every kernel does the same integer arithmetic, so that they agree bit for bit on any device and with
any number of threads. Weights are rounded to 14 bits, cumulatively, so that they sum to one
exactly. Rows are blended first, into numbers with 7 bits behind the point, then columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.ops._library import define
from fastcil.ops._packed import (
    LARGEST_SIDE,
    addresses,
    check_rows,
    check_tensor,
    fetch,
    layout,
)

WEIGHT_BITS = 14  # a weight of one still fits int16
LINE_BITS = 7  # so does 255 with these bits behind the point
FARTHEST = 65536.0  # of a crop's corner: keeps every temporary in proportion to the image
CHUNK = 1 << 20  # pixels gathered at a time by the reference


class _Axis(NamedTuple):
    """What the outputs along one axis are made of."""

    low: Tensor  # first source pixel that crop and image share, int64 [B]
    length: Tensor  # how many they share
    place: Tensor  # of each tap, from ``low`` on, int64 [B, size, taps]
    weight: Tensor  # int32, 0 where there is no such pixel

    def of(self, images: Tensor) -> _Axis:
        """The rows of some images."""
        return _Axis(*(field[images] for field in self))


def _axis(begin: Tensor, end: Tensor, side: Tensor, size: int, antialias: bool) -> _Axis:
    """Fit ``size`` outputs to crops from ``begin`` to ``end``, of images with this ``side``."""
    begin, end = begin.double()[:, None], end.double()[:, None]  # [B, 1]
    centre = (torch.arange(size, device=side.device) + 0.5) * (end - begin) / size + begin
    width = ((end - begin) / size).clamp(min=1.0) if antialias else torch.ones_like(begin)
    first = (centre - width + 0.5).floor()[..., None]  # [B, size, 1]
    source = first + torch.arange(math.ceil(2 * float(width.max())), device=side.device)
    weight = 1 - (source + 0.5 - centre[..., None]).abs() / width[..., None]
    low, high = begin.floor(), end.ceil()
    covered = (source >= low[..., None]) & (source < high[..., None])
    total = torch.where(covered, weight.clamp(min=0), 0).cumsum(-1)
    share = (total * (2.0**WEIGHT_BITS / total[..., -1:])).round().int()
    share = share.diff(dim=-1, prepend=torch.zeros_like(share[..., :1]))
    low = low.long()[:, 0].clamp(min=0).minimum(side)
    length = high.long()[:, 0].clamp(min=0).minimum(side) - low
    place = source.long() - low[:, None, None]
    last = length[:, None, None] - 1
    share = torch.where((place >= 0) & (place <= last), share, 0)
    return _Axis(low, length, place.minimum(last).clamp(min=0), share)


def _show(pixels: Tensor, table: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    """What the images show where crop and image meet, padded at will: uint8 [B, H, W, 3]."""
    height, width = max(1, int(rows.length.max())), max(1, int(columns.length.max()))
    y = rows.low[:, None] + torch.arange(height, device=pixels.device)  # [B, H]
    x = columns.low[:, None] + torch.arange(width, device=pixels.device)
    y = y.minimum(table[:, 1:2] - 1)[:, :, None]
    x = x.minimum(table[:, 2:3] - 1)[:, None]
    return fetch(pixels, addresses(table[:, None, None], y, x))


def _blend(lines: Tensor, axis: _Axis) -> Tensor:
    """Weighted sums of whole lines [B, n, samples]: int32 [B, size, samples]."""
    batch, count, samples = lines.shape
    size = axis.place.shape[1]
    start = torch.arange(batch, device=lines.device)[:, None] * count
    total = torch.zeros((batch, size, samples), dtype=torch.int32, device=lines.device)
    for place, weight in zip(axis.place.unbind(2), axis.weight.unbind(2), strict=True):
        line = lines.flatten(0, 1).index_select(0, (start + place).flatten())
        total += weight[..., None] * line.view(batch, size, samples)
    return total


def _drop(total: Tensor, bits: int) -> Tensor:
    """Round half up, to ``bits`` fewer bits."""
    return (total + (1 << (bits - 1))) >> bits


def reference(
    arenas: list[Tensor],
    arena: Tensor,
    offsets: Tensor,
    geometry: Tensor,
    height: int,
    width: int,
    crops: Tensor | None,
    flips: Tensor | None,
    views: Tensor | None,
    antialias: bool,
) -> Tensor:
    """The op in plain PyTorch. It waits for the device to learn the widest filter."""
    out = fake(arenas, arena, offsets, geometry, height, width, crops, flips, views, antialias)
    if not len(geometry):
        return out
    room = torch.tensor([pixels.numel() for pixels in arenas], device=geometry.device)
    if not bool(((arena >= 0) & (arena < len(arenas))).all()):
        raise FastcilError(f"arena names a buffer that is not among the {len(arenas)} arenas")
    check_rows(room[arena], offsets, geometry, views)
    table = layout(offsets, geometry, views)
    if crops is None:
        crops = torch.nn.functional.pad(geometry[:, :2].float(), (2, 0))
    sound = (crops.abs() <= FARTHEST).all() & (crops[:, :2] < crops[:, 2:]).all()
    if not bool(sound):
        raise FastcilError(
            f"crops has a row that is empty, not finite or farther out than {FARTHEST:.0f} pixels"
        )
    rows = _axis(crops[:, 0], crops[:, 2], table[:, 1], height, antialias)
    columns = _axis(crops[:, 1], crops[:, 3], table[:, 2], width, antialias)
    step = max(1, CHUNK // max(height * width, int((rows.length * columns.length).max())))
    for k, pixels in enumerate(arenas):
        members = (arena == k).nonzero().flatten()
        for i in members.split(step) if len(members) else ():
            across, along = rows.of(i), columns.of(i)
            shown = _show(pixels, table[i], across, along)  # [b, H, W, 3]
            lines = _drop(_blend(shown.flatten(2), across), WEIGHT_BITS - LINE_BITS)
            lines = lines.view(len(i), height, -1, 3).transpose(1, 2)  # [b, W, h, 3]
            images = _drop(_blend(lines.flatten(2), along), WEIGHT_BITS + LINE_BITS)
            out[i] = images.byte().view(len(i), width, height, 3).permute(0, 3, 2, 1)
    if flips is not None:
        out.copy_(torch.where(flips[:, None, None, None], out.flip(3), out))
    return out


def fake(
    arenas: list[Tensor],
    arena: Tensor,
    offsets: Tensor,
    geometry: Tensor,
    height: int,
    width: int,
    crops: Tensor | None,
    flips: Tensor | None,
    views: Tensor | None,
    antialias: bool,
) -> Tensor:
    """An empty output, channels_last."""
    return torch.empty(
        (geometry.shape[0], 3, height, width),
        dtype=torch.uint8,
        device=geometry.device,
        memory_format=torch.channels_last,
    )


define(
    "read(Tensor[] arenas, Tensor arena, Tensor offsets, Tensor geometry, SymInt height, "
    "SymInt width, Tensor? crops, Tensor? flips, Tensor? views, bool antialias) -> Tensor",
    reference,
    fake,
    kernel="fastcil.kernels.read:read",
)


def read(
    arenas: Sequence[Tensor],
    arena: Tensor,
    offsets: Tensor,
    geometry: Tensor,
    size: tuple[int, int],
    crops: Tensor | None = None,
    flips: Tensor | None = None,
    views: Tensor | None = None,
    antialias: bool = True,
) -> Tensor:
    r"""Read, crop, resize and flip a batch of raw and packed images, without unpacking them.

    Along each axis, with a crop from b to e and n output pixels, output i is

    .. math::
        o_i = \sum_x w_{ix}\, p_x \Big/ \sum_x w_{ix}, \qquad
        w_{ix} = \max\!\Big(0,\, 1 - \frac{|x + \tfrac12 - c_i|}{s}\Big), \qquad
        c_i = b + (i + \tfrac12)\,\frac{e - b}{n},

    which is bilinear interpolation with half-pixel centres: s = 1, or with ``antialias`` the
    triangle filter that Pillow's ``resize`` and PyTorch's ``interpolate(antialias=True)`` widen
    by the scale, s = max(1, (e - b) / n). x runs over the pixels that the crop covers, wholly or
    in part, and over no others: a crop is cut out first and resized then. Pixels that it covers
    outside the image are zeros, and are blended in as such. A crop at whole pixels of the
    output's own size is an exact copy. Results are rounded half up.

    A packed image (Luo et al. 2023, Eq. 3) shows the box at full resolution and nearest
    neighbours of its background grid elsewhere; a view shows a raw image as packing it would.

    Args:
        arenas: the pixel buffers, each uint8 [P_k].
        arena: which buffer each image is in, int64 [B].
        offsets: the image's first byte in it, int64 [B].
        geometry: int16 [B, 8], rows (H, W, y0, x0, y1, x1, gh, gw).
        size: height and width of the output, (h, w).
        crops: float32 [B, 4], rows (y0, x0, y1, x1) in source pixels, not empty; they may lie
            outside the image. None: the whole image.
        flips: bool [B], images to mirror left to right.
        views: int16 [B, 6], rows (y0, x0, y1, x1, gh, gw); gh = 0: none. For raw images only.
        antialias: widen the filter where an image shrinks.

    Returns:
        uint8 [B, 3, h, w], in channels_last memory.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, or a row of it does not describe an image,
            a view or a crop. (Kernels on a GPU cannot look at values, and don't.)

    Example:
        >>> pixels = torch.arange(12, dtype=torch.uint8)  # one image of 2 x 2
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> geometry = torch.tensor([[2, 2, 0, 0, 2, 2, 0, 0]], dtype=torch.int16)
        >>> read([pixels], zero, zero, geometry, (1, 2))[0, 0]
        tensor([[3, 6]], dtype=torch.uint8)
        >>> crops = torch.tensor([[0.0, 1.0, 2.0, 3.0]])  # its right half lies outside
        >>> read([pixels], zero, zero, geometry, (2, 2), crops)[0, 0]
        tensor([[3, 0],
                [9, 0]], dtype=torch.uint8)
    """
    check_images_to_read(arenas, arena, offsets, geometry, size, crops, flips, views)
    height, width = size
    out: Tensor = torch.ops.fastcil.read(
        list(arenas), arena, offsets, geometry, height, width, crops, flips, views, antialias
    )
    return out


def check_images_to_read(
    arenas: Sequence[Tensor],
    arena: Tensor,
    offsets: Tensor,
    geometry: Tensor,
    size: tuple[int, int],
    crops: Tensor | None,
    flips: Tensor | None,
    views: Tensor | None,
) -> int:
    """Refuse what cannot be read by dtype and shape alone; the batch size."""
    if isinstance(arenas, Tensor) or not len(arenas):
        raise TypeError("arenas must be a sequence of at least one uint8 tensor")
    for k, pixels in enumerate(arenas):
        check_tensor(f"arenas[{k}]", pixels, torch.uint8, (None,))
    check_tensor("offsets", offsets, torch.int64, (None,))
    batch = offsets.shape[0]
    check_tensor("arena", arena, torch.int64, (batch,))
    check_tensor("geometry", geometry, torch.int16, (batch, 8))
    if not all(1 <= side <= LARGEST_SIDE for side in size):
        raise FastcilError(
            f"size is {tuple(size)}; both sides must lie between 1 and {LARGEST_SIDE}"
        )
    if crops is not None:
        check_tensor("crops", crops, torch.float32, (batch, 4))
    if flips is not None:
        check_tensor("flips", flips, torch.bool, (batch,))
    if views is not None:
        check_tensor("views", views, torch.int16, (batch, 6))
    return batch
