"""One batch of training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images of one training step.

    Args:
        images: Augmented and normalised, float [B, 3, h, w], channels_last.
        labels: int64 [B], in learning order.
        part: int64 [B], which part of its stream each image came from (0 is, by convention, the
            task's new data and 1 the exemplars).
        index: int64 [B], the image's position in that part.
        entry: int64 [B] on the CPU, which entry of its stream's ``pool`` each image is, for a
            stage whose books are kept on the host; None for batches joined or made by hand.
    """

    images: Tensor  # [B, 3, h, w]
    labels: Tensor  # [B]
    part: Tensor  # [B]
    index: Tensor  # [B]
    entry: Tensor | None = None  # [B]

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        """Joins batches in order; one batch is handed back as it is."""
        if len(batches) == 1:
            return batches[0]
        return Batch(
            torch.cat([b.images for b in batches]),
            torch.cat([b.labels for b in batches]),
            torch.cat([b.part for b in batches]),
            torch.cat([b.index for b in batches]),
        )
