"""How far a decoded image is from the original: PSNR and MS-SSIM of 8-bit RGB."""

from __future__ import annotations

import importlib.util
import math

from torch import Tensor

from fastcil.errors import FastcilError

_MISSING = (
    "MS-SSIM is measured by the package pytorch-msssim, which is not installed; "
    "pip install 'fastcil[codec]'."
)
_WINDOW = 11
_SCALES = 5
LEAST_MS_SSIM_SIDE = (_WINDOW - 1) * 2 ** (_SCALES - 1) + 1
"""An image with a shorter side has no MS-SSIM: its fifth scale is smaller than the window."""


def psnr(image: Tensor, reference: Tensor) -> float:
    r"""Peak signal-to-noise ratio over the three channels together.

    .. math:: 10 \log_{10} \frac{255^2}{\frac1{3HW} \sum (x - y)^2}

    Both are 8-bit, as a viewer shows them; the squares are summed up exactly.

    Args:
        image: uint8 [H, W, 3].
        reference: uint8, of the same shape.

    Returns:
        Decibels; infinite for two equal images.

    Raises:
        TypeError: An image that is not uint8.
        FastcilError: Images of different shapes.

    Example:
        >>> import torch
        >>> black = torch.zeros(4, 4, 3, dtype=torch.uint8)
        >>> psnr(black + 255, black), psnr(black, black)
        (0.0, inf)
    """
    _check(image, reference)
    error = int((image.int() - reference.int()).square().sum())
    return 10 * math.log10(255**2 * image.numel() / error) if error else math.inf


def ms_ssim(image: Tensor, reference: Tensor) -> float | None:
    """Multi-scale structural similarity (Wang et al. 2003), mean over the channels.

    By pytorch-msssim, whose figures CompressAI reports too, and which needs nothing but torch.

    Args:
        image: uint8 [H, W, 3].
        reference: uint8, of the same shape.

    Returns:
        1 for equal images; None where a side is shorter than 161 pixels.

    Raises:
        TypeError: An image that is not uint8.
        FastcilError: Images of different shapes, or the package is not installed.

    Example:
        >>> import torch
        >>> small = torch.zeros(160, 200, 3, dtype=torch.uint8)
        >>> ms_ssim(small, small) is None
        True
    """
    _check(image, reference)
    if min(image.shape[:2]) < LEAST_MS_SSIM_SIDE:
        return None
    try:
        from pytorch_msssim import ms_ssim as measure
    except ImportError as error:
        raise FastcilError(_MISSING) from error
    pair = [x.permute(2, 0, 1)[None].float() for x in (image, reference)]
    return float(measure(*pair, data_range=255))


def ms_ssim_available() -> bool:
    """Whether the package that measures MS-SSIM is installed."""
    return importlib.util.find_spec("pytorch_msssim") is not None


def ms_ssim_missing() -> str | None:
    """What to tell those whose figures are without MS-SSIM; None where it can be measured."""
    return None if ms_ssim_available() else _MISSING


def _check(image: Tensor, reference: Tensor) -> None:
    """Raises unless both are 8-bit images of one shape."""
    for name, value in (("image", image), ("reference", reference)):
        if str(value.dtype) != "torch.uint8":
            raise TypeError(f"{name} is {value.dtype}; it must be uint8.")
    if image.shape != reference.shape or image.ndim != 3 or not image.numel():
        raise FastcilError(
            f"image and reference have shapes {list(image.shape)} and {list(reference.shape)}; "
            f"both must be the same [H, W, 3]."
        )
