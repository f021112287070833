"""The face of a codec: how an exemplar is kept, and what it costs."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from fastcil.contract import lookup, nearest
from fastcil.data import ImageStore
from fastcil.errors import FastcilError

# Memory keeps an exemplar's label as int32.
_LABEL_NBYTES = 4


class Codec(ABC):
    """Encodes images into what memory keeps and makes that readable again.

    A codec is one file and one test, and a line in `fastcil.contract.registry`; its settings are
    keyword arguments of its constructor.
    """

    name: ClassVar[str]
    needs_boxes: ClassVar[bool] = False

    @abstractmethod
    def encode(self, images: ImageStore, boxes: Tensor | None) -> ImageStore:
        """What memory keeps of each image.

        Args:
            images: Raw images, uint8.
            boxes: int16 [N, 4], (y0, x0, y1, x1) with exclusive ends, or None.
        """

    def decode(self, encoded: ImageStore) -> ImageStore:
        """The exemplars as `fastcil.data.read_images` takes them; the same when it reads them."""
        return encoded

    @abstractmethod
    def units(self, encoded: ImageStore) -> Tensor:
        """What each exemplar costs in the papers' images, float64 [N]; a raw image costs 1."""

    def nbytes(self, encoded: ImageStore) -> Tensor:
        """What each exemplar costs in bytes, int64 [N].

        That is its pixels and 28 bytes beside them: offset (8), geometry row (16), label (4).
        """
        return encoded.image_nbytes() + _LABEL_NBYTES


def make_codec(name: str, **options: Any) -> Codec:
    """A codec by its registered name.

    Args:
        name: ``raw``, ``bbox``, or one registered by the user.
        **options: The codec's own settings.

    Raises:
        FastcilError: An unknown name or option, answered with the nearest known one; a setting
            that the codec refuses.

    Example:
        >>> make_codec("bbox", ratio=9.0).ratio
        9.0
    """
    cls = lookup("codec", name)
    known = [key for key in inspect.signature(cls).parameters if key != "self"]
    for option in options:
        if option not in known:
            advice = nearest(option, known) if known else "it has none."
            raise FastcilError(f"option '{option}' of codec '{name}' is unknown; {advice}")
    codec: Codec = cls(**options)
    return codec
