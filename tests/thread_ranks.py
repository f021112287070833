"""Ranks that are threads of one process: what several do together, in milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from fastcil.nn import shares
from fastcil.nn.ranks import Ranks

T = TypeVar("T")


class ThreadRanks(Ranks):
    """One of several threads; collectives meet at a barrier, and their number is counted."""

    def __init__(self, rank: int, size: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self.calls = 0
        self._table, self._barrier = table, barrier

    def _exchange(self, value: T) -> list[T]:
        self.calls += 1
        self._table[self.rank] = value
        self._barrier.wait(20)
        found = list(self._table)
        self._barrier.wait(20)
        return found

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        everyone = self._exchange([tensor.detach().clone() for tensor in tensors])
        return [torch.stack(same).sum(0) for same in zip(*everyone, strict=True)]

    def gather(self, rows: Tensor, count: int) -> Tensor:
        assert len(rows) == self.counts(count)[self.rank]
        return torch.cat(self._exchange(rows.detach().clone()))

    def texts(self, text: str) -> list[str]:
        return self._exchange(text)

    def barrier(self) -> None:
        self._exchange(None)


def run_ranks(size: int, work: Callable[[ThreadRanks], T]) -> list[T]:
    """What the work gives on each of ``size`` ranks."""
    table: list[Any] = [None] * size
    barrier = threading.Barrier(size)

    def one(rank: int) -> T:
        try:
            return work(ThreadRanks(rank, size, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@contextmanager
def sharing(patch: pytest.MonkeyPatch, module: Any = shares) -> Iterator[Callable[[Ranks], Any]]:
    """Lets a module know other current ranks in each thread; gives `working_as`."""
    local = threading.local()

    @contextmanager
    def working_as(ranks: Ranks) -> Iterator[None]:
        before = getattr(local, "ranks", None)
        local.ranks = ranks
        try:
            yield
        finally:
            local.ranks = before

    with patch.context() as inner:
        inner.setattr(module, "current", lambda: getattr(local, "ranks", None) or Ranks())
        inner.setattr(module, "working_as", working_as, raising=False)
        yield working_as
