"""Generalised divisive normalisation, and the floor that its parameters keep."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PEDESTAL = 2.0**-36
_LEAST_BETA = 1e-6


class _Floor(torch.autograd.Function):
    """max(x, bound), whose gradient passes where it would lift x off the bound."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp_min(bound)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return torch.where((x >= ctx.bound) | (outer[0] < 0), outer[0], 0), None


def floor(x: Tensor, bound: float) -> Tensor:
    """max(x, bound) that descent can leave again: below, only gradients that raise x pass.

    Example:
        >>> x = torch.tensor([-1.0, -1.0, 2.0], requires_grad=True)
        >>> (floor(x, 0.0) * torch.tensor([1.0, -1.0, 1.0])).sum().backward()
        >>> x.grad
        tensor([ 0., -1.,  1.])
    """
    floored: Tensor = _Floor.apply(x, bound)
    return floored


class GDN(nn.Module):
    r"""Divides each channel by a norm over all channels, or multiplies by it.

    .. math:: y_i = x_i \Big/ \sqrt{\beta_i + \sum_j \gamma_{ij} x_j^2}

    (Ballé et al. 2016, *Density modeling of images using a generalized normalization
    transformation*, with its exponents at 2 and 1/2); ``inverse`` multiplies instead.
    :math:`\beta` and :math:`\gamma` are kept as roots, squared on use, so that they stay positive.

    Args:
        channels: C.
        inverse: Multiply instead.

    Example:
        >>> GDN(2)(torch.ones(1, 2, 1, 1)).flatten()
        tensor([0.9535, 0.9535], grad_fn=<...>)
    """

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta_root = nn.Parameter((torch.ones(channels) + _PEDESTAL).sqrt())
        self.gamma_root = nn.Parameter((0.1 * torch.eye(channels) + _PEDESTAL).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """The normalised map, of the input's shape [B, C, h, w]."""
        beta = floor(self.beta_root, (_LEAST_BETA + _PEDESTAL) ** 0.5).square() - _PEDESTAL
        gamma = floor(self.gamma_root, _PEDESTAL**0.5).square() - _PEDESTAL
        square = F.conv2d(x.square(), gamma[:, :, None, None], beta)
        return x * (square.sqrt() if self.inverse else square.rsqrt())
