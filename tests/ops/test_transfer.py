"""Tensors packed, sent and unpacked: the same again, wherever they go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcil.ops import send

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def build_tensors() -> list[Tensor]:
    """Of many dtypes and layouts, some empty, of lengths that fit no alignment."""
    images = torch.randn(2, 3, 5, 4)
    return [
        torch.arange(7),
        torch.tensor(True),
        torch.randn(3, 3, dtype=torch.float64),
        images.contiguous(memory_format=torch.channels_last),
        images[:, :, ::2],
        torch.randint(0, 256, (5,), dtype=torch.uint8),
        torch.empty(0, 4, dtype=torch.int16),
        torch.ones(1).expand(6),
        torch.randn(2, 3).t(),
    ]


def check(sent: list[Tensor], tensors: list[Tensor], device: torch.device) -> None:
    for one, other in zip(sent, tensors, strict=True):
        assert (one.device.type, one.dtype) == (device.type, other.dtype)
        assert torch.equal(one.cpu(), other)
    assert sent[3].is_contiguous(memory_format=torch.channels_last)


def test_what_is_there_is_handed_back() -> None:
    tensors = build_tensors()
    assert all(a is b for a, b in zip(send(tensors, CPU), tensors, strict=True))


def test_what_is_packed_is_unpacked() -> None:
    """``cpu:0`` is another device by name, and the way there is that to any other."""
    tensors = build_tensors()
    sent = send([*tensors, None], torch.device("cpu:0"))
    assert sent.pop() is None
    check(sent, tensors, CPU)  # type: ignore[arg-type]
    assert not any(a is b for a, b in zip(sent, tensors, strict=True))
    assert len({tensor.untyped_storage().data_ptr() for tensor in sent if tensor.numel()}) == 1


@pytest.mark.gpu
def test_a_device_gets_it_without_a_wait() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tensors = build_tensors()
    torch.zeros(1, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sent = send(tensors, CUDA)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(sent, tensors, CUDA)
