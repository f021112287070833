"""A part of a network computed in shares: each rank does some rows of the batch, and all get all.

Everything around such a part is computed by every rank alike, on the whole batch: objectives,
heads, inner steps, selection. So nothing else has to know that there are ranks, no loss has to be
a mean over samples, and what is not computed in shares is not faster, but as right. Parameters
enter the part by a function whose derivative is the sum over ranks, and rows leave it by one that
gathers them, whose derivative takes one's own (`fastcil.nn.collectives`). Every gradient that
anyone takes, by ``backward`` or by ``torch.autograd.grad``, once or twice, is whole, and the same
on every rank.

``DistributedDataParallel`` does less: it reduces what one ``backward`` leaves in parameters, with
one forward pass before it, and so knows nothing of gradients of gradients (CIM's mask step), of
``functional_call``, of several backward passes in a step (GEM, MER), of parameters that come with
a task, or of losses that are no mean over samples. Here one sum of all gradients of an extractor
follows its backward pass, instead of sums in pieces while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from fastcil.nn.collectives import all_rows, enter, own_rows
from fastcil.nn.ranks import Ranks, current, working_as
from fastcil.nn.shared_norm import shared_batch_norm


def in_shares(module: nn.Module, function: Callable[[Tensor], Any], images: Tensor) -> Any:
    """Applies a function of a batch's rows, each rank to its share of them.

    Batch norms in training mode take their statistics over all ranks' rows. Fewer rows than ranks
    are computed by every rank, as are modules with forward hooks, whose owner expects the whole
    batch, those that draw random numbers by `torch.nn.Dropout` and its kin, of which every rank
    would draw the same ones, and calls under a transform of ``torch.func``. In a share there are no
    further shares.

    Args:
        module: Holds all parameters that the function uses.
        function: Computes with ``module``, one row of each result for each image.
        images: The same on every rank.  # [B, ...]

    Returns:
        What ``function`` gives for all images, a tensor or a list or tuple of them, on every rank.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> in_shares(layer, layer, torch.zeros(4, 2)).shape
        torch.Size([4, 3])
    """
    ranks = current()
    if ranks.size == 1 or len(images) < ranks.size or not _divisible(module):
        return function(images)
    rows = len(images)
    with _entering(module, ranks), working_as(Ranks()), _SharedNorms(ranks, rows):
        found = function(own_rows(images, ranks))
    if isinstance(found, Tensor):
        return all_rows(found, rows, ranks)
    whole = [all_rows(part, rows, ranks) for part in found]
    return tuple(whole) if isinstance(found, tuple) else whole


def _divisible(module: nn.Module) -> bool:
    """Whether the module's parts do to some rows what they do to all of them, and nobody looks."""
    for part in module.modules():
        drops = isinstance(part, _DropoutNd | nn.RReLU) and part.training
        if drops or part._forward_hooks or part._forward_pre_hooks:
            return False
    return torch._C._functorch.peek_interpreter_stack() is None


@contextmanager
def _entering(module: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Lets the module compute with parameters whose gradients are summed over ranks."""
    trained: dict[Tensor, Tensor] = {}
    owners = []
    if torch.is_grad_enabled():
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    owners.append((part._parameters, name, parameter))
                    trained[parameter] = parameter
    if trained:
        trained = dict(zip(trained, enter(list(trained), ranks), strict=True))
    # What holds a Parameter may hold any tensor, as functional_call does it.
    held: Any
    for held, name, parameter in owners:
        held[name] = trained[parameter]
    try:
        yield
    finally:
        for held, name, parameter in owners:
            held[name] = parameter


class _SharedNorms(TorchFunctionMode):
    """Makes batch norms that look at a batch look at all ranks' rows of it."""

    def __init__(self, ranks: Ranks, rows: int) -> None:
        super().__init__()
        self.ranks, self.rows = ranks, rows

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.batch_norm:
            return self._norm(*args, **kwargs)
        return function(*args, **kwargs)

    def _norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """`torch.nn.functional.batch_norm`."""
        if not training:
            return functional.batch_norm(
                x, running_mean, running_var, weight, bias, False, momentum, eps
            )
        counts = self.ranks.counts(self.rows)
        each = x.numel() // x.shape[1] // counts[self.ranks.rank]
        positions = [count * each for count in counts]
        y, mean, variance = shared_batch_norm(x, weight, bias, eps, positions, self.ranks)
        total = sum(positions)
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean), momentum)
            if running_var is not None:
                unbiased = variance * (total / max(1, total - 1))
                running_var.lerp_(unbiased.to(running_var), momentum)
        return y
