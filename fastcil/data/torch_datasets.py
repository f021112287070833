"""Data sets from map-style torch data sets, which are read item by item."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastcil.data.assemble import assemble_numbered, make_examples
from fastcil.data.convert import image_array
from fastcil.data.store import Dataset, Examples, ImageStore
from fastcil.errors import DataError


def read_torch_dataset(
    data: Any, where: str, classes: int | None, skip_bad: bool, skipped: list[str]
) -> Examples:
    """Read all of a map-style torch data set, one item after the other.

    Args:
        data: has `__len__` and `__getitem__`; an item is (image, label, ...), the image as
            `image_array` takes it, the label an integer.
        where: what it is, for errors.
        classes: number of classes; None where the labels themselves tell.
        skip_bad: leave out items that fail, and add them to `skipped`.
        skipped: gains a line for each item left out.

    Returns:
        The examples, in the data set's order.

    Raises:
        DataError: If an item fails and `skip_bad` is false, or nothing is left.

    Example:
        >>> items = [(np.zeros((8, 8, 3), np.uint8), 1)]
        >>> read_torch_dataset(items, "train", None, False, []).labels
        tensor([1])
    """
    labels: list[int] = []

    def images() -> Iterator[np.ndarray]:
        for i in range(len(data)):
            place = f"{where}[{i}]"
            try:
                image, label = _read_item(data, i, place)
            except DataError as error:
                if not skip_bad:
                    raise
                skipped.append(str(error))
                continue
            labels.append(label)
            yield image

    store = ImageStore.from_images(images())
    if not labels:
        raise DataError(f"{where} holds no image that can be read; give at least one")
    numbers = torch.tensor(labels, dtype=torch.int64)
    return make_examples(store, numbers, classes, f"labels of {where}", skip_bad, skipped)


def _read_item(data: Any, index: int, place: str) -> tuple[np.ndarray, int]:
    try:
        item = data[index]
    except Exception as error:  # a user's data set may raise anything
        raise DataError(f"{place} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise DataError(f"{place} is a {type(item).__name__}; it must be (image, label)")
    if isinstance(item[1], (bool, np.bool_)):
        raise DataError(f"{place} has the label {item[1]!r}; labels are integers 0, 1, 2 ...")
    try:
        label = operator.index(item[1])
    except TypeError as error:
        sentence = f"{place} has the label {item[1]!r}; labels are integers 0, 1, 2 ..."
        raise DataError(sentence) from error
    return image_array(item[0], place), label


def load_torch_datasets(
    train: Any,
    test: Any,
    *,
    class_names: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Make a Dataset of two map-style torch data sets.

    Args:
        train: see `read_torch_dataset`; its attribute `classes`, if it is a list of strings, names
            the classes, as in torchvision.
        test: the same.
        class_names: name of each label, before the data set's own.
        skip_bad: leave out items that fail, and classes that lack a part.

    Returns:
        The data set.

    Raises:
        DataError: If an item fails or the parts do not hold together.

    Example:
        >>> items = [(np.zeros((8, 8, 3), np.uint8), label) for label in (0, 1)]
        >>> load_torch_datasets(items, items, class_names=["cat", "dog"]).class_names
        ('cat', 'dog')
    """
    names = own_class_names(train) if class_names is None else class_names
    classes = None if names is None else len(names)
    skipped: list[str] = []
    parts = [
        read_torch_dataset(data, f"the {split} data set", classes, skip_bad, skipped)
        for split, data in (("train", train), ("test", test))
    ]
    title = type(train).__name__.lower()
    origin = f"data set {title}"
    return assemble_numbered(title, origin, parts[0], parts[1], names, skip_bad, skipped)


def own_class_names(data: Any) -> list[str] | None:
    """Give the class names that a data set carries in `classes`, as torchvision's do.

    Args:
        data: any object.

    Returns:
        The names, or None.

    Example:
        >>> own_class_names([]) is None
        True
    """
    names = getattr(data, "classes", None)
    if isinstance(names, (list, tuple)) and names and all(isinstance(n, str) for n in names):
        return list(names)
    return None
