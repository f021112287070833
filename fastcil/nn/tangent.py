"""Layers that carry a value and, beside it, its derivative along a displacement of the weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcil.errors import FastcilError


class TangentPair(NamedTuple):
    """What a layer of the augmented propagation gives."""

    primal: Tensor  # y, of the network as it was
    tangent: Tensor | None  # dy, the derivative of y along the weights' displacement; None: zero


class TangentConv2d(nn.Module):
    r"""A convolution linearised at its weights.

    .. math:: y = W_0 * x + b_0, \qquad \partial y = W * x + b + W_0 * \partial x

    (Mu et al. 2020; Shon et al. 2022, Table 4.) The displacement W, b is what is trained and starts
    at zero; W_0, b_0 are buffers. Curvature of the displacement is made of the primal input x and
    of the gradient at the tangent output.

    Args:
        conv: The convolution; its weights are copied.

    Attributes:
        weight: W.  # [out_channels, in_channels / groups, kh, kw]
        bias: b, or None where the convolution has none.  # [out_channels]
        base_weight: W_0.  # as weight
        base_bias: b_0, or None.  # [out_channels]

    Example:
        >>> layer = TangentConv2d(nn.Conv2d(3, 8, 3, padding=1))
        >>> pair = layer(torch.randn(2, 3, 5, 5))
        >>> pair.primal.shape, bool(pair.tangent.any())
        (torch.Size([2, 8, 5, 5]), False)
    """

    weight: nn.Parameter
    base_weight: Tensor
    base_bias: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation
        self.groups, self.padding_mode = conv.groups, conv.padding_mode
        sides = self._sides()
        uneven = any(before != after for before, after in sides)  # "same" for an even kernel
        # What the convolution cannot pad itself, as functional.pad takes it: last dimension first.
        self._around: tuple[int, ...] | None = None
        if uneven or self.padding_mode != "zeros":
            self._around = tuple(side for pad in reversed(sides) for side in pad)
        _start_at_zero(self, conv)

    def _sides(self) -> list[tuple[int, int]]:
        """Pixels of padding before and after, in each dimension."""
        if self.padding == "valid":
            return [(0, 0)] * len(self.kernel_size)
        if isinstance(self.padding, str):
            whole = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return [(total // 2, total - total // 2) for total in whole]
        return [(pad, pad) for pad in self.padding]

    def forward(self, x: Tensor, dx: Tensor | None = None) -> TangentPair:
        """The convolution and its derivative.

        Args:
            x: Input.  # [B, C, h, w]
            dx: Its tangent; None for zero, which costs nothing.  # [B, C, h, w]

        Returns:
            y and dy.  # [B, C', h', w'] each
        """
        padding: Any = self.padding
        if self._around is not None:
            padding = 0
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = functional.pad(x, self._around, mode)
            dx = None if dx is None else functional.pad(dx, self._around, mode)
        how: tuple[Any, ...] = self.stride, padding, self.dilation, self.groups
        y = functional.conv2d(x, self.base_weight, self.base_bias, *how)
        dy = functional.conv2d(x, self.weight, self.bias, *how)
        if dx is not None:
            # One convolution of [x, dx] takes as long in the forward pass, longer in the backward.
            dy = dy.add_(functional.conv2d(dx, self.base_weight, None, *how))
        return TangentPair(y, dy)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}, "
            f"groups={self.groups}, padding_mode={self.padding_mode!r}"
        )


class TangentLinear(nn.Module):
    r"""A linear layer linearised at its weights, as ``TangentConv2d``.

    .. math:: y = W_0 x + b_0, \qquad \partial y = W x + b + W_0 \partial x

    Args:
        linear: The layer; its weights are copied.
        flat: Whether it takes nothing but [B, in_features]: a batch norm that was folded into it
            has its channels last only there.

    Attributes:
        weight: W.  # [out_features, in_features]
        bias: b, or None.  # [out_features]
        base_weight: W_0.  # as weight
        base_bias: b_0, or None.  # [out_features]

    Example:
        >>> layer = TangentLinear(nn.Linear(4, 2))
        >>> layer(torch.randn(3, 4), torch.randn(3, 4)).tangent.shape
        torch.Size([3, 2])
    """

    weight: nn.Parameter
    base_weight: Tensor
    base_bias: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, flat: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.flat = flat
        _start_at_zero(self, linear)

    def forward(self, x: Tensor, dx: Tensor | None = None) -> TangentPair:
        """The layer and its derivative.

        Args:
            x: Input.  # [..., in_features]
            dx: Its tangent; None for zero, which costs nothing.  # [..., in_features]

        Returns:
            y and dy.  # [..., out_features] each

        Raises:
            FastcilError: If ``flat`` and x has not two dimensions.
        """
        if self.flat and x.dim() != 2:
            raise FastcilError(
                f"x has shape {tuple(x.shape)}; a linear layer with a batch norm folded into it "
                f"takes [B, {self.in_features}]: nn.Flatten before it would do."
            )
        y = functional.linear(x, self.base_weight, self.base_bias)
        dy = functional.linear(x, self.weight, self.bias)
        if dx is not None:
            dy = dy.add_(functional.linear(dx, self.base_weight))
        return TangentPair(y, dy)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class FrozenAffine(nn.Module):
    """A batch norm in evaluation that could not be folded: y = a x + c in each channel, dy = a dx.

    It has no displacement of its own: it is a fixed part of the network.

    Args:
        norm: A batch norm with running statistics.

    Attributes:
        scale: a = gamma / sqrt(var + eps).  # [C]
        shift: c = beta - a mean.  # [C]

    Example:
        >>> layer = FrozenAffine(nn.BatchNorm2d(3, eps=0.0))
        >>> layer(torch.ones(1, 3, 2, 2))[0].sum()
        tensor(12.)
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm) -> None:
        super().__init__()
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            raise FastcilError(
                "norm has no running statistics, and so no fixed map; track_running_stats=True "
                "would do."
            )
        scale = torch.rsqrt(variance + norm.eps)
        if norm.affine:
            scale = norm.weight.detach() * scale
        shift = -mean * scale
        self.register_buffer("scale", scale)
        self.register_buffer("shift", norm.bias.detach() + shift if norm.affine else shift)

    def forward(self, x: Tensor, dx: Tensor | None = None) -> TangentPair:
        """The map, and its derivative if ``dx`` is given.  # [B, C, ...] -> [B, C, ...] each."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = self.scale.view(shape)
        y = torch.addcmul(self.shift.view(shape), x, scale)
        return TangentPair(y, None if dx is None else dx * scale)


def _start_at_zero(layer: TangentConv2d | TangentLinear, base: nn.Conv2d | nn.Linear) -> None:
    layer.register_buffer("base_weight", base.weight.detach().clone())
    layer.weight = nn.Parameter(torch.zeros_like(base.weight))
    bias = base.bias
    layer.register_buffer("base_bias", None if bias is None else bias.detach().clone())
    layer.register_parameter("bias", None if bias is None else nn.Parameter(torch.zeros_like(bias)))


def activation_tangent(y: Tensor, dy: Tensor, slope: float = 0.0) -> Tensor:
    r"""Derivative of a (leaky) ReLU, by the sign of what it gives.

    .. math:: \partial y = \partial x \odot (1[x > 0] + \alpha 1[x \le 0])

    (Shon et al. 2022, Table 4.) With a slope of at least 0 the sign of the activation is that of
    its input, so that no mask is kept: the activation is, for the next layer.

    Args:
        y: The activation, max(x, 0) + slope min(x, 0).  # any shape
        dy: The tangent of its input x.  # as y
        slope: alpha, at least 0.

    Returns:
        The tangent of y.  # as y

    Example:
        >>> activation_tangent(torch.tensor([-0.1, 0.0, 2.0]), torch.ones(3), slope=0.1)
        tensor([0.1000, 0.1000, 1.0000])
    """
    # What autograd calls for a gradient; here it is a tangent, and has derivatives of all orders.
    if slope == 0:
        return torch.ops.aten.threshold_backward(dy, y, 0)
    return torch.ops.aten.leaky_relu_backward(dy, y, slope, True)


def pooled_tangent(dx: Tensor, places: Tensor) -> Tensor:
    """The tangent of each window's greatest value (Shon et al. 2022, Table 4).

    Args:
        dx: Tangent of the input of a max-pool.  # [B, C, h, w]
        places: Indices that ``max_pool2d`` returned.  # int64 [B, C, h', w']

    Returns:
        Tangent of its output, in the memory format of dx.  # [B, C, h', w']

    Example:
        >>> dx = torch.arange(4.0).view(1, 1, 2, 2)
        >>> pooled_tangent(dx, torch.tensor([[[[2]]]])).item()
        2.0
    """
    flat, index = dx.flatten(2), places.flatten(2)  # [B, C, h w], [B, C, h' w']
    # By strides, for torch.vmap tells no memory format.
    channels_last = flat.stride(1) == 1
    picked = flat.mT.gather(1, index.mT).mT if channels_last else flat.gather(2, index)
    return picked.unflatten(2, places.shape[2:])
