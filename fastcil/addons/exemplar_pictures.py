"""Pictures of exemplars before and after they were changed."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fastcil.contract import Record
from fastcil.data import Examples, ImageStore

Picture = NDArray[np.uint8]

_HEIGHT, _GAP = 96, 4


def compare_pictures(title: str, before: Examples, after: ImageStore, count: int) -> Record:
    """Exemplars before and after, and what changed, side by side.

    The difference is shown around a middle grey, enlarged so that the largest change of a picture
    is black or white; by how much is in the caption.

    Args:
        title: Of the record.
        before: Exemplars.
        after: What they became, in the same order and of the same sizes.
        count: How many to show, evenly spaced.

    Returns:
        A record of kind ``images``.

    Example:
        >>> import torch
        >>> images = [ImageStore.from_batch(torch.full((2, 8, 8, 3), v, dtype=torch.uint8))
        ...           for v in (10, 13)]
        >>> record = compare_pictures("Changed", Examples(images[0], torch.tensor([4, 4])),
        ...                           images[1], count=1)
        >>> record.payload["captions"]
        ['before, after, difference x 42 (at most 3 levels)']
        >>> record.payload["labels"]
        [4]
        >>> record.payload["images"][0].shape
        (96, 296, 3)
    """
    chosen = np.linspace(0, len(before) - 1, min(count, len(before))).round().astype(int).tolist()
    payload: dict[str, list[Any]] = {"images": [], "captions": [], "labels": []}
    for place in chosen:
        old = before.images.image(place).cpu().numpy()
        new = after.image(place).cpu().numpy()
        change = new.astype(np.int16) - old.astype(np.int16)
        most = int(np.abs(change).max())
        gain = 127 // max(1, most)
        shown = [old, new, (128 + gain * change).clip(0, 255).astype(np.uint8)]
        payload["images"].append(side_by_side([scaled(picture) for picture in shown]))
        payload["labels"].append(int(before.labels[place]))
        payload["captions"].append(f"before, after, difference x {gain} (at most {most} levels)")
    return Record("images", title, payload)


def scaled(picture: Picture) -> Picture:
    """A picture at the height of 96 pixels; small ones show their pixels.

    Args:
        picture: uint8 [H, W, 3].

    Example:
        >>> scaled(np.zeros((8, 16, 3), np.uint8)).shape
        (96, 192, 3)
    """
    height, width = picture.shape[:2]
    size = max(1, round(width * _HEIGHT / height)), _HEIGHT
    how = cv2.INTER_NEAREST if height < _HEIGHT else cv2.INTER_AREA
    return np.asarray(cv2.resize(picture, size, interpolation=how), dtype=np.uint8)


def side_by_side(pictures: list[Picture]) -> Picture:
    """Pictures as `scaled` makes them, with white gaps between.

    Example:
        >>> side_by_side([np.zeros((96, 10, 3), np.uint8)] * 2).shape
        (96, 24, 3)
    """
    gap = np.full((_HEIGHT, _GAP, 3), 255, dtype=np.uint8)
    parts = [part for picture in pictures for part in (gap, picture)][1:]
    return np.concatenate(parts, axis=1)
