"""`load_examples`: the images of some classes, whatever the source is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fastcil.data import arrays, cifar, folder, imagenet, torch_datasets
from fastcil.data.load import load
from fastcil.data.sources import (
    LIST,
    check_tree,
    describe,
    is_map_style,
    packed_reader,
    place,
    published_reader,
    tell,
    written_options,
)
from fastcil.data.store import Dataset, Examples
from fastcil.data.subset import OPTIONS, Subset
from fastcil.errors import DataError

_FORMS = (
    "give a path, (x, y), (x, y, class_names), a mapping of class names to images, a map-style"
    " torch data set, or a Dataset"
)


def load_examples(source: Any, *, skip_bad: bool = False) -> tuple[Examples, tuple[str, ...]]:
    """Read the images of some classes, for `fastcil.Learner.learn`.

    | source | what it is |
    |---|---|
    | folder or ``.tar`` | ``<class>/...``; with ``train/<class>/...``, that part |
    | ``.npz`` | ``x_train, y_train`` and perhaps ``class_names`` |
    | ``(x, y)``, ``(x, y, class_names)`` | uint8 arrays or tensors, or a list of images |
    | mapping | class name to a batch or list of its images |
    | map-style torch data set | items (image, label); its ``classes`` are the names |
    | Dataset, ``"scenes"``, and what else `load` reads | the training part |

    Names and paths may have written options, as in `load`: ``"cifar100:classes=50-99"``.

    Without class names, the labels that occur are the classes, in ascending order, and their
    decimal forms are the names.

    Args:
        source: see the table.
        skip_bad: leave out what is bad, with one warning that counts it, instead of raising.

    Returns:
        The examples, labelled by position in the class names, and the class names.

    Raises:
        DataError: If the source is bad; one sentence says where, what, and what would do.

    Example:
        >>> import numpy as np
        >>> examples, names = load_examples({"cat": [np.zeros((8, 6, 3), np.uint8)]})
        >>> len(examples), names
        (1, ('cat',))
    """
    skipped: list[str] = []
    found = _read_examples(source, skip_bad, skipped)
    tell(skipped)
    return found


def _read_examples(
    source: Any, skip_bad: bool, skipped: list[str]
) -> tuple[Examples, tuple[str, ...]]:
    if isinstance(source, Dataset):
        return source.train, source.class_names
    if isinstance(source, (str, os.PathLike)):
        return _path_examples(source, skip_bad, skipped)
    if isinstance(source, Mapping):
        return arrays.examples_of_dict(source)
    if isinstance(source, tuple) and len(source) in (2, 3):
        names = source[2] if len(source) == 3 else None
        return arrays.examples_of_arrays(source[0], source[1], names, skip_bad, skipped)
    if is_map_style(source) and not isinstance(source, tuple):
        names, what = torch_datasets.own_class_names(source), "the data set"
        classes = None if names is None else len(names)
        items = torch_datasets.read_torch_dataset(source, what, classes, skip_bad, skipped)
        return arrays.name_examples(items.images, items.labels, names, what, skip_bad, skipped)
    raise DataError(f"data is {describe(source)}; {_FORMS}")


def _path_examples(
    source: str | os.PathLike[str], skip_bad: bool, skipped: list[str]
) -> tuple[Examples, tuple[str, ...]]:
    whole, written = written_options(source)
    if whole == "scenes":
        data = load(source)
        return data.train, data.class_names
    chosen = written.pop(LIST, None)
    for option in written:
        if option not in OPTIONS:
            raise DataError(f"{whole} has no option {option!r}; it takes {', '.join(OPTIONS)}")
    subset = Subset.of_options(written)
    path = None if whole in cifar.ARCHIVES else place(whole)
    if path is None or cifar.find_cifar(path) is not None:
        data = load(whole)
        return subset.examples(data.train, data.class_names, str(whole))
    if path.suffix == ".npz":
        batch = arrays.read_npz(path, arrays.NPZ_KEYS[:2])
        names = batch["class_names"].tolist() if "class_names" in batch else None
        found = arrays.examples_of_arrays(
            batch["x_train"], batch["y_train"], names, skip_bad, skipped
        )
        return subset.examples(*found, str(path))
    read = packed_reader(path) or published_reader(whole, path)
    if whole in imagenet.NAMES or chosen is not None:
        name = whole if whole in imagenet.NAMES else None
        read = partial(imagenet.load_imagenet, name=name, class_list=chosen)
    if read is not None:
        # A data set has two classes or more, what is to be learned may have one.
        one = subset.classes if subset.classes and len(subset.classes) == 1 else None
        data = read(
            path, skip_bad=skip_bad, subset=replace(subset, classes=None) if one else subset
        )
        skipped.extend(data.skipped)
        return Subset(one).examples(data.train, data.class_names, str(path))
    check_tree(path)
    return folder.examples_of_folder(path, skip_bad, skipped, subset)
