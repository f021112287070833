"""Masks of the salient pixels of images, each at its image's own size.

The enlarged map is bilinear between neighbouring positions of the map, so of the pixels there those
at the corners have its least and its greatest value: the kernels scale by at most four values per
position, and then compare one pixel after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.ops._library import define
from fastcil.ops.sizes import by_size, largest_sides, size_rows

ROUNDING = 2.0**-20  # of what a constant map's enlarged values come to differ by, relatively


def _salient_masks(maps: Tensor, sizes: Tensor, threshold: float) -> Tensor:
    """Reference of the op. It waits for the device to learn the sizes."""
    largest_sides(sizes)
    keep = torch.ones(int(sizes.prod(1).sum()), dtype=torch.bool, device=maps.device)
    if threshold == 0:
        return keep
    for rows, pixels, height, width in by_size(sizes.to(maps.device)):
        enlarged = functional.interpolate(maps[rows, None], (height, width), mode="bilinear")
        enlarged = enlarged.flatten(1)
        low, high = (bound[:, None] for bound in enlarged.aminmax(dim=1))
        # NaN and infinity fail the comparison: inf - inf is NaN.
        rounding = ROUNDING * torch.maximum(low.abs(), high.abs())
        speaks = (high - low > rounding) & (high - low < float("inf"))
        keep[pixels] = (enlarged - low > threshold * (high - low)) | ~speaks
    return keep


def _fake(maps: Tensor, sizes: Tensor, threshold: float) -> Tensor:
    """Empty output; how many pixels there are depends on the data."""
    total = torch.library.get_ctx().new_dynamic_size()
    return maps.new_empty(total, dtype=torch.bool)


define(
    "salient_masks(Tensor maps, Tensor sizes, float threshold) -> Tensor",
    _salient_masks,
    _fake,
    kernel="fastcil.kernels.salient_masks:salient_masks",
)


def salient_masks(maps: Tensor, sizes: Tensor | tuple[int, int], threshold: float = 0.6) -> Tensor:
    r"""Which pixels of each image are salient.

    .. math:: 1\{M > \mu\}, \qquad M = \frac{S - \min S}{\max S - \min S}

    (Bai et al. 2023, Eq. 4.4). S is the map enlarged to the image's own size (App. D, Eq. D.3;
    bilinear, half-pixel centres, align_corners=False, as in ``fastcil.ops.cam_boxes``), and scaled
    when it is, as in the released code. Scaled before, it would fall short of 1: the peak of a
    small map lies between pixels when it is enlarged. The enlarged map is never stored.

    A map that says nothing, being constant but for rounding or not finite, marks every pixel:
    released, a map of zeros becomes NaN when it is scaled, and nothing is dropped. So does a
    threshold of 0.

    Computed in float32, also under autocast; a pixel that lies on the threshold but for rounding
    may be marked by one kernel and not by another. Not differentiable. It waits for the device to
    learn how long the result is. On the CPU results of 4 MiB or more take the memory of earlier
    ones, as `read_batch` says.

    Args:
        maps: Saliency, of any range and floating dtype, as `fastcil.nn.GradCAM` gives it.
            # [N, h, w]
        sizes: The (height, width) of every image, or integer rows of them.  # [N, 2]
        threshold: mu, from 0 to below 1.

    Returns:
        True where a pixel is salient, row-major, image after image.  # bool [sum of H W]

    Raises:
        FastcilError: Maps of another shape or that are no floating-point numbers; sizes that do not
            fit them, or sides not in 1 ... 32767; a threshold outside [0, 1).

    Example:
        >>> maps = torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]]])
        >>> salient_masks(maps, torch.tensor([[1, 4], [2, 1]]), 0.5).tolist()
        [False, False, True, True, True, True]
    """
    check_threshold("threshold", threshold)
    count = len(sizes) if isinstance(sizes, Tensor) and sizes.ndim == 2 else len(maps)
    if not maps.is_floating_point() or maps.ndim != 3 or len(maps) != count:
        raise FastcilError(
            f"maps is {maps.dtype} of shape {tuple(maps.shape)}; it must be one map for each "
            f"image, float32 [{count}, h, w]."
        )
    if len(maps) and 0 in maps.shape[1:]:
        raise FastcilError(f"maps has shape {tuple(maps.shape)}; h and w must be at least 1.")
    rows = size_rows(sizes, len(maps))
    masks: Tensor = torch.ops.fastcil.salient_masks(maps.float(), rows, float(threshold))
    return masks


def check_threshold(name: str, value: object) -> None:
    """Raises unless ``value`` is a saliency that some pixels can be above.

    Example:
        >>> check_threshold("threshold", 0.6)
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0 <= value < 1):  # type: ignore[operator]
        raise FastcilError(
            f"{name} is {value!r}; it must lie from 0 (keep every pixel) to below 1, and is 0.6 or "
            f"0.7 in the paper."
        )
