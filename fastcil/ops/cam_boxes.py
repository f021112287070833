"""Boxes around the discriminative pixels of images, each at its image's own size.

Between two neighbouring positions of the map the upsampled surface is linear along a row, so its
maximum there lies on the first or the last pixel that falls between them: the box needs at most
two columns per column of the map, and two rows per row, never the upsampled map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcil.ops._library import define
from fastcil.ops.cam import cam, check_maps
from fastcil.ops.sizes import largest_sides, size_rows


def _taps(positions: int, sides: Tensor, longest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where each pixel of a side reads the map: first position and weight of the next one.

    The values of ``torch.nn.functional.interpolate`` on the CPU (align_corners=False), whose
    product and sum are rounded once: as here, in float64 and then to the map's float32.
    """
    pixel = torch.arange(longest, dtype=torch.float64, device=sides.device)
    scale = (positions / sides.to(dtype)).double()  # [B]
    source = (scale[:, None] * (pixel + 0.5) - 0.5).clamp(min=0).to(dtype)
    first = source.floor().long().clamp(max=positions - 1)  # [B, longest]
    return first, (source - first).clamp(0, 1)


def _extremes(first: Tensor, sides: Tensor, positions: int) -> Tensor:
    """The first and last pixel that read from each position on: [B, 2 * positions].

    A position that no pixel starts from yields pixels of its neighbours, which do no harm.
    """
    beyond = torch.arange(first.shape[1], device=first.device) >= sides[:, None]
    starts = first.masked_fill(beyond, positions)
    position = torch.arange(positions, device=first.device).expand(len(first), -1).contiguous()
    low = torch.searchsorted(starts, position)
    high = torch.searchsorted(starts, position, right=True) - 1
    pixels = torch.cat([low, high], 1)
    return torch.minimum(pixels.clamp(min=0), sides[:, None] - 1)


def _resample(maps: Tensor, first: Tensor, weight: Tensor) -> Tensor:
    """Linear interpolation along the last axis: [B, n, positions] -> [B, n, pixels]."""
    second = (first + 1).clamp(max=maps.shape[2] - 1)
    rows = maps.shape[1]
    left = maps.gather(2, first[:, None].expand(-1, rows, -1))
    right = maps.gather(2, second[:, None].expand(-1, rows, -1))
    weight = weight[:, None]
    return left * (1 - weight) + right * weight


def _span(
    maps: Tensor,  # [B, n, p]
    lines: tuple[Tensor, int],
    across: tuple[Tensor, int],
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """First and last (exclusive) line with a pixel above the threshold; (0, 0) without any.

    Lines follow each other along the last axis of ``maps``, pixels of a line along the middle one.
    ``lines`` and ``across`` give their number in each image, and the largest of these.
    """
    count, longest = lines
    first, weight = _taps(maps.shape[1], *across, maps.dtype)
    pixels = _extremes(first, across[0], maps.shape[1])
    few = _resample(maps.mT, first.gather(1, pixels), weight.gather(1, pixels))  # [B, p, 2n]
    taps = _taps(maps.shape[2], count, longest, maps.dtype)
    values = _resample(few.mT, *taps)  # [B, 2n, longest]
    line = torch.arange(longest, device=maps.device)
    above = (values > threshold).any(1) & (line < count[:, None])  # [B, longest]
    start = torch.where(above, line, longest).amin(1)
    stop = torch.where(above, line + 1, 0).amax(1)
    return start * (stop > 0), stop


def _cam_boxes(
    features: Tensor, class_weights: Tensor, sizes: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Reference of the op."""
    maps = cam(features, class_weights)  # [B, h, w]
    largest_height, largest_width = largest_sides(sizes)
    height, width = sizes.to(maps.device).unbind(1)
    rows, columns = (height, largest_height), (width, largest_width)
    y0, y1 = _span(maps.mT, rows, columns, threshold)
    x0, x1 = _span(maps, columns, rows, threshold)
    # A pixel on the threshold may be above it along its row and not along its column.
    valid = (y1 > y0) & (x1 > x0)
    return (torch.stack([y0, x0, y1, x1], 1) * valid[:, None]).to(torch.int16), valid


def _fake(
    features: Tensor, class_weights: Tensor, sizes: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    batch = features.shape[0]
    return (
        features.new_empty((batch, 4), dtype=torch.int16),
        features.new_empty((batch,), dtype=torch.bool),
    )


define(
    "cam_boxes(Tensor features, Tensor class_weights, Tensor sizes, float threshold)"
    " -> (Tensor, Tensor)",
    _cam_boxes,
    _fake,
    kernel="fastcil.kernels.cam_boxes:cam_boxes",
)


def cam_boxes(
    features: Tensor,
    class_weights: Tensor,
    sizes: Tensor | tuple[int, int],
    threshold: float = 0.6,
) -> tuple[Tensor, Tensor]:
    r"""The tight box around the pixels of each image that its class activation map marks.

    .. math:: B = [\min h, \min w; \max h, \max w] \text{ over } \{(h, w): M(h, w) > \tau\}

    (Luo et al. 2023, Eq. 2). M is the map of ``fastcil.ops.cam`` (Eq. 1), scaled to [0, 1] at the
    resolution of the features, then upsampled bilinearly (half-pixel centres, align_corners=False)
    to the image's own size; the upsampled map is never stored. Not differentiable.

    Args:
        features: Feature maps before pooling.  # [B, C, h, w]
        class_weights: For each image the classifier's row of its class.  # [B, C]
        sizes: The (height, width) of every image, or int64 rows of them.  # [B, 2]
        threshold: tau.

    Returns:
        Boxes (y0, x0, y1, x1) in pixels with exclusive ends, and whether any pixel was above the
        threshold: where not, as with a constant map or features that are NaN, the box is
        (0, 0, 0, 0).
        # int16 [B, 4], bool [B]

    Raises:
        FastcilError: If shapes or dtypes do not fit.
        ValueError: If a side is not in 1 ... 32767 (FastcilError is one).

    Example:
        >>> features = torch.zeros(1, 1, 4, 4)
        >>> features[0, 0, 1, 2] = 1.0
        >>> boxes, valid = cam_boxes(features, torch.ones(1, 1), (8, 12), threshold=0.6)
        >>> boxes.tolist(), valid.tolist()
        ([[2, 7, 4, 8]], [True])
    """
    check_maps(features, class_weights)
    rows = size_rows(sizes, len(features))
    boxes, valid = torch.ops.fastcil.cam_boxes(features, class_weights, rows, float(threshold))
    return boxes, valid
