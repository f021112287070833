"""Heights and widths of images, for what is made at each image's own size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.ops._packed import LARGEST_SIDE

# Pixels handled at once: what goes through them in plain PyTorch holds some 100 bytes for each.
_TOGETHER = 1 << 21


def size_rows(sizes: Tensor | tuple[int, int], batch: int) -> Tensor:
    """The (height, width) of all images, or one row for each, as int64 [batch, 2].

    Example:
        >>> size_rows((4, 5), 2).tolist()
        [[4, 5], [4, 5]]
    """
    if not isinstance(sizes, Tensor):
        sizes = torch.tensor(sizes, dtype=torch.int64).expand(batch, -1)
    if sizes.shape != (batch, 2) or sizes.is_floating_point() or sizes.dtype == torch.bool:
        raise FastcilError(
            f"sizes is {sizes.dtype} of shape {tuple(sizes.shape)}; it must be one (height, width) "
            f"or integers of shape {(batch, 2)}."
        )
    return sizes.to(torch.int64)


def largest_sides(sizes: Tensor) -> tuple[int, int]:
    """The largest height and the largest width, after a look at all; waits for the device.

    Example:
        >>> largest_sides(torch.tensor([[4, 5], [7, 1]]))
        (7, 5)
    """
    # One more row, so that an empty batch has a largest side too.
    rows = torch.cat([sizes, sizes.new_ones(1, 2)])
    least = (sizes if len(sizes) else rows).amin()
    height, width, smallest = torch.cat([rows.amax(0), least[None]]).tolist()
    if smallest < 1 or max(height, width) > LARGEST_SIDE:
        raise FastcilError(
            f"sizes holds sides from {smallest} to {max(height, width)}; a side must be 1 to "
            f"{LARGEST_SIDE} pixels long."
        )
    return height, width


def by_size(sizes: Tensor) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Images of one height and width at a time.

    Args:
        sizes: Heights and widths, int64 [N, 2].

    Yields:
        Which images these are, int64 [n]; where their pixels lie among those of all images,
        int64 [n, H * W]; H; W. Groups are cut to some two million pixels.

    Example:
        >>> for rows, pixels, height, width in by_size(torch.tensor([[1, 2], [1, 1], [1, 2]])):
        ...     print(height, width, rows.tolist(), pixels.tolist())
        1 1 [1] [[2]]
        1 2 [0, 2] [[0, 1], [3, 4]]
    """
    areas = sizes.prod(1)
    first = areas.cumsum(0) - areas
    kinds, kind_of = sizes.unique(dim=0, return_inverse=True)
    for kind, (height, width) in enumerate(kinds.tolist()):
        area = height * width
        places = torch.arange(area, device=sizes.device)
        chosen = (kind_of == kind).nonzero().flatten()
        for rows in chosen.split(max(1, _TOGETHER // area)):
            yield rows, first[rows, None] + places, height, width
