"""One number for all that some buffers hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def checksum(buffers: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, whatever the order and the devices.

    Example:
        >>> two, four = torch.ones(2), torch.ones(4)
        >>> checksum({"a": two, "b": four}) == checksum({"b": four, "a": two})
        True
    """
    digest = hashlib.sha256()
    for name, buffer in sorted(buffers.items()):
        digest.update(f"{name} {buffer.dtype} {list(buffer.shape)};".encode())
        flat = buffer.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
