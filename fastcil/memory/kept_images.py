"""Images that a record looks at again, saved with the module that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcil.data import ImageStore

_DTYPES = {"pixels": torch.uint8, "offsets": torch.int64, "geometry": torch.int16}


class KeptImages(nn.Module):
    """An image store whose parts are buffers; empty at first.

    Example:
        >>> kept = KeptImages()
        >>> kept.add(ImageStore.from_batch(torch.zeros(2, 4, 4, 3, dtype=torch.uint8)))
        >>> len(kept.store), list(kept.state_dict())
        (2, ['pixels', 'offsets', 'geometry'])
    """

    pixels: Tensor
    offsets: Tensor
    geometry: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, dtype in _DTYPES.items():
            shape: Sequence[int] = (0, 8) if name == "geometry" else (0,)
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    @property
    def store(self) -> ImageStore:
        """The images."""
        return ImageStore(self.pixels, self.offsets, self.geometry)

    def add(self, images: ImageStore) -> None:
        """Keeps some more, on the device where the others are."""
        joined = ImageStore.cat([self.store, images.to(self.pixels.device)])
        for name, value in joined.state().items():
            setattr(self, name, value)
