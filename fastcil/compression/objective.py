"""The rate-distortion objective of learned codecs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def rate_distortion(out: Mapping[str, Any], x: Tensor, lmbda: Tensor) -> dict[str, Tensor]:
    r"""Rate in bits per pixel plus λ times distortion, averaged over the batch.

    .. math:: L = \frac1B \sum_b \Big[ \frac{-\sum_i \log_2 p(z_{b,i})}{H W}
        + \lambda_b \, \mathrm{MSE}(2 \hat x_b - 1, 2 x_b - 1) \Big]

    The MSE is on the -1..1 scale: four times that of images in 0..1. CompressAI's objective has
    :math:`\lambda' 255^2` times the latter, so
    :math:`\lambda = \lambda' \, 255^2 / 4`: its 0.0018 is 29 here, its 0.0483 is 785.

    Args:
        out: A model's output: ``x_hat`` and ``log_likelihoods``.
        x: Images in 0..1.  # [B, 3, H, W]
        lmbda: # [B]

    Returns:
        Scalars ``loss`` = ``bpp`` + ``distortion``, ``distortion`` = mean of λ · MSE, and ``mse``,
        the mean MSE on the -1..1 scale.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 3, 4, 4)
        >>> out = {"x_hat": x + 0.5, "log_likelihoods": {"y": torch.full((1, 8), 0.25).log()}}
        >>> parts = rate_distortion(out, x, torch.tensor([32.0]))
        >>> {name: value.item() for name, value in parts.items()}
        {'loss': 33.0, 'bpp': 1.0, 'distortion': 32.0, 'mse': 1.0}
    """
    pixels = x.shape[-2] * x.shape[-1]
    logs = [value.float().flatten(1).sum(1) for value in out["log_likelihoods"].values()]
    bpp = sum(logs[1:], start=logs[0]) / (-math.log(2) * pixels)  # [B]
    mse = squared_error(out["x_hat"], x)  # [B]
    distortion = lmbda * mse
    return {
        "loss": (bpp + distortion).mean(),
        "bpp": bpp.mean(),
        "distortion": distortion.mean(),
        "mse": mse.mean(),
    }


def squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean squared error of each image on the -1..1 scale: four times that in 0..1.

    Args:
        x_hat: Reconstructions of images in 0..1.  # [B, 3, H, W]
        x: What they should be.  # [B, 3, H, W]

    Returns:
        float32 [B].

    Example:
        >>> import torch
        >>> squared_error(torch.full((1, 3, 2, 2), 0.5), torch.zeros(1, 3, 2, 2))
        tensor([1.])
    """
    return 4 * (x_hat.float() - x.float()).square().flatten(1).mean(1)
