"""What ranks do together, as functions with derivatives of every order.

Tensors are of two kinds: *whole*, the same on every rank, such as parameters, logits and losses;
and in *shares*, each rank having its own, such as rows of a batch, or terms of a sum. A whole
tensor's gradient is whole, and that of a share is that of the loss, of which there is one, by the
share. Four functions lead from one kind to the other, and each is another's derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcil.nn.ranks import Ranks


def enter(tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Whole tensors, to be used on shares: what they are; their gradients are summed over ranks.

    Args:
        tensors: The same on every rank, of any shapes.
        ranks: The ranks.
    """
    return list(_Enter.apply(ranks, *tensors))


def add_up(tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """The sums over ranks of tensors, to be used as whole ones; gradients are what they are.

    Args:
        tensors: A rank's own, of the same shapes everywhere.
        ranks: The ranks.
    """
    return list(_Sum.apply(ranks, *tensors))


def own_rows(whole: Tensor, ranks: Ranks) -> Tensor:
    """This rank's share of the rows; gradients are gathered.

    Args:
        whole: The same on every rank.  # [B, ...]
        ranks: The ranks.
    """
    if torch.is_grad_enabled() and whole.requires_grad:
        own: Tensor = _Scatter.apply(ranks, whole)
        return own
    return whole[ranks.share(len(whole))]


def all_rows(own: Tensor, count: int, ranks: Ranks) -> Tensor:
    """All ranks' rows, in their order; of the gradient each has its share.

    Args:
        own: This rank's share.  # [b, ...]
        count: B, rows in all.
        ranks: The ranks.

    Returns:
        [B, ...]
    """
    whole: Tensor = _Gather.apply(ranks, count, own)
    return whole


class _Enter(torch.autograd.Function):
    """What is the same on every rank, into shares."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        ctx.set_materialize_grads(False)
        # To the letter of their strides, by which convolutions know the memory format.
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return (None, *_present(_Sum, ctx.ranks, gradients))


class _Sum(torch.autograd.Function):
    """The sum of what shares gave."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        ctx.set_materialize_grads(False)
        return tuple(ranks.sum(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return (None, *_present(_Enter, ctx.ranks, gradients))


def _present(function: Any, ranks: Ranks, gradients: tuple[Tensor | None, ...]) -> list[Any]:
    """The function of those gradients that there are, which are the same ones on every rank."""
    there = [gradient for gradient in gradients if gradient is not None]
    found = iter(function.apply(ranks, *there) if there else ())
    return [None if gradient is None else next(found) for gradient in gradients]


class _Gather(torch.autograd.Function):
    """All rows, of every rank's own."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, count: int, rows: Tensor) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(rows, count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return None, None, _Scatter.apply(ctx.ranks, gradient)
        return None, None, gradient[ctx.ranks.share(len(gradient))]


class _Scatter(torch.autograd.Function):
    """This rank's own rows, of all."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, whole: Tensor) -> Tensor:
        ctx.ranks, ctx.count = ranks, len(whole)
        # A copy: what a function returns as a view can't be changed in place.
        return whole[ranks.share(len(whole))].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, _Gather.apply(ctx.ranks, ctx.count, gradient)
