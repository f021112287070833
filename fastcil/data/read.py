"""A batch of images out of several stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcil import ops
from fastcil.data.augment import Augmentation
from fastcil.data.store import ImageStore
from fastcil.errors import FastcilError


def read_images(
    stores: Sequence[ImageStore],
    which: Tensor,
    index: Tensor,
    size: tuple[int, int],
    crops: Tensor | None = None,
    flips: Tensor | None = None,
    views: Tensor | None = None,
    antialias: bool = True,
) -> Tensor:
    """Reads a batch from several stores: gathered, cut, resized and mirrored in one operation.

    Args:
        stores: Where the images are, raw or packed.
        which: int64 [B], the store of each image.
        index: int64 [B], its position there.
        size: Height and width of the batch.
        crops: float32 [B, 4], see `fastcil.ops.read`.
        flips: bool [B], which to mirror.
        views: int16 [B, 6], simulated compression, see `view_geometry`.
        antialias: Whether shrinking filters.

    Returns:
        uint8 [B, 3, h, w] in channels_last memory.

    Raises:
        FastcilError: No store, or not one position per image.
        IndexError: A store has no image at one of the positions.

    Example:
        >>> store = ImageStore.from_batch(torch.full((2, 8, 8, 3), 7, dtype=torch.uint8))
        >>> read_images([store], torch.zeros(1, dtype=torch.int64), torch.tensor([1]), (4, 4)).shape
        torch.Size([1, 3, 4, 4])
    """
    sources = _gather(stores, which, index, crops, flips, views)[0]
    return ops.read(size=size, antialias=antialias, **sources)


def read_batch(
    stores: Sequence[ImageStore],
    which: Tensor,
    index: Tensor,
    augmentation: Augmentation,
    crops: Tensor | None = None,
    flips: Tensor | None = None,
    views: Tensor | None = None,
    program: ops.PixelProgram | None = None,
    device: torch.device | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Reads a batch as the network takes it: cut, changed and normalised in one operation.

    Args:
        stores: Where the images are, raw or packed, all on one device.
        which: int64 [B], the store of each image.
        index: int64 [B], its position there.
        augmentation: Gives size, antialiasing, mean and standard deviation.
        crops: float32 [B, 4], see `fastcil.ops.read`; from `Augmentation.draw` or `centre`.
        flips: bool [B], which to mirror.
        views: int16 [B, 6], simulated compression, see `view_geometry`.
        program: What happens to the pixels of each image; from `Augmentation.program`.
        device: Where the batch is wanted; None is where the stores are. Bytes are moved between
            devices, and normalised where they are wanted.
        gather: Makes a larger batch of what was read, before bytes are normalised: the rows of all
            processes, of which each reads some. None: this is the batch.

    Returns:
        float32 [B, 3, size, size] in channels_last memory.

    Raises:
        FastcilError: No store, or not one position per image.
        IndexError: A store has no image at one of the positions.

    Example:
        >>> store = ImageStore.from_batch(torch.full((2, 8, 8, 3), 7, dtype=torch.uint8))
        >>> one = torch.ones(1, dtype=torch.int64)
        >>> read_batch([store], one - 1, one, Augmentation.cifar(4)).shape
        torch.Size([1, 3, 4, 4])
    """
    sources, program = _gather(stores, which, index, crops, flips, views, program)
    home = sources["geometry"].device
    wanted = home if device is None else device
    moves = wanted.type != home.type
    images = ops.read_batch(
        size=(augmentation.size, augmentation.size),
        mean=augmentation.mean,
        std=augmentation.std,
        antialias=augmentation.antialias,
        program=program,
        dtype=torch.uint8 if moves else torch.float32,
        **sources,
    )
    (images,) = ops.send((images,), wanted)
    if gather is not None:
        images = gather(images)
    return augmentation.normalise(images) if moves else images


def _gather(
    stores: Sequence[ImageStore],
    which: Tensor,
    index: Tensor,
    crops: Tensor | None,
    flips: Tensor | None,
    views: Tensor | None,
    program: ops.PixelProgram | None = None,
) -> tuple[dict[str, Any], ops.PixelProgram | None]:
    """What `fastcil.ops.read` and `read_batch` both take, on the stores' device."""
    if not stores:
        raise FastcilError("stores is empty; pass at least one ImageStore.")
    if which.shape != index.shape:
        raise FastcilError(
            f"which has shape {tuple(which.shape)} and index {tuple(index.shape)}; "
            "both must be [B]."
        )
    device = stores[0].offsets.device
    steps = [] if program is None else [program.operations, program.amounts]
    sent: list[Any] = ops.send([which, index, crops, flips, views, *steps], device)
    which, index, crops, flips, views, *steps = sent
    if program is not None:
        program = ops.PixelProgram(*steps)
    offsets = torch.zeros_like(index)
    geometry = offsets.new_zeros((len(index), 8), dtype=torch.int16)
    for number, store in enumerate(stores):
        if not len(store):
            continue
        mine = which == number
        # Selecting by mask would make the host wait for a GPU; reading row 0 in vain does not.
        rows = torch.where(mine, index, 0)
        offsets = torch.where(mine, store.offsets[rows], offsets)
        geometry = torch.where(mine[:, None], store.geometry[rows], geometry)
    sources = {
        "arenas": [store.pixels for store in stores],
        "arena": which,
        "offsets": offsets,
        "geometry": geometry,
        "crops": crops,
        "flips": flips,
        "views": views,
    }
    return sources, program


def view_geometry(sizes: Tensor, boxes: Tensor, ratio: float = 4.0) -> Tensor:
    """What makes a raw image read as if it had been packed with a box.

    Args:
        sizes: int64 [B, 2], heights and widths.
        boxes: int16 [B, 4], (y0, x0, y1, x1).
        ratio: Downsampling ratio eta, in area.

    Returns:
        int16 [B, 6], rows (y0, x0, y1, x1, gh, gw).

    Raises:
        FastcilError: Not one box per size, or a ratio below 1.

    Example:
        >>> view_geometry(torch.tensor([[9, 8]]), torch.tensor([[1, 2, 3, 4]]))
        tensor([[1, 2, 3, 4, 4, 4]], dtype=torch.int16)
    """
    if boxes.shape != (len(sizes), 4):
        raise FastcilError(
            f"boxes has shape {tuple(boxes.shape)} for {len(sizes)} sizes; "
            f"it must be [{len(sizes)}, 4]."
        )
    grid = ops.grids(sizes, ratio)
    return torch.cat([boxes.to(grid.device, torch.int16), grid.to(torch.int16)], 1)
