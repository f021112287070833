"""Class activation maps: which places of an image speak for its class."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcil.errors import FastcilError


def check_maps(features: Tensor, class_weights: Tensor) -> None:
    """Raises unless feature maps [B, C, h, w] and classifier rows [B, C] belong together."""
    if features.ndim != 4 or 0 in features.shape[1:]:
        raise FastcilError(
            f"features has shape {tuple(features.shape)}; it must be [B, C, h, w] with C, h and w "
            "at least 1."
        )
    if class_weights.shape != features.shape[:2]:
        raise FastcilError(
            f"class_weights has shape {tuple(class_weights.shape)}; it must be "
            f"{tuple(features.shape[:2])}, one row per image of features."
        )
    for name, tensor in (("features", features), ("class_weights", class_weights)):
        if not tensor.is_floating_point():
            raise FastcilError(f"{name} has dtype {tensor.dtype}; it must be floating point.")


def cam(features: Tensor, class_weights: Tensor) -> Tensor:
    r"""The class activation map of each image, scaled to [0, 1].

    .. math:: M = \frac{A - \min A}{\max A - \min A}, \qquad A = \sum_c w_c F_c

    (Luo et al. 2023, Eq. 1), minimum and maximum over the positions of one image. A map that is
    constant to within rounding says nothing about where the object is, and becomes zeros with zero
    gradient. Computed in float32 at least, also under autocast; differentiable twice.

    Args:
        features: Feature maps F before pooling.  # [B, C, h, w]
        class_weights: For each image the classifier's row w of its class.  # [B, C]

    Returns:
        M.  # [B, h, w], float32, or float64 if ``features`` is

    Raises:
        FastcilError: If the shapes do not belong together or a dtype is not floating point.

    Example:
        >>> features = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])  # [1, 1, 2, 2]
        >>> cam(features, torch.tensor([[0.5]]))
        tensor([[[0.0000, 0.2500],
                 [0.5000, 1.0000]]])
    """
    check_maps(features, class_weights)
    dtype = torch.promote_types(features.dtype, torch.float32)
    # A product and a sum: autocast would round a matrix product to half precision, and every
    # position is summed in the same order, so that constant features give a constant map.
    weighted = features.to(dtype) * class_weights.to(dtype)[:, :, None, None]
    activation = weighted.sum(1)  # [B, h, w]
    low = activation.amin((1, 2), keepdim=True)
    high = activation.amax((1, 2), keepdim=True)
    span = high - low
    rounding = 16 * torch.finfo(dtype).eps * torch.maximum(high.abs(), low.abs())
    constant = (span <= rounding).detach()
    scaled = (activation - low) / torch.where(constant, 1.0, span)
    return torch.where(constant, 0.0, scaled)
