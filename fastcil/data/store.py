"""Images as packed uint8 in one buffer: never one Python object per image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcil import ops
from fastcil.data.arena import Arena
from fastcil.data.gather import gather_bytes
from fastcil.data.pixels import as_tensor, check_side
from fastcil.errors import FastcilError
from fastcil.ops._packed import check_images, check_rows

_ROW_NBYTES = 8 + 16  # an offset and a row of geometry


@dataclass(frozen=True, eq=False, repr=False)
class ImageStore:
    """Images of any sizes, one after the other, raw or packed.

    A raw image is its H x W x 3 bytes. A packed one is a box at full resolution and a coarse grid
    of what lies around it (Luo et al. 2023, Eq. 3, 4); the layout is `fastcil.ops.pack`'s.

    A store may share its pixels with others: as a `view` of some images of another store, or of a
    memory-mapped file. It is read as any other; what is counted, joined, saved or moved elsewhere
    is then its own images alone.

    Args:
        pixels: uint8 [P].
        offsets: int64 [N], first byte of each image.
        geometry: int16 [N, 8], rows (H, W, y0, x0, y1, x1, gh, gw).
        shared: Whether ``pixels`` may hold more than these images, or in another order.
        mapped: Of the file that ``pixels`` is a read-only map of, a checksum; None where they are
            in memory. What is mapped is shared.

    Raises:
        TypeError: A buffer of another dtype.
        FastcilError: A buffer of another shape.

    Example:
        >>> store = ImageStore.from_batch(np.zeros((2, 8, 6, 3), dtype=np.uint8))
        >>> len(store), store.nbytes, store.sizes.tolist()
        (2, 336, [[8, 6], [8, 6]])
        >>> boxes = torch.tensor([[2, 2, 6, 4], [0, 0, 0, 0]], dtype=torch.int16)
        >>> packed = store.compress(boxes)
        >>> packed.image_nbytes().tolist()
        [78, 60]
        >>> packed.image(0).shape
        torch.Size([8, 6, 3])
    """

    pixels: Tensor  # [P]
    offsets: Tensor  # [N]
    geometry: Tensor  # [N, 8]
    shared: bool = False
    mapped: str | None = None

    def __post_init__(self) -> None:
        check_images(self.pixels, self.offsets, self.geometry)

    def __repr__(self) -> str:
        return f"ImageStore({len(self)} images, {self.nbytes} bytes on {self.pixels.device})"

    @classmethod
    def from_images(cls, images: Iterable[np.ndarray[Any, Any] | Tensor]) -> ImageStore:
        """A raw store of images of any sizes.

        Args:
            images: uint8 [H, W, 3] each, RGB. Each is copied as it comes, and not kept.

        Raises:
            FastcilError: An image of another dtype or shape, or with a side above 32767; its
                position is named.
        """
        arena = Arena()
        sizes: list[tuple[int, int]] = []
        for number, image in enumerate(images):
            tensor = as_tensor(image, f"images[{number}]")
            if tensor.ndim != 3 or tensor.shape[2] != 3:
                raise FastcilError(
                    f"images[{number}] has shape {tuple(tensor.shape)}; it must be [H, W, 3]."
                )
            check_side(tensor.shape[0], tensor.shape[1], f"images[{number}]")
            sizes.append((tensor.shape[0], tensor.shape[1]))
            arena.add(tensor.reshape(-1))
        heights_widths = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
        return cls.from_pixels(arena.finish(), heights_widths)

    @classmethod
    def from_batch(cls, images: np.ndarray[Any, Any] | Tensor) -> ImageStore:
        """A raw store of images of one size; the batch is not copied where it is contiguous.

        Args:
            images: uint8 [N, H, W, 3], RGB.

        Raises:
            FastcilError: Another dtype or shape.
        """
        tensor = as_tensor(images, "images")
        if tensor.ndim != 4 or tensor.shape[3] != 3:
            raise FastcilError(f"images has shape {tuple(tensor.shape)}; it must be [N, H, W, 3].")
        check_side(tensor.shape[1], tensor.shape[2], "images")
        sizes = torch.tensor(tensor.shape[1:3]).expand(len(tensor), 2)
        return cls.from_pixels(tensor.reshape(-1), sizes)

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> ImageStore:
        """A store of nothing.

        Example:
            >>> len(ImageStore.empty()), ImageStore.empty().nbytes
            (0, 0)
        """
        none = torch.empty(0, dtype=torch.uint8, device=device)
        return cls.from_pixels(none, torch.empty(0, 2, dtype=torch.int64))

    @classmethod
    def from_pixels(cls, pixels: Tensor, sizes: Tensor) -> ImageStore:
        """A store of raw images of these sizes, which fill ``pixels`` in order.

        Args:
            pixels: uint8 [P], kept as it is.
            sizes: Heights and widths, int64 [N, 2].
        """
        sizes = sizes.to(pixels.device)
        nbytes = sizes.prod(1) * 3
        zeros = torch.zeros_like(sizes)
        geometry = torch.cat([sizes, zeros, sizes, zeros], 1).to(torch.int16)
        return cls(pixels, nbytes.cumsum(0) - nbytes, geometry)

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.offsets.device

    @property
    def nbytes(self) -> int:
        """Bytes of the images and their metadata: those of all buffers, unless they are shared."""
        if self.shared:
            return int(self.image_nbytes().sum())
        return sum(t.numel() * t.element_size() for t in self.state().values())

    @property
    def sizes(self) -> Tensor:
        """Heights and widths, int64 [N, 2]."""
        return self.geometry[:, :2].long()

    @property
    def boxes(self) -> Tensor:
        """What is kept at full resolution, int16 [N, 4] (y0, x0, y1, x1)."""
        return self.geometry[:, 2:6]

    def image_nbytes(self) -> Tensor:
        """Bytes that each image takes: its pixels and its 24 bytes of metadata, int64 [N]."""
        return ops.packed_nbytes(self.geometry) + _ROW_NBYTES

    def image(self, index: int) -> Tensor:
        """One image as it is seen, uint8 [H, W, 3].

        Raises:
            IndexError: There is no such image.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index is {index}, but there are {len(self)} images")
        rows = slice(index % len(self), index % len(self) + 1)
        geometry = self.geometry[rows]
        pixels, _ = ops.reconstruct(self.pixels, self.offsets[rows], geometry)
        height, width = geometry[0, :2].tolist()
        return pixels.view(height, width, 3)

    def view(self, index: Tensor | Sequence[int]) -> ImageStore:
        """Some images, in the order given, which share the pixels with this store.

        Args:
            index: int64 [M] positions, or bool [N].

        Raises:
            IndexError: There is no image at one of the positions.

        Example:
            >>> store = ImageStore.from_batch(np.zeros((3, 8, 6, 3), dtype=np.uint8))
            >>> some = store.view([2, 0])
            >>> some.offsets.tolist(), some.pixels is store.pixels, some.nbytes
            ([288, 0], True, 336)
        """
        index = torch.as_tensor(index, device=self.offsets.device)
        index = index if index.dtype == torch.bool else index.long()
        return replace(
            self, offsets=self.offsets[index], geometry=self.geometry[index], shared=True
        )

    def compact(self, device: torch.device | None = None) -> ImageStore:
        """A copy in which the images stand one after the other, and nothing else.

        Args:
            device: Where to; None for where they are. Of shared pixels nothing else is moved.
        """
        nbytes = ops.packed_nbytes(self.geometry)
        pixels = gather_bytes(self.pixels, self.offsets, nbytes, device)
        offsets, geometry = nbytes.cumsum(0) - nbytes, self.geometry
        return ImageStore(pixels, offsets.to(pixels.device), geometry.to(pixels.device))

    def select(self, index: Tensor | Sequence[int]) -> ImageStore:
        """A compact copy of some images, in the order given; `view` shares the pixels instead.

        Args:
            index: int64 [M] positions, or bool [N].

        Raises:
            IndexError: There is no image at one of the positions.
        """
        return self.view(index).compact()

    def part(self, index: Tensor | Sequence[int]) -> ImageStore:
        """Some images to go on with: a copy, so that the rest can be let go; of a file a view."""
        return self.view(index) if self.mapped is not None else self.select(index)

    @staticmethod
    def cat(stores: Sequence[ImageStore]) -> ImageStore:
        """One store of all images, in order.

        Raises:
            FastcilError: No store.
        """
        if not stores:
            raise FastcilError("stores is empty; pass at least one ImageStore.")
        stores = [store.compact() if store.shared else store for store in stores]
        starts = torch.tensor([0] + [s.pixels.numel() for s in stores]).cumsum(0).tolist()
        return ImageStore(
            torch.cat([s.pixels for s in stores]),
            torch.cat([s.offsets + start for s, start in zip(stores, starts[:-1], strict=True)]),
            torch.cat([s.geometry for s in stores]),
        )

    def to(self, device: torch.device | str) -> ImageStore:
        """The same images on another device; where they are there already, this very store."""
        wanted = torch.empty(0, device=device).device  # with a number, as tensors have it
        if wanted == self.device:
            return self
        if self.shared:
            return self.compact(wanted)
        return ImageStore(self.pixels.to(wanted), self.offsets.to(wanted), self.geometry.to(wanted))

    def compress(self, boxes: Tensor, ratio: float = 4.0) -> ImageStore:
        """Packs raw images: the box stays, what lies outside is downsampled (`fastcil.ops.pack`).

        Args:
            boxes: int16 [N, 4], one (y0, x0, y1, x1) per image.
            ratio: Downsampling ratio eta, in area.
        """
        return ImageStore(*ops.pack(self.pixels, self.offsets, self.geometry, boxes, ratio))

    def reconstruct(self) -> ImageStore:
        """The images as they are seen, in a raw store."""
        pixels, _ = ops.reconstruct(self.pixels, self.offsets, self.geometry)
        return ImageStore.from_pixels(pixels, self.sizes)

    def state(self) -> dict[str, Tensor]:
        """The buffers, by name; compact ones where the pixels are shared."""
        if self.shared:
            return self.compact().state()
        return {"pixels": self.pixels, "offsets": self.offsets, "geometry": self.geometry}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> ImageStore:
        """The store whose `state` it was.

        Raises:
            TypeError: A buffer of another dtype.
            FastcilError: A buffer that is missing, or that does not fit the others.
        """
        missing = [name for name in ("pixels", "offsets", "geometry") if name not in state]
        if missing:
            raise FastcilError(f"state has no {missing[0]!r}; pass what ImageStore.state() gave")
        store = cls(state["pixels"], state["offsets"], state["geometry"])
        check_rows(store.pixels.numel(), store.offsets, store.geometry)
        return store


