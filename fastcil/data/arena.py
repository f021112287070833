"""Pixels of images that come one by one, in one buffer that grows with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LEAST = 1 << 20


class Arena:
    """Joins tensors as they come, without holding them twice.

    The buffer grows by an eighth, in place where the C library can: large blocks of memory are
    given more pages, and nothing is copied. What it has too much is handed back at the end. On a
    device there is no such growth; there parts are kept, and joined at the end.

    Example:
        >>> arena = Arena()
        >>> for value in range(3):
        ...     arena.add(torch.full((2,), value, dtype=torch.uint8))
        >>> arena.finish().tolist()
        [0, 0, 1, 1, 2, 2]
    """

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)
        self._used = 0
        self._elsewhere: list[Tensor] = []

    def add(self, part: Tensor) -> None:
        """Appends.

        Args:
            part: uint8 [P], all parts on one device.
        """
        if part.device.type != "cpu":
            self._elsewhere.append(part)
            return
        end = self._used + part.numel()
        if end > len(self._buffer):
            self._resize(max(end + end // 8, _LEAST))
        self._buffer[self._used : end] = part.numpy()
        self._used = end

    def finish(self) -> Tensor:
        """All that was appended, uint8 [P]; nothing may be appended any more."""
        if self._elsewhere:
            return torch.cat(self._elsewhere)
        self._resize(self._used)
        return torch.from_numpy(self._buffer)

    def _resize(self, nbytes: int) -> None:
        # No view of it is ever handed out before the end.
        self._buffer.resize(nbytes, refcheck=False)
