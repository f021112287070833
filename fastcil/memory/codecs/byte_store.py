"""Byte strings of any lengths: what codecs that compress images as a whole encode into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcil.data.gather import gather_bytes
from fastcil.errors import FastcilError

_ROW_NBYTES = 4 + 4  # a length, and a height and a width
_DTYPES = {"data": torch.uint8, "lengths": torch.int32, "sizes": torch.int16}


@dataclass(frozen=True, eq=False, repr=False)
class ByteStore:
    """One byte string per image, one after the other, and the size of what each decodes to.

    It has the face that memory asks of what a codec encodes into (`Encoded`), and knows nothing
    of what the bytes mean. A string of L bytes takes L + 8: an int32 for its length, two int16 for
    the image's height and width.

    Args:
        data: uint8 [P], the strings, without gaps.
        lengths: int32 [N], bytes of each.
        sizes: int16 [N, 2], height and width of each image.

    Raises:
        TypeError: A buffer of another dtype.
        FastcilError: A buffer of another shape.

    Example:
        >>> strings = [np.frombuffer(text, np.uint8) for text in (b"seal", b"otter")]
        >>> store = ByteStore.from_strings(strings, torch.tensor([[8, 6], [9, 9]]))
        >>> len(store), store.nbytes, store.image_nbytes().tolist()
        (2, 25, [12, 13])
        >>> bytes(store.select([1]).strings()[0])
        b'otter'
    """

    data: Tensor  # [P]
    lengths: Tensor  # [N]
    sizes: Tensor  # [N, 2]

    def __post_init__(self) -> None:
        count = len(self.lengths) if self.lengths.ndim else 0
        shapes = {"data": (self.data.numel(),), "lengths": (count,), "sizes": (count, 2)}
        for name, buffer in self.state().items():
            if buffer.dtype != _DTYPES[name]:
                raise TypeError(f"{name} is {buffer.dtype}; it must be {_DTYPES[name]}.")
            if buffer.shape != shapes[name]:
                raise FastcilError(
                    f"{name} has shape {tuple(buffer.shape)}; it must be {list(shapes[name])}."
                )

    def __repr__(self) -> str:
        return f"ByteStore({len(self)} strings, {self.nbytes} bytes on {self.device})"

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> ByteStore:
        """A store of nothing."""
        return cls.from_strings([], torch.empty(0, 2)).to(device)

    @classmethod
    def from_strings(cls, strings: Sequence[NDArray[np.uint8]], sizes: Tensor) -> ByteStore:
        """A store of some strings, on the CPU.

        Args:
            strings: uint8 [L] each.
            sizes: Heights and widths, [N, 2].
        """
        joined = np.concatenate(strings) if strings else np.empty(0, np.uint8)
        lengths = torch.tensor([len(string) for string in strings], dtype=torch.int32)
        return cls(torch.from_numpy(joined), lengths, sizes.to("cpu", torch.int16))

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.lengths.device

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.numel() * t.element_size() for t in self.state().values())

    def image_nbytes(self) -> Tensor:
        """Bytes that each image takes: its string and 8 bytes of metadata, int64 [N]."""
        return self.lengths.long() + _ROW_NBYTES

    def strings(self) -> list[NDArray[np.uint8]]:
        """The strings, uint8 [L] each; on the CPU they share the store's memory."""
        cuts = self.lengths.cpu().long().cumsum(0)[:-1].numpy()
        return np.split(self.data.cpu().numpy(), cuts) if len(self) else []

    def select(self, index: Tensor | Sequence[int]) -> ByteStore:
        """A compact copy of some strings, in the order given.

        Args:
            index: int64 [M] positions, or bool [N].

        Raises:
            IndexError: There is no string at one of the positions.
        """
        index = torch.as_tensor(index, device=self.device)
        index = index.nonzero().flatten() if index.dtype == torch.bool else index.long()
        starts = self.lengths.long().cumsum(0) - self.lengths
        lengths = self.lengths[index]
        data = gather_bytes(self.data, starts[index], lengths.long())
        return ByteStore(data, lengths, self.sizes[index])

    @staticmethod
    def cat(stores: Sequence[ByteStore]) -> ByteStore:
        """One store of all strings, in order.

        Raises:
            FastcilError: No store.
        """
        if not stores:
            raise FastcilError("stores is empty; pass at least one ByteStore.")
        return ByteStore(
            torch.cat([s.data for s in stores]),
            torch.cat([s.lengths for s in stores]),
            torch.cat([s.sizes for s in stores]),
        )

    def to(self, device: torch.device | str) -> ByteStore:
        """The same strings on another device."""
        return ByteStore(self.data.to(device), self.lengths.to(device), self.sizes.to(device))

    def state(self) -> dict[str, Tensor]:
        """The buffers, by name."""
        return {"data": self.data, "lengths": self.lengths, "sizes": self.sizes}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ByteStore:
        """The store whose `state` it was.

        Raises:
            TypeError: A buffer of another dtype.
            FastcilError: A buffer that is missing, or that does not fit the others.
        """
        missing = [name for name in _DTYPES if name not in state]
        if missing:
            raise FastcilError(f"state has no {missing[0]!r}; pass what ByteStore.state() gave.")
        store = cls(*(state[name] for name in _DTYPES))
        total = int(store.lengths.sum())
        if total != len(store.data) or bool((store.lengths < 0).any()):
            raise FastcilError(
                f"lengths sum up to {total} for {len(store.data)} bytes of data; they must be the "
                f"lengths of the strings there."
            )
        if bool((store.sizes < 1).any()):
            raise FastcilError("sizes has a side below 1; images have at least 1 pixel.")
        return store
