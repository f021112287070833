"""Batch norms computed with the convolution before them, while images are only looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

_Folded = dict[nn.Module, tuple[Tensor, Tensor]]
_FOLDED: ContextVar[_Folded | None] = ContextVar("folded", default=None)


@contextmanager
def folding() -> Iterator[None]:
    """Within, `conv_norm` is one convolution where no gradient is asked for.

    Each pair is folded once, when it is first called, so that its weights and statistics must stay
    as they are until the end. A pass over a batch of images, and of the time a narrow network takes
    a quarter to a third, is spared.
    """
    token = _FOLDED.set({})
    try:
        yield
    finally:
        _FOLDED.reset(token)


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    r"""A convolution and its batch norm, folded into it within `folding`.

    .. math:: y = (a W) * x + a (b - \mu) + \beta, \qquad a = \gamma / \sqrt{\sigma^2 + \epsilon}

    It is ``norm(conv(x))`` but for rounding, and just that wherever something could tell: outside
    of `folding`, with gradients, in training, in compiled code, where one of the two has a forward
    hook, or is another module than torch's.

    Args:
        conv: The convolution.
        norm: A batch norm, or what stands in its place.
        x: Its input.  # [B, C, h, w]

    Returns:
        [B, C', h', w']

    Example:
        >>> conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()
        >>> images = torch.randn(2, 3, 8, 8)
        >>> with torch.no_grad(), folding():
        ...     folded = conv_norm(conv, norm, images)
        >>> torch.allclose(folded, norm(conv(images)), atol=1e-5)
        True
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return _one_by_one(conv, norm, x)
    folded = _FOLDED.get()
    if folded is None or type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
        return _one_by_one(conv, norm, x)
    mean, variance = norm.running_mean, norm.running_var
    if norm.training or mean is None or variance is None or conv.padding_mode != "zeros":
        return _one_by_one(conv, norm, x)
    if any(part._forward_hooks or part._forward_pre_hooks for part in (conv, norm)):
        return _one_by_one(conv, norm, x)
    if norm not in folded:
        folded[norm] = fuse_conv_bn_weights(
            conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
        )
    weight, bias = folded[norm]
    return functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _one_by_one(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = norm(conv(x))
    return result
