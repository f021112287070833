"""The processes that train one network together, as everything below the engine sees them.

There is one unless the engine says otherwise (`fastcil.engine.distributed`): then every function
here gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


class Ranks:
    """One process by itself; a subclass speaks for several.

    Attributes:
        rank: This process's number, from 0.
        size: How many there are.

    Example:
        >>> import torch
        >>> alone = Ranks()
        >>> alone.share(5), alone.first
        (slice(0, 5, None), True)
        >>> alone.sum([torch.ones(2)])
        [tensor([1., 1.])]
    """

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def counts(self, rows: int) -> list[int]:
        """How many of so many rows each rank has: as even as can be, the first ones more."""
        few, more = divmod(rows, self.size)
        return [few + (rank < more) for rank in range(self.size)]

    def share(self, rows: int) -> slice:
        """Which of so many rows are this rank's: contiguous, in the order of the ranks."""
        counts = self.counts(rows)
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of tensors over all ranks, bit for bit the same everywhere."""
        return list(tensors)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """All ranks' rows of ``count`` in all, in the order of the ranks.

        Args:
            rows: This rank's `share`.  # [n, ...]
            count: Rows in all.

        Returns:
            [count, ...]
        """
        return rows

    def texts(self, text: str) -> list[str]:
        """Every rank's text."""
        return [text]

    def barrier(self) -> None:
        """Waits until every rank is here."""


_current = Ranks()


def current() -> Ranks:
    """The ranks that this process is one of."""
    return _current


@contextmanager
def working_as(ranks: Ranks) -> Iterator[None]:
    """Makes ``ranks`` the `current` ones meanwhile.

    Example:
        >>> with working_as(Ranks()):
        ...     current().size
        1
    """
    global _current
    before, _current = _current, ranks
    try:
        yield
    finally:
        _current = before
