"""Exemplars kept as they came."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcil.data import ImageStore
from fastcil.memory.codecs.codec import Codec


class RawCodec(Codec[ImageStore]):
    """Every pixel is kept.

    Example:
        >>> store = ImageStore.from_batch(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
        >>> codec = RawCodec()
        >>> codec.nbytes(codec.encode(store, None)).tolist()  # 8 * 8 * 3 + 28
        [220, 220]
    """

    name = "raw"
    leaves_images = True

    def encode(self, images: ImageStore, marks: Tensor | None = None) -> ImageStore:
        """The images themselves; marks are not looked at."""
        return images

    def units(self, encoded: ImageStore) -> Tensor:
        """One image each, whatever its size, float64 [N]."""
        return torch.ones(len(encoded), dtype=torch.float64, device=encoded.pixels.device)
