"""Convolutions whose bits are the same again on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def same_kernels() -> Iterator[None]:
    """Lets cuDNN use deterministic algorithms, chosen by shapes and not by how long they took.

    `torch.backends.cudnn.flags` would set TF32 too, which is the user's to choose.

    Example:
        >>> with same_kernels():
        ...     torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        (True, False)
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
