"""Soft compression: image and downsampled image mixed by an activation map, differentiably."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fastcil.errors import FastcilError


def _shown(side: int, ratio: float, device: torch.device) -> Tensor:
    """The source row (or column) that each row shows after nearest down- and upsampling."""
    cells = max(1, math.floor(side / math.sqrt(ratio)))
    pixel = torch.arange(side, device=device)
    return pixel * cells // side * side // cells


def soft_compose(images: Tensor, cam: Tensor, ratio: float = 4.0) -> Tensor:
    r"""Compresses images as softly as their activation maps say.

    .. math:: \tilde x = M \odot x + (1 - M) \odot x_\eta

    (Luo et al. 2023, Eq. S1c): M is ``cam`` upsampled bilinearly (align_corners=False) to the
    image's size, and x_eta is x downsampled by sqrt(eta) per side and upsampled again, both by
    nearest neighbour: cell r of floor(H / sqrt(eta)) holds row r H // cells, and row y shows cell
    y cells // H. Differentiable twice.

    Args:
        images: Floating point, any scale.  # [B, 3, H, W]
        cam: Maps in [0, 1], of any resolution.  # [B, h, w]
        ratio: eta, the ratio of areas; at least 1.

    Returns:
        The composed images, with the dtype of ``images``.  # [B, 3, H, W]

    Raises:
        FastcilError: If the shapes do not belong together, the images are integers or the ratio
            is below 1.

    Example:
        >>> image = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(1, 1, 4, 4)
        >>> soft_compose(image, torch.full((1, 1, 1), 0.5))[0, 0, 0]
        tensor([0.0000, 0.5000, 2.0000, 2.5000])
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise FastcilError(
            f"images is {images.dtype} of shape {tuple(images.shape)}; it must be floating point "
            "of shape [B, 3, H, W]."
        )
    if cam.ndim != 3 or len(cam) != len(images):
        raise FastcilError(
            f"cam has shape {tuple(cam.shape)}; it must be [{len(images)}, h, w], one map per "
            "image."
        )
    if not 1 <= ratio < math.inf:
        raise FastcilError(f"ratio is {ratio}; it must be at least 1 (4 halves both sides).")
    height, width = images.shape[2:]
    rows = _shown(height, ratio, images.device)
    columns = _shown(width, ratio, images.device)
    downsampled = images.index_select(2, rows).index_select(3, columns)
    mask = functional.interpolate(cam[:, None], (height, width), mode="bilinear")
    # The images come first: the result takes their memory layout.
    return torch.lerp(images, downsampled, 1 - mask.to(images.dtype))
