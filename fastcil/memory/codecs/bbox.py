"""Exemplars kept sharp inside a box and subsampled outside (CIM, Luo et al. 2023)."""

from __future__ import annotations

import math

from torch import Tensor

from fastcil.data import ImageStore
from fastcil.errors import FastcilError
from fastcil.memory.codecs.codec import Codec


class BBoxCodec(Codec):
    """The crop under a box at full resolution, and the rest at 1/eta of its pixels.

    An image x with the box's mask M becomes ``M * x + (1 - M) * x_eta`` (Luo et al. 2023,
    Eq. 3), where x_eta is x shrunk by sqrt(eta) a side and enlarged again, both to the nearest
    pixel. What lies under the box is not kept twice, and nothing is ever expanded in memory.

    Args:
        ratio: Downsampling ratio eta of the area outside the box, at least 1.

    Raises:
        FastcilError: A ratio below 1 or not finite.

    Example:
        >>> import torch
        >>> store = ImageStore.from_batch(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
        >>> codec = BBoxCodec()
        >>> kept = codec.encode(store, torch.tensor([[2, 2, 6, 6]], dtype=torch.int16))
        >>> codec.units(kept).tolist()
        [0.4375]
        >>> codec.nbytes(kept).tolist()  # 3 * (4 * 4 + 4 * 4 - 2 * 2) + 28
        [112]
    """

    name = "bbox"
    needs_boxes = True

    def __init__(self, ratio: float = 4.0) -> None:
        number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
        if not (number and math.isfinite(ratio) and ratio >= 1):
            raise FastcilError(
                f"ratio is {ratio!r}; it must be a number of at least 1, and is 4 in the paper."
            )
        self.ratio = float(ratio)

    def encode(self, images: ImageStore, boxes: Tensor | None) -> ImageStore:
        """Packs raw images, each with its own box.

        Raises:
            FastcilError: No boxes.
        """
        if boxes is None:
            raise FastcilError(
                "boxes is None, but the codec 'bbox' keeps a box of every image sharp; add an "
                "addon that finds them ('cam', 'cim'), or use codec='raw'."
            )
        return images.compress(boxes.to(images.pixels.device), self.ratio)

    def units(self, encoded: ImageStore) -> Tensor:
        """Share of a raw image, float64 [N] (Luo et al. 2023, Eq. 4).

        With b the box's share of the image's area: ``1 - (1 - 1/eta) (1 - b)``.
        """
        sizes, boxes = encoded.sizes.double(), encoded.boxes.double()
        sides = (boxes[:, 2:] - boxes[:, :2]).clamp_min(0)  # [N, 2]
        share = sides.prod(dim=1) / sizes.prod(dim=1)  # [N]
        return 1 - (1 - 1 / self.ratio) * (1 - share)