@dataclass(frozen=True, eq=False)
class Examples:
    """Images and their labels.

    Args:
        images: The store.
        labels: int64 [N].

    Raises:
        FastcilError: Labels that are not int64, or not one per image.

    Example:
        >>> images = ImageStore.from_batch(np.zeros((3, 8, 6, 3), dtype=np.uint8))
        >>> examples = Examples(images, torch.tensor([0, 1, 0]))
        >>> len(examples.select(examples.labels == 0))
        2
    """

    images: ImageStore
    labels: Tensor  # [N]

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.int64:
            raise FastcilError(f"labels is {self.labels.dtype}; it must be torch.int64.")
        if self.labels.shape != (len(self.images),):
            raise FastcilError(
                f"labels has shape {tuple(self.labels.shape)} for {len(self.images)} images; "
                f"it must be [{len(self.images)}]."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor | Sequence[int]) -> Examples:
        """A compact copy of some examples, in the order given."""
        index = torch.as_tensor(index, device=self.labels.device)
        index = index if index.dtype == torch.bool else index.long()
        return Examples(self.images.select(index), self.labels[index])

    def view(self, index: Tensor | Sequence[int]) -> Examples:
        """Some examples, in the order given, which share the pixels with these."""
        index = torch.as_tensor(index, device=self.labels.device)
        index = index if index.dtype == torch.bool else index.long()
        return Examples(self.images.view(index), self.labels[index])

    @staticmethod
    def cat(parts: Sequence[Examples]) -> Examples:
        """All examples in one, in order."""
        return Examples(
            ImageStore.cat([part.images for part in parts]),
            torch.cat([part.labels for part in parts]),
        )

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on another device."""
        return Examples(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training part, a test part, and what the labels mean.

    Args:
        name: What reports call it.
        train: Training examples.
        test: Test examples.
        class_names: Name of each label.
        train_boxes: int16 [N, 4], the objects' true boxes in the training images, if known; empty
            ones where those of an image are not.
        test_boxes: The same for the test images.
        skipped: Files that could not be used, each with its reason.
        train_files: What each training image is called on disk, where it is a file: its path from
            the folder of its class on, ``<class>/<file>``. Published lists name images so.

    Raises:
        FastcilError: A label without a name, or not one box or file per image.
    """

    name: str
    train: Examples
    test: Examples
    class_names: tuple[str, ...]
    train_boxes: Tensor | None = None
    test_boxes: Tensor | None = None
    skipped: tuple[str, ...] = ()
    train_files: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for part, examples in (("train", self.train), ("test", self.test)):
            if not len(examples):
                continue
            low, high = examples.labels.aminmax()
            if low < 0 or high >= len(self.class_names):
                raise FastcilError(
                    f"{part} has labels from {low} to {high}; they must be positions in "
                    f"class_names, which has {len(self.class_names)}."
                )
        for name, boxes, examples in (
            ("train_boxes", self.train_boxes, self.train),
            ("test_boxes", self.test_boxes, self.test),
        ):
            if boxes is not None and boxes.shape != (len(examples), 4):
                raise FastcilError(
                    f"{name} has shape {tuple(boxes.shape)} for {len(examples)} images; "
                    f"it must be [{len(examples)}, 4]."
                )
        if self.train_files is not None and len(self.train_files) != len(self.train):
            raise FastcilError(
                f"train_files has {len(self.train_files)} names for {len(self.train)} images; "
                f"give one for each."
            )
