"""Large results on the CPU take the memory of earlier ones that are gone, and of no others."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from fastcil import ops

pytestmark = pytest.mark.skipif(
    not ops.extension_available(), reason="the C++ kernels are not built"
)
MIB = 1 << 20
RELU = (
    torch.tensor([0.029975, 0.616908, 2.374325, 3.063234, 1.522585, 0.252338]),
    torch.tensor([1.191093, 4.404015, 0.909820, 0.348195]),
)


def pade(level, mebibytes=6):
    return ops.pade(torch.full((mebibytes, 512, 512), level), *RELU)


def soft_compose(level):
    images = torch.full((2, 3, 512, 512), level).contiguous(memory_format=torch.channels_last)
    return ops.soft_compose(images, torch.ones(2, 7, 7))


def read_batch(level):
    pixels = torch.full((12,), int(50 * level), dtype=torch.uint8)
    index = torch.zeros(8, dtype=torch.int64)
    geometry = torch.tensor([[2, 2, 0, 0, 2, 2, 0, 0]] * 8, dtype=torch.int16)
    flat = (0.0,) * 3, (1.0,) * 3
    return ops.read_batch([pixels], index, index, geometry, (256, 256), *flat)


@pytest.mark.parametrize("make", [pade, soft_compose, read_batch])
def test_only_a_result_that_is_gone_leaves_its_memory(make):
    first = make(1.0)
    place, expected = first.data_ptr(), first.clone()
    assert first.nbytes >= 4 * MIB
    part = first[1:]  # keeps it all
    del first
    others = [make(level) for level in (2.0, 3.0, 4.0)]
    assert len({place, *(other.data_ptr() for other in others)}) == 4
    assert torch.equal(part, expected[1:]) and not torch.equal(others[0], expected)
    del part
    again = make(1.0)
    assert again.data_ptr() == place and torch.equal(again, expected)
    assert again.stride() == expected.stride()


def test_where_fresh_memory_is_filled_none_is_recycled(poison):
    place = pade(1.0).data_ptr()
    with poison():
        first, other = pade(1.0), pade(2.0)
        assert place not in (first.data_ptr(), other.data_ptr())
    assert pade(1.0).data_ptr() == place


def test_a_result_may_be_resized():
    y = pade(1.0)
    y.resize_(8, 512, 512)
    assert y.shape[0] == 8 and bool((y[:6] == y[0, 0, 0]).all())


def test_threads_share_it():
    expected = {level: pade(level) for level in (1.0, 2.0)}
    wrong = []

    def work(level):
        for _ in range(40):
            if not torch.equal(pade(level), expected[level]):
                wrong.append(level)

    workers = [threading.Thread(target=work, args=(level,)) for level in expected]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is not told")
def test_what_is_kept_is_bounded():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / MIB

    before = resident()
    results = [pade(1.0, 64) for _ in range(8)]
    held = resident()
    assert held > before + 200  # some of the 512 may have been kept from before
    del results
    assert resident() < held - 512 + 256 + 32
