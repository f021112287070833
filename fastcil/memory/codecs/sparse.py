"""Exemplars of which only the salient pixels are kept (SAMC, Bai et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastcil.data import ImageStore
from fastcil.errors import FastcilError
from fastcil.memory.codecs.codec import Codec
from fastcil.memory.codecs.completion import Rule, check_rule, complete
from fastcil.memory.codecs.sparse_store import SparseStore
from fastcil.ops import salient_masks
from fastcil.ops.salient_masks import check_threshold

Refine = Callable[[ImageStore, Tensor], ImageStore]
"""Completed images, and where their pixels were kept (bool [sum of H W]) -> better ones."""


class SparseCodec(Codec[SparseStore]):
    r"""The pixels whose saliency is above a threshold; the others are inpainted when it is read.

    .. math:: x' = \mathbb{1}\{M_x > \mu\} \odot x, \qquad
        \tilde x = A_\xi(R(\mathrm{COO}^{-1}(x')))

    (Bai et al. 2023, Eqs. 4.4, 4.6): M is a saliency map, R a rule, A a network that refines what
    the rule filled, if one is given. The paper keeps the coordinate of every pixel (COO); here the
    mask of each image takes the smallest of coordinates, run lengths and bits, and none where all
    is kept (`SparseStore`). An exemplar is its mask, 3 bytes for each pixel kept, and 13 bytes:
    length (4), height and width (4), form (1), label (4).

    Args:
        threshold: mu, from 0 to below 1; 0 keeps every pixel, as in the paper's Table 4. The paper
            has 0.6 on CIFAR-10 and 0.7 on CIFAR-100 and mini-ImageNet.
        rule: ``telea`` (the released code's), ``navier-stokes``, ``diffusion`` or ``zero``; the
            first two fill on the host, whatever the device; see
            `fastcil.memory.codecs.completion.complete`.
        radius: How far around a pixel OpenCV's rules look, in pixels; 3 as released.
        refine: From completed images and their masks to images of the same sizes. Whether it
            changes kept pixels is its own matter.

    Raises:
        FastcilError: A threshold outside [0, 1), an unknown rule, a radius that is not positive.

    Example:
        >>> store = ImageStore.from_batch(torch.full((1, 8, 8, 3), 90, dtype=torch.uint8))
        >>> codec = SparseCodec(threshold=0.5, rule="diffusion")
        >>> kept = codec.encode(store, torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))
        >>> kept.kept().tolist(), codec.units(kept).tolist()
        ([15], [0.234375])
        >>> codec.nbytes(kept).tolist()  # 8 + 3 * 15 + 13
        [66]
        >>> codec.decode(kept).image(0)[7, 0].tolist()
        [90, 90, 90]
    """

    name = "sparse"
    marks = "maps"
    store = SparseStore

    def __init__(
        self,
        threshold: float = 0.6,
        rule: Rule = "telea",
        radius: float = 3.0,
        refine: Refine | None = None,
    ) -> None:
        check_threshold("threshold", threshold)
        check_rule(rule, radius)
        self.threshold = float(threshold)
        self.rule: Rule = rule
        self.radius = float(radius)
        self.refine = refine

    def encode(self, images: ImageStore, marks: Tensor | None) -> SparseStore:
        """The salient pixels of each image, by `fastcil.ops.salient_masks`.

        Raises:
            FastcilError: No maps, or not one for each image.
        """
        if marks is None:
            raise FastcilError(
                "marks is None, but the codec 'sparse' keeps the salient pixels of every image; "
                "add the addon that finds them ('samc'), or use codec='raw'."
            )
        keep = salient_masks(marks.to(images.device), images.sizes, self.threshold)
        return SparseStore.from_masks(images, keep)

    def decode(self, encoded: SparseStore) -> ImageStore:
        """The images, raw: completed by the rule, then refined.

        Raises:
            FastcilError: ``refine`` gave images of other sizes.
        """
        images, masks = encoded.read()
        completed = complete(images, masks, self.rule, self.radius)
        if self.refine is None:
            return completed
        refined = self.refine(completed, masks)
        if not torch.equal(refined.sizes, completed.sizes):
            raise FastcilError(
                "refine gave images of other sizes than it was given; it must change pixels only."
            )
        return refined

    def faithful(self, encoded: SparseStore) -> Tensor:
        """The pixels kept."""
        return encoded.masks()

    def units(self, encoded: SparseStore) -> Tensor:
        """Share of the pixels that is kept, float64 [N] (Bai et al. 2023, Sec. 4.4, App. H).

        The paper counts the kept scalars; coordinates are free.
        """
        return encoded.kept().double() / encoded.sizes.double().prod(1)
