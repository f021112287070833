"""Images of which only some pixels are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcil.data import ImageStore
from fastcil.errors import FastcilError
from fastcil.memory.codecs.byte_store import ByteStore
from fastcil.memory.codecs.masks import (
    FORMS,
    Runs,
    mask_lengths,
    mask_nbytes,
    read_masks,
    second_of,
    smallest_form,
    write_masks,
)

# Pixels handled at once: what is made on the way takes some 30 bytes for each.
_STRETCH = 1 << 22
# So that a mask and all pixels are fewer bytes than an int32 counts.
_LARGEST_AREA = 1 << 29


@dataclass(frozen=True, eq=False, repr=False)
class SparseStore:
    """Of each image the pixels that a mask keeps, and the mask in its smallest form.

    An image's string is its mask, then 3 bytes for each of its k kept pixels in row-major order.
    The mask is nothing where all pixels are kept, 2 k bytes of coordinates (4 k with a side above
    256), run lengths, or H W / 8 bytes of bits, whichever is least (`fastcil.memory.codecs.masks`
    has the layout). Beside its string an image takes 9 bytes: an int32 for the string's length,
    two int16 for height and width, a uint8 for the form.

    Args:
        strings: Masks and pixels, and the images' sizes.
        forms: Positions in `FORMS` (full, coo, runs, bitmask), uint8 [N].

    Raises:
        TypeError: Forms of another dtype.
        FastcilError: Not one form for each string.

    Example:
        >>> images = ImageStore.from_batch(torch.full((2, 8, 8, 3), 90, dtype=torch.uint8))
        >>> keep = torch.zeros(2, 8, 8, dtype=torch.bool)
        >>> keep[0, 2, 3:5] = True
        >>> keep[1] = True
        >>> store = SparseStore.from_masks(images, keep.flatten())
        >>> store.kept().tolist(), [FORMS[form] for form in store.forms.tolist()]
        ([2, 64], ['runs', 'full'])
        >>> store.image_nbytes().tolist()  # 2 + 3 * 2 + 9, 3 * 64 + 9
        [17, 201]
    """

    strings: ByteStore
    forms: Tensor  # [N]

    def __post_init__(self) -> None:
        if self.forms.dtype != torch.uint8:
            raise TypeError(f"forms is {self.forms.dtype}; it must be torch.uint8.")
        if self.forms.shape != (len(self.strings),):
            raise FastcilError(
                f"forms has shape {tuple(self.forms.shape)}; it must be [{len(self.strings)}]."
            )

    def __repr__(self) -> str:
        return f"SparseStore({len(self)} images, {self.nbytes} bytes on {self.device})"

    def __len__(self) -> int:
        return len(self.forms)

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> SparseStore:
        """A store of nothing."""
        return cls(ByteStore.empty(device), torch.empty(0, dtype=torch.uint8, device=device))

    @classmethod
    def from_masks(cls, images: ImageStore, masks: Tensor) -> SparseStore:
        """Keeps of each image what its mask says.

        Args:
            images: N images; packed ones are reconstructed.
            masks: True where a pixel is kept, bool [sum of H W], row-major, image after image.

        Raises:
            FastcilError: Masks of another dtype or length, or one that keeps no pixel at all; an
                image of more than 2^29 pixels.
        """
        areas = images.sizes.prod(1)
        check_masks(masks, areas)
        if bool((areas > _LARGEST_AREA).any()):
            raise FastcilError(
                f"images has one of {int(areas.amax())} pixels; a sparse one may have {1 << 29}."
            )
        masks = masks.to(images.device)
        parts, first = [cls.empty(images.device)], 0
        for rows in stretches(areas):
            part = images.select(rows).reconstruct()
            last = first + len(part.pixels) // 3
            parts.append(cls._from_part(part, masks[first:last]))
            first = last
        return cls.cat(parts)

    @classmethod
    def _from_part(cls, images: ImageStore, masks: Tensor) -> SparseStore:
        """The same for images whose pixels are few enough and lie in order."""
        runs = Runs.of(masks, images.sizes.prod(1))
        kept, nbytes = runs.kept(), mask_nbytes(runs, images.sizes)
        if bool((kept == 0).any()):
            raise FastcilError("masks keeps no pixel of some image; keep at least one of each.")
        forms = smallest_form(nbytes)
        in_front = nbytes.gather(1, forms.long()[:, None])[:, 0]
        is_pixel = second_of(in_front, 3 * kept)
        data = torch.empty(len(is_pixel), dtype=torch.uint8, device=images.device)
        data.masked_scatter_(is_pixel, images.pixels.view(-1, 3)[masks])
        data.masked_scatter_(~is_pixel, write_masks(runs, images.sizes, forms))
        lengths = (in_front + 3 * kept).to(torch.int32)
        return cls(ByteStore(data, lengths, images.sizes.to(torch.int16)), forms)

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.forms.device

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.strings.nbytes + self.forms.numel()

    @property
    def sizes(self) -> Tensor:
        """Heights and widths, int64 [N, 2]."""
        return self.strings.sizes.long()

    def image_nbytes(self) -> Tensor:
        """Bytes that each image takes: its string and 9 bytes of metadata, int64 [N]."""
        return self.strings.image_nbytes() + 1

    def kept(self) -> Tensor:
        """Pixels kept of each image, int64 [N]."""
        return (self.strings.lengths - self._mask_lengths()) // 3

    def masks(self) -> Tensor:
        """True where a pixel is kept, bool [sum of H W], row-major, image after image."""
        none = self.forms.new_empty(0).bool()
        return torch.cat([none, *(p._part_masks(p._mask_lengths()) for p in self._parts())])

    def images(self) -> ImageStore:
        """The images, raw; dropped pixels are zeros."""
        return self.read()[0]

    def read(self) -> tuple[ImageStore, Tensor]:
        """`images` and `masks` in one go."""
        parts, masks = [ImageStore.empty(self.device)], [self.forms.new_empty(0).bool()]
        for part in self._parts():
            lengths = part._mask_lengths()
            keep = part._part_masks(lengths)
            is_pixel = second_of(lengths, part.strings.lengths - lengths)
            pixels = torch.zeros(len(keep), 3, dtype=torch.uint8, device=self.device)
            pixels.masked_scatter_(keep[:, None], part.strings.data[is_pixel])
            parts.append(ImageStore.from_pixels(pixels.flatten(), part.sizes))
            masks.append(keep)
        return ImageStore.cat(parts), torch.cat(masks)

    def select(self, index: Tensor | Sequence[int]) -> SparseStore:
        """A compact copy of some images, in the order given.

        Args:
            index: int64 [M] positions, or bool [N].

        Raises:
            IndexError: There is no image at one of the positions.
        """
        index = torch.as_tensor(index, device=self.device)
        index = index if index.dtype == torch.bool else index.long()
        return SparseStore(self.strings.select(index), self.forms[index])

    @staticmethod
    def cat(stores: Sequence[SparseStore]) -> SparseStore:
        """One store of all images, in order.

        Raises:
            FastcilError: No store.
        """
        if not stores:
            raise FastcilError("stores is empty; pass at least one SparseStore.")
        return SparseStore(
            ByteStore.cat([store.strings for store in stores]),
            torch.cat([store.forms for store in stores]),
        )

    def to(self, device: torch.device | str) -> SparseStore:
        """The same images on another device."""
        return SparseStore(self.strings.to(device), self.forms.to(device))

    def state(self) -> dict[str, Tensor]:
        """The buffers, by name."""
        return {**self.strings.state(), "forms": self.forms}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SparseStore:
        """The store whose `state` it was.

        Raises:
            TypeError: A buffer of another dtype.
            FastcilError: A buffer that is missing, or that does not fit the others; a mask that
                does not fit its image.
        """
        if "forms" not in state:
            raise FastcilError("state has no 'forms'; pass what SparseStore.state() gave.")
        store = cls(ByteStore.from_state(state), state["forms"])
        store.masks()
        return store

    def _parts(self) -> Iterator[SparseStore]:
        """The store in stretches."""
        rows = list(stretches(self.sizes.prod(1)))
        return (self.select(row) for row in rows) if len(rows) > 1 else iter([self] * len(rows))

    def _mask_lengths(self) -> Tensor:
        """Bytes of each mask, int64 [N]."""
        strings = self.strings
        return mask_lengths(strings.data, strings.lengths.long(), self.sizes, self.forms)

    def _part_masks(self, lengths: Tensor) -> Tensor:
        """The flat masks of a stretch, of so many bytes each."""
        pixels = self.strings.lengths - lengths
        written = self.strings.data[~second_of(lengths, pixels)]
        return read_masks(written, lengths, pixels // 3, self.sizes, self.forms)


def stretches(areas: Tensor, most: int = _STRETCH) -> Iterator[Tensor]:
    """Positions of images that follow each other, of some pixels together.

    Args:
        areas: Pixels of each image, int64 [N].
        most: Pixels of a stretch, its last image aside.

    Example:
        >>> [rows.tolist() for rows in stretches(torch.tensor([3, 3, 3, 9]), most=5)]
        [[0, 1], [2, 3]]
    """
    number = (areas.cumsum(0) - areas) // most
    counts = torch.unique_consecutive(number, return_counts=True)[1].tolist()
    yield from torch.arange(len(areas), device=areas.device).split(counts)


def check_masks(masks: Tensor, areas: Tensor) -> None:
    """Raises unless masks are flat ones for images of these areas, int64 [N]."""
    total = int(areas.sum())
    if masks.dtype != torch.bool or masks.shape != (total,):
        raise FastcilError(
            f"masks is {masks.dtype} of shape {tuple(masks.shape)}; it must be torch.bool of shape "
            f"[{total}], one for every pixel of {len(areas)} images."
        )


def form_nbytes(masks: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """Bytes of each image's mask and kept pixels in every form, beside those of a raw image.

    With k of H x W pixels kept, coordinates in a byte each cost 5 k against 3 H W: they begin to
    pay below 60 % kept. Bits cost H W / 8 + 3 k, which pays below 96 %.

    Args:
        masks: True where a pixel is kept, bool [sum of H W], row-major, image after image.
        sizes: Heights and widths, [N, 2].

    Returns:
        int64 [N] each: ``raw``, ``coo``, ``runs``, ``bitmask``, and ``smallest``, which is what
        `SparseStore` takes; an image of which all is kept costs no mask there. What stands beside
        the string, 9 bytes an image, is in none.

    Raises:
        FastcilError: Masks of another dtype or length.

    Example:
        >>> keep = torch.zeros(32, 32, dtype=torch.bool)
        >>> keep[8:24, 8:24] = True
        >>> nbytes = form_nbytes(keep.flatten(), torch.tensor([[32, 32]]))
        >>> {name: int(each) for name, each in nbytes.items()}
        {'raw': 3072, 'coo': 1280, 'runs': 801, 'bitmask': 896, 'smallest': 801}
    """
    sizes = sizes.to(masks.device, torch.int64)
    areas = sizes.prod(1)
    check_masks(masks, areas)
    found, first = [torch.empty(5, 0, dtype=torch.int64, device=masks.device)], 0
    for rows in stretches(areas):
        last = first + int(areas[rows].sum())
        runs = Runs.of(masks[first:last], areas[rows])
        pixels = 3 * runs.kept()
        each = mask_nbytes(runs, sizes[rows])
        total = torch.cat([each[:, 1:], each.amin(1, keepdim=True)], 1) + pixels[:, None]
        found.append(torch.cat([3 * areas[rows][None], total.T]))
        first = last
    names = ("raw", *FORMS[1:], "smallest")
    return dict(zip(names, torch.cat(found, 1), strict=True))
