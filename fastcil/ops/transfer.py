"""Small tensors made on the host, sent to a device without a wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; what a view as any dtype needs, and vector loads are glad of

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def send(tensors: Sequence[MaybeTensor], device: torch.device) -> list[MaybeTensor]:
    """Sends tensors to a device, packed into one transfer that the host does not wait for.

    A plain ``to(device)`` out of pageable memory waits until the device has come to the copy, once
    for each tensor. Here the bytes go through one pinned buffer, which torch keeps until they were
    read.

    Args:
        tensors: Of any dtypes and shapes; None stays None, and what is on the device already stays
            where it is.
        device: Where they are wanted.

    Returns:
        The tensors there, contiguous or channels_last as they were.

    Example:
        >>> one, none = send([torch.ones(2), None], torch.device("cpu"))
        >>> one, none
        (tensor([1., 1.]), None)
    """
    sent = list(tensors)
    places = [k for k, t in enumerate(sent) if t is not None and not _is_on(t, device)]
    if not places:
        return sent
    rows = [_dense(sent[place].detach()) for place in places]  # type: ignore[union-attr]
    ends = [0]
    for row in rows:
        ends.append(ends[-1] - (-row.nbytes // _ALIGNMENT) * _ALIGNMENT)
    pinned = device.type == "cuda" and all(row.device.type == "cpu" for row in rows)
    buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=pinned)
    for start, row in zip(ends, rows, strict=False):
        _part(buffer, start, row).copy_(row)
    there = buffer.to(device, non_blocking=True)
    for place, start, row in zip(places, ends, rows, strict=False):
        sent[place] = _part(there, start, row)
    return sent


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device; one without a number is any of its type."""
    there = tensor.device
    return there.type == device.type and device.index in (None, there.index)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor with its elements side by side."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.contiguous()


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes from ``start`` on as a tensor like another."""
    flat = buffer[start : start + like.nbytes].view(like.dtype)
    return flat.as_strided(like.shape, like.stride())
