"""The one way in which the entropy model is computed wherever bits depend on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


@contextmanager
def fixed_mode() -> Iterator[None]:
    """One thread on the CPU, no autocast, no gradients; as before on leaving.

    Sums that are split among threads, and vector loops that end elsewhere in each share, give
    other last bits. On one thread the same operations on the same shapes give the same bits on the
    same machine and versions; nothing is said of other machines.

    Example:
        >>> with fixed_mode():
        ...     torch.get_num_threads()
        1
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


def fixed_copy(module: _Module, dtype: torch.dtype) -> _Module:
    """A frozen copy on the CPU, whose parameters and buffers have another dtype, in plain order.

    Example:
        >>> fixed_copy(nn.Linear(2, 3), torch.float64).weight.dtype
        torch.float64
    """
    copied = copy.deepcopy(module).eval().requires_grad_(False)
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data = laid_out(tensor, dtype)
    return copied


def laid_out(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU in plain memory order, so that no stride tells where it came from.

    Example:
        >>> laid_out(torch.zeros(1, 2, 1, 1).to(memory_format=torch.channels_last),
        ...          torch.float64).stride()
        (2, 1, 1, 1)
    """
    return x.detach().to("cpu", dtype).flatten().clone().view(x.shape)
