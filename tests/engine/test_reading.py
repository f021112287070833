"""Ranks read a batch in shares, and all get the bits that one process reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from thread_ranks import ThreadRanks, run_ranks, sharing
from torch import Tensor

from fastcil.contract import Batch, Stream, Views
from fastcil.data import Augmentation, Examples, ImageStore, read_batch
from fastcil.engine import reading
from fastcil.engine.context import EngineContext
from fastcil.engine.loader import Loader

CPU = torch.device("cpu")
# Every kind of draw: crops, flips, a policy of pixel operations, Cutout.
BUSY = Augmentation(6, min_scale=0.2, policy="cifar", cutout=2)


def examples(count: int, first: int = 0) -> Examples:
    rng = np.random.default_rng(first)
    images = [rng.integers(0, 256, (9 + k % 3, 8 + k % 2, 3), np.uint8) for k in range(count)]
    return Examples(ImageStore.from_images(images), torch.arange(first, first + count))


def batches() -> list[Batch]:
    """Two steps of two streams, whose last batches are small; the first has simulated views."""
    new, old = examples(9), examples(2, first=9)
    boxes = torch.tensor([[1, 1, 6, 7]]).expand(9, 4).short()
    streams = Stream((new, old), 8, views=Views(boxes, probability=0.5)), Stream((old,), 4)
    loader = Loader(streams, BUSY, CPU, (3, 1))
    return [batch for step in range(2) for batch in loader.batches(0, step)]


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_whole_batch_and_reads_its_share(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = batches()
    read: dict[int, list[int]] = {rank: [] for rank in range(size)}

    with sharing(monkeypatch, reading) as working_as:

        def work(ranks: ThreadRanks) -> list[Batch]:
            with working_as(ranks):
                return batches()

        def counted(stores, which, *rest, **named) -> Tensor:
            read[reading.current().rank].append(len(which))
            return read_batch(stores, which, *rest, **named)

        monkeypatch.setattr(reading, "read_batch", counted)
        found = run_ranks(size, work)
    for mine in found:
        for batch, whole in zip(mine, alone, strict=True):
            assert torch.equal(batch.images, whole.images)
            assert torch.equal(batch.labels, whole.labels)
            assert torch.equal(batch.index, whole.index)
    for step, whole in enumerate(alone):
        counts = [read[rank][step] for rank in range(size)]
        if len(whole) < size:
            assert counts == [len(whole)] * size
        else:
            assert sum(counts) == len(whole) and max(counts) - min(counts) <= 1


def test_a_scan_is_read_in_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    context = EngineContext(torch.nn.Identity, BUSY, CPU, batch_size=4)
    held = examples(7)
    alone = context.scan(lambda images: images.flatten(1), held)

    with sharing(monkeypatch, reading) as working_as:

        def work(ranks: ThreadRanks) -> tuple[Tensor, int]:
            with working_as(ranks):
                return context.scan(lambda images: images.flatten(1), held), ranks.calls

        found = run_ranks(2, work)
    assert all(torch.equal(rows, alone) and calls == 2 for rows, calls in found)


def test_what_moves_is_gathered_as_bytes_and_what_a_gpu_holds_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = examples(4).images
    zero, every = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    crops, flips = BUSY.draw(store.sizes, torch.Generator())
    dtypes = []

    class Two(ThreadRanks):
        def gather(self, rows: Tensor, count: int) -> Tensor:
            dtypes.append(rows.dtype)
            return torch.cat([rows, rows])

    monkeypatch.setattr(reading, "current", lambda: Two(0, 2, [], None))
    for wanted in (CPU, torch.device("meta")):
        images = reading.read_together([store], zero, every, BUSY, crops, flips, wanted)
        assert (images.shape, images.dtype) == ((4, 3, 6, 6), torch.float32)
        assert images.device == wanted
    assert dtypes == [torch.float32, torch.uint8]

    class OnGpu:
        device = torch.device("cuda")

    monkeypatch.setattr(reading, "read_batch", lambda stores, which, *_: len(which))
    assert reading.read_together([OnGpu()], zero, every, BUSY, crops, flips, CPU) == 4
