"""Batch normalisation by the statistics of all ranks' rows.

torch's own (``nn.SyncBatchNorm``) is for CUDA alone and has no second derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.nn.collectives import add_up, enter
from fastcil.nn.ranks import Ranks


def shared_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    positions: Sequence[int],
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Normalises each channel by mean and variance over the rows of all ranks.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    (Ioffe and Szegedy 2015, Alg. 1.) Every rank's mean and squared deviations are gathered, and put
    together by their counts (Chan et al. 1979), so that uneven shares are exact. The derivative
    takes one sum over ranks; second derivatives are those of `plain_batch_norm`.

    Args:
        x: This rank's rows, one at least.  # [b, C, ...]
        weight: gamma, or None for 1; its gradient is that of this rank's rows.  # [C]
        bias: beta, or None for 0; likewise.  # [C]
        eps: epsilon.
        positions: Values of a channel that each rank has, by rank.
        ranks: The ranks.

    Returns:
        y, as x; mu and sigma^2 (that of the batch, not the unbiased one), without derivatives, in
        float32 or better.  # [C] each

    Raises:
        FastcilError: There is one value per channel in all.

    Example:
        >>> x = torch.tensor([[1.0, 5.0], [3.0, 9.0]])
        >>> y, mean, variance = shared_batch_norm(x, None, None, 0.0, [2], Ranks())
        >>> y.tolist(), mean.tolist(), variance.tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [2.0, 7.0], [1.0, 4.0])
    """
    if sum(positions) < 2:
        raise FastcilError(
            "images is a batch of one value per channel, which has no variance for batch norm to "
            "normalise by; use larger batches."
        )
    found: tuple[Tensor, Tensor, Tensor] = _SharedBatchNorm.apply(
        x, weight, bias, eps, tuple(positions), ranks
    )
    return found


def plain_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, count: int, ranks: Ranks
) -> Tensor:
    """As `shared_batch_norm`, of functions that have derivatives of every order.

    Args:
        x: This rank's rows.  # [b, C, ...]
        weight: gamma, or None.  # [C]
        bias: beta, or None.  # [C]
        eps: epsilon.
        count: Values of a channel, of all ranks.
        ranks: The ranks.
    """
    over = _all_but_channels(x)
    wide = x.to(_wide(x))
    centred = wide - _along(_total(wide.sum(over), ranks) / count, x)
    variance = _total(centred.square().sum(over), ranks) / count
    y = centred * _along(torch.rsqrt(variance + eps), x)
    if weight is not None:
        y = y * _along(weight, x)
    if bias is not None:
        y = y + _along(bias, x)
    return y.to(x.dtype)


class _SharedBatchNorm(torch.autograd.Function):
    """The same by the fused kernels for a batch norm in evaluation, and a correction."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        positions: tuple[int, ...],
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # In one pass less than `torch.var_mean`, and by channels_last as fast.
        mean, variance = torch.batch_norm_update_stats(x.to(_wide(x)), None, None, 0.0)
        # What each rank counts goes with it: numbers out of the host's memory would be waited for.
        count = torch.full_like(mean, positions[ranks.rank])
        own = torch.stack([mean, variance, count])[None]  # [1, 3, C]
        means, variances, counts = ranks.gather(own, ranks.size).unbind(1)  # [R, C] each
        total = sum(positions)
        mean = (means * counts).sum(0) / total
        between = (means - mean).square()
        variance = ((variances + between) * counts).sum(0) / total
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.eps, ctx.total, ctx.ranks = eps, total, ranks
        ctx.mark_non_differentiable(mean, variance)
        return (
            functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps),
            mean,
            variance,
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance = ctx.saved_tensors
        if torch.is_grad_enabled():
            y = plain_batch_norm(x, weight, bias, ctx.eps, ctx.total, ctx.ranks)
            asked = [
                tensor
                for tensor, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False)
                if needed
            ]
            found = iter(torch.autograd.grad(y, asked, gradient, create_graph=True))
            first = [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]
            return (*first, None, None, None)
        inverse = torch.rsqrt(variance + ctx.eps)
        # With fixed statistics: the gradients of x, and of scale and shift on this rank's rows. On
        # CUDA they are read from where those of a batch would be.
        fixed = (mean, variance, mean, inverse, False, ctx.eps)
        gx, scale, shift = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, *fixed, [True, True, True]
        )
        scale, shift = (part.to(mean.dtype) for part in (scale, shift))
        # What each row does to mean and variance, and these to all rows.
        all_scale, all_shift = ctx.ranks.sum([scale, shift])
        factor = inverse / ctx.total if weight is None else inverse * weight / ctx.total
        slope = factor * inverse * all_scale
        offset = factor * all_shift - slope * mean
        wide = gx.to(mean.dtype).addcmul_(x.to(mean.dtype), _along(slope, x), value=-1)
        return (
            wide.sub_(_along(offset, x)).to(x.dtype),
            None if weight is None else scale.to(weight.dtype),
            None if bias is None else shift.to(bias.dtype),
            None,
            None,
            None,
        )


def _total(own: Tensor, ranks: Ranks) -> Tensor:
    """A sum over all ranks' rows, to be used on shares of them."""
    return enter(add_up([own], ranks), ranks)[0]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _all_but_channels(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _along(values: Tensor, x: Tensor) -> Tensor:
    """A value for each channel, in the shape of x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))
