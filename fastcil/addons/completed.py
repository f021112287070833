"""Exemplars of which pixels were dropped, beside the images that they were made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcil.contract import Task
from fastcil.data import Examples, ImageStore
from fastcil.data.ranks import rank_in_class
from fastcil.ops import salient_masks

_COMPARED = 1 << 22


@dataclass(frozen=True)
class Completed:
    """Exemplars of a task beside what they were made of.

    Args:
        originals: N images as they came.
        images: The same as memory gives them back, raw.
        maps: Their saliency, float32 [N, h, w].
        masks: True where a pixel is kept, bool [sum of H W], row-major, image after image.
    """

    originals: Examples
    images: ImageStore
    maps: Tensor
    masks: Tensor

    @classmethod
    def of(
        cls, originals: Examples, images: ImageStore, maps: Tensor, masks: Tensor, exact: bool
    ) -> Completed:
        """The same; with ``exact`` without images that differ where they should be the same.

        An exemplar of an earlier task has no original among the new images, and is taken for
        another of its class.
        """
        raw = originals.images.reconstruct().to(images.device)
        sizes, masks = raw.sizes, masks.to(images.device)
        image = torch.arange(len(originals), device=images.device)
        image = image.repeat_interleave(sizes.prod(1))
        differs = (raw.pixels != images.reconstruct().pixels).view(-1, 3).any(1) & masks
        same = torch.bincount(image[differs], minlength=len(originals)) == 0
        same |= not exact
        return cls(
            Examples(raw, originals.labels.to(raw.device)).select(same),
            images.reconstruct().select(same),
            maps[same.to(maps.device)],
            masks[same[image]],
        )

    def __len__(self) -> int:
        return len(self.originals)

    def missed(self, images: ImageStore) -> Tensor:
        """Mean squared error of the pixels dropped, of values from 0 to 1; NaN if none is.

        Args:
            images: What is made of them, raw, in the same order.
        """
        true = self.originals.images.pixels.view(-1, 3).to(images.device)
        change = (images.pixels.view(-1, 3).double() - true.double()) / 255
        return change[~self.masks.to(images.device)].square().mean().cpu()

    def mask(self, place: int) -> Tensor:
        """The mask of one image, bool [H, W]."""
        height, width = self.originals.images.sizes[place].tolist()
        first = int(self.originals.images.sizes[:place].prod(1).sum())
        return self.masks[first : first + height * width].view(height, width)


def first_of_each(task: Task, count: int) -> Tensor:
    """Positions of exemplars of a task's classes, int64: those memory will keep longest.

    Args:
        task: Its exemplars those that memory holds now.
        count: How many at most; the first of each class come first.
    """
    labels = task.exemplars.labels.cpu()
    mine = torch.isin(labels, torch.tensor(task.classes, dtype=torch.int64)).nonzero().flatten()
    order = rank_in_class(labels[mine]).argsort(stable=True)
    return mine[order[:count]]


def pair_up(task: Task, places: Tensor, maps: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Exemplars and the images of the task that they were made of.

    An exemplar's original is the image of its class and size whose salient pixels differ least
    from it, of several the one that has most of them.

    Args:
        task: Its exemplars those that memory holds now.
        places: Positions of exemplars, int64 [n].
        maps: Saliency of the task's images, float32 [N, h, w].
        threshold: mu.

    Returns:
        Those of ``places`` that have an original, and its position in the task's examples, int64
        each.
    """
    known: dict[tuple[int, ...], _Salient] = {}
    pairs = []
    for place in places.tolist():
        exemplar = task.exemplars.images.image(place).cpu()
        kind = (int(task.exemplars.labels[place]), *exemplar.shape[:2])
        if kind not in known:
            known[kind] = _Salient.of(task.examples, kind, maps, threshold)
        if len(known[kind].index):
            pairs.append((place, known[kind].nearest(exemplar)))
    both = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return both[:, 0], both[:, 1]


@dataclass(frozen=True)
class _Salient:
    """Salient pixels of images of one class and size, on the CPU.

    Args:
        index: Positions of the images, int64 [n].
        image: Which of these each pixel is of, int64 [K].
        pixel: Where in it, int64 [K].
        values: uint8 [K, 3].
    """

    index: Tensor
    image: Tensor
    pixel: Tensor
    values: Tensor

    @classmethod
    def of(
        cls, examples: Examples, kind: tuple[int, ...], maps: Tensor, threshold: float
    ) -> _Salient:
        """The pixels of images of a (class, height, width), at most some four million of them."""
        label, height, width = kind
        size = torch.tensor([height, width], device=examples.images.device)
        alike = (examples.images.sizes == size).all(1).cpu() & (examples.labels == label).cpu()
        index = alike.nonzero().flatten()
        images = examples.images.select(index.to(examples.images.device)).to("cpu").reconstruct()
        keep = salient_masks(maps[index.to(maps.device)].cpu(), images.sizes, threshold)
        places = keep.nonzero().flatten()
        places = places[:: 1 + len(places) // _COMPARED]
        area = height * width
        values = images.pixels.view(-1, 3)[places]
        return cls(index, places.div(area, rounding_mode="floor"), places % area, values)

    def nearest(self, exemplar: Tensor) -> int:
        """The image whose pixels differ least from those there of an exemplar, uint8 [H, W, 3]."""
        change = (exemplar.view(-1, 3)[self.pixel].int() - self.values.int()).abs().sum(1)
        count = torch.bincount(self.image, minlength=len(self.index))
        mean = torch.bincount(self.image, change.double(), minlength=len(self.index)) / count
        least = mean.nan_to_num(torch.inf)
        return int(self.index[torch.where(least == least.amin(), count, -1).argmax()])
