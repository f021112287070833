"""The objects' true boxes in ImageNet's images, as Kaggle tells them.

`LOC_train_solution.csv` and `LOC_val_solution.csv` (localisation, Russakovsky et al. 2015) have a
line for each image, `<image>,<class> <x0> <y0> <x1> <y1> <class> <x0> ...`, five words an object,
in pixels. They need not know every image.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastcil.data.store import Examples
from fastcil.errors import DataError

FILES = {"train": "LOC_train_solution.csv", "val": "LOC_val_solution.csv"}
_EMPTY = (0.0, 0.0, 0.0, 0.0)
_FIELDS = 5  # of an object: its class and four places


def true_boxes(
    file: Path, examples: Examples, images: Sequence[str], classes: Sequence[str]
) -> Tensor | None:
    """The smallest box of each image that holds all objects of its class.

    Args:
        file: One of the two lists.
        examples: The images.
        images: What each is called, without folder and ending.
        classes: The class of each.

    Returns:
        int16 [N, 4], (y0, x0, y1, x1) in whole pixels with exclusive ends, inside the image; empty
        where the list has no object of its class; None if it has none of any.

    Raises:
        DataError: A line of another form.

    Example:
        >>> import tempfile
        >>> from fastcil.data.store import ImageStore
        >>> store = ImageStore.from_batch(torch.zeros(2, 6, 9, 3, dtype=torch.uint8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, FILES["val"])
        ...     _ = file.write_text("ImageId,Objects" + chr(10) + "a,n1 1 2 4 5 n1 3 0 7 3")
        ...     true_boxes(file, Examples(store, torch.tensor([0, 0])), ["a", "b"], ["n1", "n1"])
        tensor([[0, 1, 5, 7],
                [0, 0, 0, 0]], dtype=torch.int16)
    """
    known = _read(file, dict(zip(images, classes, strict=True)))
    if not known:
        return None
    ends = torch.tensor([known.get(image, _EMPTY) for image in images], dtype=torch.float64)
    limits = examples.images.sizes.cpu().repeat(1, 2).double()  # [N, 4]
    ends = torch.cat([ends[:, :2].floor(), ends[:, 2:].ceil()], 1).clamp_min(0).minimum(limits)
    inside = (ends[:, 2:] > ends[:, :2]).all(1, keepdim=True)
    return torch.where(inside, ends, 0.0).to(torch.int16)


def _read(file: Path, classes: Mapping[str, str]) -> dict[str, tuple[float, ...]]:
    """Image -> y0, x0, y1 and x1 around the objects of its class, of the images asked for."""
    found: dict[str, tuple[float, ...]] = {}
    with open(file, encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.reader(lines), 1):
            if len(row) != 2 or row[0] not in classes:
                continue
            objects = _objects(file, number, row[1], classes[row[0]])
            if objects:
                x0, y0, x1, y1 = zip(*objects, strict=True)
                found[row[0]] = (min(y0), min(x0), max(y1), max(x1))
    return found


def _objects(file: Path, number: int, text: str, name: str) -> list[tuple[float, ...]]:
    """x0, y0, x1 and y1 of the objects of a class that a line names."""
    words = text.split()
    try:
        if len(words) % _FIELDS:
            raise ValueError
        groups = [words[k : k + _FIELDS] for k in range(0, len(words), _FIELDS)]
        places = [(group[0], tuple(map(float, group[1:]))) for group in groups]
    except ValueError as error:
        raise DataError(
            f"line {number} of {file} has '{text[:60]}' for its objects; each must be a class and"
            f" four numbers, x0, y0, x1 and y1"
        ) from error
    return [place for wnid, place in places if wnid == name]
