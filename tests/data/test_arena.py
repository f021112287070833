"""Pixels joined as they come: the same bytes, held once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastcil.data import ImageStore
from fastcil.data.arena import Arena


@pytest.mark.parametrize("sizes", [[], [0], [5], [1, 0, 3], [1 << 20, 1, 3 << 20, 7], [999] * 3000])
def test_all_parts_are_there_in_order(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    parts = [torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for n in sizes]
    arena = Arena()
    for part in parts:
        arena.add(part)
    joined = arena.finish()
    assert torch.equal(joined, torch.cat([torch.empty(0, dtype=torch.uint8), *parts]))
    assert joined.untyped_storage().nbytes() == sum(sizes)


def resident(field: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def test_images_that_are_read_are_held_once() -> None:
    peak = Path("/proc/self/clear_refs")
    count, side = 300, 700
    total = count * side * side * 3  # 441 MB
    try:
        peak.write_text("5")
    except OSError:
        pytest.skip("needs Linux, where the peak of memory can be set back")
    before = resident("VmRSS")
    store = ImageStore.from_images(
        np.full((side, side, 3), k % 256, np.uint8) for k in range(count)
    )
    most = resident("VmHWM") - before
    assert len(store) == count and int(store.image(299)[0, 0, 0]) == 299 % 256
    # An eighth more than the images while it grows, instead of all of them again.
    assert total * 0.95 < most < 1.3 * total
    assert resident("VmRSS") - before < 1.1 * total
