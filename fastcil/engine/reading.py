"""A batch of images as every rank needs it, whole; of what the host reads, each reads its share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcil.data import Augmentation, ImageStore, read_batch
from fastcil.nn.ranks import current
from fastcil.ops import PixelProgram


def read_together(
    stores: Sequence[ImageStore],
    which: Tensor,
    index: Tensor,
    augmentation: Augmentation,
    crops: Tensor,
    flips: Tensor,
    device: torch.device,
    views: Tensor | None = None,
    program: PixelProgram | None = None,
) -> Tensor:
    """Reads a batch, the same on every rank, whoever reads which of its images.

    Images in host memory or on disk are read by the ranks in shares, and gathered as bytes where
    they go to another device; what lies on a GPU each reads by itself, faster than it could ask.
    An objective may look at any image, so that all get all.

    Args:
        stores: As `fastcil.data.read_batch` takes it, and so all that follows.
        which: The store of each image.
        index: Its position there.
        augmentation: How images are cut and normalised.
        crops: What is cut out of each.
        flips: Which to mirror.
        device: Where the batch is wanted.
        views: Simulated compression.
        program: What happens to the pixels.

    Returns:
        float32 [B, 3, size, size] in channels_last memory.
    """
    ranks, count = current(), len(index)
    if ranks.size == 1 or count < ranks.size or stores[0].device.type == "cuda":
        return read_batch(stores, which, index, augmentation, crops, flips, views, program, device)
    own = ranks.share(count)
    return read_batch(
        stores,
        which[own],
        index[own],
        augmentation,
        crops[own],
        flips[own],
        None if views is None else views[own],
        None if program is None else PixelProgram(program.operations[own], program.amounts[own]),
        device,
        gather=lambda rows: ranks.gather(rows, count),
    )
