"""The face of a codec: how an exemplar is kept, and what it costs."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor

from fastcil.contract import Retained, lookup, nearest
from fastcil.data import ImageStore
from fastcil.errors import FastcilError

# Memory keeps an exemplar's label as int32.
_LABEL_NBYTES = 4


class Encoded(Protocol):
    """What a codec encodes into: N images in some form, whose buffers are all that is kept.

    `fastcil.data.ImageStore` is one, for pixels, and `ByteStore` another, for byte strings.
    """

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        ...

    def __len__(self) -> int: ...

    def image_nbytes(self) -> Tensor:
        """Bytes that each image takes, int64 [N]; their sum is ``nbytes``."""
        ...

    def select(self, index: Tensor | Sequence[int]) -> Encoded:
        """A compact copy of some images, with buffers of its own."""
        ...

    def to(self, device: torch.device | str) -> Encoded:
        """The same on another device."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The buffers, by name; ``labels`` is memory's own."""
        ...

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Encoded:
        """What had this state; raises a FastcilError for buffers that don't fit together."""
        ...

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> Encoded:
        """No image."""
        ...

    @staticmethod
    def cat(stores: Sequence[Any]) -> Encoded:
        """All images in one, in order."""
        ...


E = TypeVar("E", bound=Encoded)


class Codec(ABC, Generic[E]):
    """Encodes images into what memory keeps and makes that readable again.

    A codec is one file and one test, and a line in `fastcil.contract.registry`; its settings are
    keyword arguments of its constructor, and those that are plain values are options of a run
    (`fastcil.memory.codecs.settings`). What it encodes into is its ``store``: an `ImageStore`
    if the reader takes it as it is, else a `ByteStore` or a class of its own.

    One that keeps some of an image better than the rest is told by its ``marks`` what matters,
    one row for each image: ``boxes``, int16 [N, 4], (y0, x0, y1, x1) with exclusive ends; or
    ``maps``, float32 [N, h, w] from 0 to 1, each of them stretched over its whole image. One that
    ``leaves_images`` as they are remembers every pixel of them.
    """

    name: ClassVar[str]
    marks: ClassVar[Literal["boxes", "maps"] | None] = None
    store: ClassVar[type[Encoded]] = ImageStore
    leaves_images: ClassVar[bool] = False

    @abstractmethod
    def encode(self, images: ImageStore, marks: Tensor | None) -> E:
        """What memory keeps of each image.

        Args:
            images: Raw images, uint8.
            marks: What matters in each image, in the form that ``Codec.marks`` names, or None.
        """

    def decode(self, encoded: E) -> ImageStore:
        """The exemplars as `fastcil.data.read_images` takes them; the same when it reads them.

        Memory asks once, until what it holds changes, and counts what is made as working bytes.
        """
        return cast(ImageStore, encoded)

    def faithful(self, encoded: E) -> Tensor | None:
        """Where what is remembered is the image itself, whatever is made of the rest.

        Returns:
            bool [sum of H W], row-major, image after image; None where no pixel is better than
            another.
        """
        return None

    @abstractmethod
    def units(self, encoded: E) -> Tensor:
        """What each exemplar costs in the papers' images, float64 [N]; a raw image costs 1."""

    def nbytes(self, encoded: E) -> Tensor:
        """What each exemplar costs in bytes, int64 [N]: its part of the store, and 4 for its label.

        In an `ImageStore` that is its pixels and 28 bytes beside them: offset (8), geometry row
        (16), label (4); in a `ByteStore` its string and 12: length (4), size (4), label (4).
        """
        return encoded.image_nbytes() + _LABEL_NBYTES

    def check(self, images: ImageStore) -> None:
        """Raises, before anything is trained, unless it can encode these images."""

    def verify(self, encoded: E) -> None:
        """Raises unless this can be decoded; asked of new exemplars before images are given up."""

    def retained(self) -> list[Retained]:
        """What reading exemplars needs beside them, such as a network's weights."""
        return []

    def state(self) -> dict[str, Tensor]:
        """What it has beside its settings, which a saved memory needs to go on."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back what ``state`` gave."""

    def succeed(self, before: Codec[Any], held: E) -> Tensor:
        """Which exemplars it goes on with where it takes the place of another codec, bool [N].

        Args:
            before: The codec that encoded them.
            held: All exemplars of a memory.
        """
        return torch.ones(len(held), dtype=torch.bool)

    def to(self, device: torch.device | str) -> None:
        """Where its networks, if it has some, are to compute; images stay where they are."""

    def release(self) -> None:
        """Lets go of what can be made anew."""

    @property
    def working_nbytes(self) -> int:
        """Bytes of what can be made anew, decoded images aside."""
        return 0


def make_codec(name: str, **options: Any) -> Codec[Any]:
    """A codec by its registered name.

    Args:
        name: ``raw``, ``bbox``, ``jpeg``, ``sparse``, ``learned``, or one registered by the user.
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
    codec: Codec[Any] = cls(**options)
    return codec
