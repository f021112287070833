"""Anything kept for old tasks, with its size in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["exemplars", "logits", "generator", "codec", "curvature", "network", "analysis"]
"""What an entry is: curvature and networks beyond the first count only under ``count="all"``.

``analysis`` is what only records look at, which no budget counts and no training sees.
"""


@dataclass(frozen=True)
class Retained:
    """Something kept for old tasks: its buffers are what it costs.

    Args:
        name: What the report calls it.
        kind: Which budget it falls under.
        buffers: Every tensor held, by name.

    Example:
        >>> import torch
        >>> Retained("logits of task 0", "logits", {"values": torch.zeros(10, 5)}).nbytes
        200
    """

    name: str
    kind: Kind
    buffers: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.numel() * b.element_size() for b in self.buffers.values())
