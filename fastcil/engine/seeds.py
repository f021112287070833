"""Random streams that are functions of what they are for, so that resuming needs no history."""

from __future__ import annotations

import numpy as np
import torch


def mix(*key: int) -> int:
    """One well-mixed 63-bit seed from a tuple of non-negative numbers.

    Example:
        >>> mix(0, 1) != mix(1, 0)
        True
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))


def generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by ``key``: the same key gives the same draws, whenever asked."""
    return torch.Generator().manual_seed(mix(*key))
