"""Exemplars beside the photos they were made of: what memory really remembers."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcil.contract import Record, Task
from fastcil.memory import Memory, make_codec
from fastcil.memory.originals import find_original

Picture = NDArray[np.uint8]

TITLE = "Exemplars of"
HEIGHT, _WIDTH = 128, 192
_GAP = 4
_BOX, _EDGE = (255, 190, 0), (20, 20, 20)


def exemplar_gallery(
    task: Task, memory: Memory, class_names: tuple[str, ...], per_task: int = 6
) -> Record:
    """Pairs of pictures: an image with its box drawn, and the exemplar that was made of it.

    The original of an exemplar is what `fastcil.memory.originals.find_original` takes for it.
    Pictures are scaled to a height of 128 pixels (or a width of 192, if that is less).

    Args:
        task: The task that was just learned.
        memory: Its exemplars already chosen.
        class_names: Name of each label known.
        per_task: How many pairs; classes are taken evenly, each in the order of selection.

    Returns:
        A record of kind ``images`` whose payload holds ``images``: uint8 [h, w, 3] each, the
        original on the left; ``captions``: class, bytes kept, bytes of the raw image; ``shares``:
        their quotient. It is empty if nothing is kept of the task's new classes.

    Example:
        >>> from fastcil.data import Examples, ImageStore
        >>> store = ImageStore.from_batch(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
        >>> new = Examples(store, torch.tensor([0, 1]))
        >>> task = Task(0, (0, 1), 0, new, new.select([]), "task 1")
        >>> memory = Memory("2 images")
        >>> memory.update(task, embed=lambda examples: torch.ones(len(examples), 2))
        >>> record = exemplar_gallery(task, memory, ("apple", "pear"))
        >>> record.title, record.payload["captions"]
        ('Exemplars of task 1', ['apple: 220 of 220 bytes', 'pear: 220 of 220 bytes'])
        >>> record.payload["images"][0].shape
        (128, 260, 3)
    """
    held = memory.examples()
    chosen = _choose(held.labels.cpu(), task.new_classes, per_task)
    remembered = held.select(chosen).to("cpu")
    kept = memory.exemplar_nbytes().cpu()[chosen].tolist()
    payload: dict[str, list[Any]] = {"images": [], "captions": [], "shares": []}
    for place, label in enumerate(remembered.labels.tolist()):
        exemplar = remembered.images.image(place)
        faithful = memory.faithful(int(chosen[place]))
        found = find_original(task.examples, label, exemplar, faithful)
        if found is None:
            continue
        original = task.examples.images.select([found]).to("cpu")
        raw = int(make_codec("raw").nbytes(original)[0])
        pair = _pair(original.image(0).numpy(), exemplar.numpy(), remembered.images.boxes[place])
        payload["images"].append(pair)
        payload["captions"].append(f"{class_names[label]}: {kept[place]:,} of {raw:,} bytes")
        payload["shares"].append(kept[place] / raw)
    return Record("images", f"{TITLE} {task.name or f'task {task.index + 1}'}", payload)


def _choose(labels: Tensor, classes: tuple[int, ...], count: int) -> Tensor:
    """Positions of ``count`` exemplars, classes taken evenly, the first selected first."""
    places = [(labels == c).nonzero().flatten().tolist() for c in classes]
    places = [p for p in places if p]
    if len(places) > count:
        picked = np.linspace(0, len(places) - 1, count).round().astype(int)
        places = [places[k] for k in picked]
    ranked = sorted((rank, k) for k, p in enumerate(places) for rank in range(len(p)))[:count]
    chosen = [places[k][rank] for rank, k in ranked]
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def _pair(original: Picture, exemplar: Picture, box: Tensor) -> Picture:
    """Original with its box, a white gap, and the exemplar, both as large.

    An exemplar whose foreground is downsampled too has fewer pixels, of a slightly other shape.
    """
    size = _fitted(original)
    left = _draw_box(_scale(original, size), box.tolist(), exemplar.shape)
    gap = np.full((len(left), _GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, _scale(exemplar, size)], axis=1)


def _fitted(image: Picture) -> tuple[int, int]:
    """Height and width of the image when it is as high as the gallery, or as wide."""
    height, width = image.shape[:2]
    factor = min(HEIGHT / height, _WIDTH / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _scale(image: Picture, size: tuple[int, int]) -> Picture:
    """The image in ``size`` pixels, height first; small ones in whole pixels."""
    height, width = size
    factor = min(height / image.shape[0], width / image.shape[1])
    how = cv2.INTER_LINEAR
    if factor >= 2:
        how = cv2.INTER_NEAREST
    elif factor < 1:
        how = cv2.INTER_AREA
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), dtype=np.uint8)


def _draw_box(picture: Picture, box: list[int], shape: tuple[int, ...]) -> Picture:
    """The box of an image of ``shape``, on its scaled picture; the whole image needs none."""
    y0, x0, y1, x1 = box
    if y1 <= y0 or x1 <= x0 or (y0, x0, y1, x1) == (0, 0, *shape[:2]):
        return picture
    up, across = len(picture) / shape[0], picture.shape[1] / shape[1]
    top, left, bottom, right = (
        *(round(y0 * up), round(x0 * across)),
        *(round(y1 * up) - 1, round(x1 * across) - 1),
    )
    picture = np.ascontiguousarray(picture)
    # A dark line on either side keeps the bright one visible on any background.
    for out, colour in ((1, _EDGE), (-1, _EDGE), (0, _BOX)):
        cv2.rectangle(
            picture, (left - out, top - out), (right + out, bottom + out), colour, thickness=1
        )
    return picture
