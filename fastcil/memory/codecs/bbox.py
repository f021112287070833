"""Exemplars kept sharp inside a box and subsampled outside (CIM, Luo et al. 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcil.data import ImageStore
from fastcil.errors import FastcilError
from fastcil.memory.codecs.codec import Codec


class BBoxCodec(Codec[ImageStore]):
    """The crop under a box at full resolution, and the rest at 1/eta of its pixels.

    An image x with the box's mask M becomes ``M * x + (1 - M) * x_eta`` (Luo et al. 2023,
    Eq. 3), where x_eta is x shrunk by sqrt(eta) a side and enlarged again, both to the nearest
    pixel. What lies under the box is not kept twice, and nothing is ever expanded in memory.

    With a ``foreground_ratio`` eta' above 1 the box is downsampled too, less than its surroundings
    (Luo et al. 2023, Table 3, row 11: 2). The whole image is then shrunk by sqrt(eta') a side, to
    the nearest pixel, and what comes of it is packed at ``ratio`` eta / eta'. It is read at its
    smaller size, without being enlarged to the old one first: networks see images scaled to theirs.

    Args:
        ratio: Downsampling ratio eta of the area outside the box, at least 1.
        foreground_ratio: Downsampling ratio eta' of the area inside, from 1 to ``ratio``.

    Raises:
        FastcilError: A ratio below 1 or not finite, or a foreground ratio above it.

    Example:
        >>> import torch
        >>> store = ImageStore.from_batch(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
        >>> codec = BBoxCodec()
        >>> kept = codec.encode(store, torch.tensor([[2, 2, 6, 6]], dtype=torch.int16))
        >>> codec.units(kept).tolist()
        [0.4375]
        >>> codec.nbytes(kept).tolist()  # 3 * (4 * 4 + 4 * 4 - 2 * 2) + 28
        [112]
        >>> smaller = BBoxCodec(foreground_ratio=4.0).encode(store, kept.boxes)
        >>> smaller.sizes.tolist(), smaller.boxes.tolist()
        ([[4, 4]], [[1, 1, 3, 3]])
    """

    name = "bbox"
    marks = "boxes"

    def __init__(self, ratio: float = 4.0, foreground_ratio: float = 1.0) -> None:
        for name, value in (("ratio", ratio), ("foreground_ratio", foreground_ratio)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value >= 1):
                raise FastcilError(
                    f"{name} is {value!r}; it must be a number of at least 1, and is "
                    f"{4 if name == 'ratio' else 1} in the paper."
                )
        if foreground_ratio > ratio:
            raise FastcilError(
                f"foreground_ratio is {foreground_ratio}, above ratio, which is {ratio}; the box "
                f"must not lose more than its surroundings."
            )
        self.ratio = float(ratio)
        self.foreground_ratio = float(foreground_ratio)

    def encode(self, images: ImageStore, marks: Tensor | None) -> ImageStore:
        """Packs raw images, each with its own box.

        Raises:
            FastcilError: No boxes.
        """
        if marks is None:
            raise FastcilError(
                "marks is None, but the codec 'bbox' keeps a box of every image sharp; add an "
                "addon that finds them ('cam', 'cim'), or use codec='raw'."
            )
        boxes = marks.to(images.device)
        if self.foreground_ratio > 1:
            images, boxes = _shrunk(images, boxes, self.foreground_ratio)
        return images.compress(boxes, self.ratio / self.foreground_ratio)

    def units(self, encoded: ImageStore) -> Tensor:
        """Share of a raw image, float64 [N] (Luo et al. 2023, Eq. 4).

        With b the box's share of the image's area: ``b / eta' + (1 - b) / eta``.
        """
        sizes, boxes = encoded.sizes.double(), encoded.boxes.double()
        sides = (boxes[:, 2:] - boxes[:, :2]).clamp_min(0)  # [N, 2]
        share = sides.prod(dim=1) / sizes.prod(dim=1)  # [N]
        return share / self.foreground_ratio + (1 - share) / self.ratio


def _shrunk(images: ImageStore, boxes: Tensor, ratio: float) -> tuple[ImageStore, Tensor]:
    """Raw images with 1/ratio of their pixels, and the boxes that still hold all of theirs."""
    # Without a box, what packing keeps of an image is the smaller image.
    packed = images.compress(torch.zeros_like(boxes), ratio)
    old, new = images.sizes, packed.geometry[:, 6:].long()
    ends = boxes.long() * torch.cat([new, new], 1)
    begin = ends[:, :2] // old
    end = -(-ends[:, 2:] // old)
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(1, keepdim=True)
    scaled = torch.cat([begin, end], 1).masked_fill(empty, 0)
    return ImageStore.from_pixels(packed.pixels, new), scaled.to(boxes.dtype)
