"""Batch norms that look at a batch and remember nothing of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms in a module.

    Example:
        >>> len(batch_norms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
        1
    """
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


@contextmanager
def batch_statistics(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Lets batch norms normalise by the batch at hand, and leaves their running statistics alone.

    Args:
        norms: In training or in evaluation mode, which they are in again afterwards.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(2).eval()
        >>> with batch_statistics([norm]):
        ...     norm(torch.tensor([[1.0, 5.0], [3.0, 9.0]])).mean(0).abs().lt(1e-6).tolist()
        [True, True]
        >>> norm.running_mean.tolist(), norm.training
        ([0.0, 0.0], False)
    """
    norms = list(norms)
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracking) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracking
