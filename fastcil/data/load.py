"""`load` and `load_examples`: whatever the source is, the same packed Dataset or Examples."""

from __future__ import annotations

import os
import re
import tarfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcil.data import (
    arrays,
    cifar,
    cub200,
    folder,
    food101,
    imagenet,
    imagenet32,
    mini_imagenet,
    mit67,
    mnist,
    scenes,
    torch_datasets,
)
from fastcil.data.places import resolve
from fastcil.data.store import Dataset, Examples
from fastcil.data.subset import OPTIONS, WHOLE, Subset
from fastcil.errors import DataError

_SCENES = ("classes", "size", "train_per_class", "test_per_class", "seed")
_NAMES = ("class_names",)
# Folders of a published form: who tells one, who reads it.
_PUBLISHED = (
    (mnist.is_mnist, mnist.load_mnist),
    (imagenet32.is_imagenet32, imagenet32.load_imagenet32),
    (mit67.is_mit67, mit67.load_mit67),
    (food101.is_food101, food101.load_food101),
    (cub200.is_cub200, cub200.load_cub200),
    (mini_imagenet.is_mini_imagenet, mini_imagenet.load_mini_imagenet),
    (imagenet.is_imagenet, imagenet.load_imagenet),
)
# Data sets that go by a name: who finds them, who reads them.
_NAMED = {
    food101.NAME: (food101.find_food101, food101.load_food101),
    cub200.NAME: (cub200.find_cub200, cub200.load_cub200),
    mini_imagenet.NAME: (mini_imagenet.find_mini_imagenet, mini_imagenet.load_mini_imagenet),
}
_LIST = "list"
_FORMS = (
    'give a path, "scenes", "cifar10", "cifar100", ((x_train, y_train), (x_test, y_test)), a pair'
    " of map-style torch data sets, or a Dataset"
)
_EXAMPLE_FORMS = (
    "give a path, (x, y), (x, y, class_names), a mapping of class names to images, a map-style"
    " torch data set, or a Dataset"
)


def load(source: Any, *, skip_bad: bool = False, download: bool = False, **options: Any) -> Dataset:
    """Read a data set of any kind into packed uint8 images at their own resolution.

    | source | what it is | options |
    |---|---|---|
    | ``"scenes"`` | drawn by fastcil: `fastcil.data.scenes.make_scenes` | classes, size, ... |
    | ``"scenes:classes=8,size=32"`` | the same, options in the name | |
    | ``"cifar10"``, ``"cifar100"`` | the original binary archives, or a path to one | |
    | folder or ``.tar`` | ``train/<class>/...`` and ``test/<class>/...`` (or ``val/``) | |
    | folder | MNIST's four idx files, gzipped or not: `fastcil.data.mnist.load_mnist` | |
    | folder | ImageNet32 as npz: `fastcil.data.imagenet32.load_imagenet32` | |
    | folder | MIT-67, ``Images`` and its two lists: `fastcil.data.mit67.load_mit67` | |
    | ``"food101"`` or folder | its ``images`` and ``meta``: `fastcil.data.food101` | |
    | ``"cub200"`` or folder | ``images`` and its lists: `fastcil.data.cub200` | |
    | ``"mini-imagenet"`` or folder | `fastcil.data.mini_imagenet` | |
    | ``"imagenet"`` or folder | ``train``, ``val``, or Kaggle's: `fastcil.data.imagenet` | list |
    | ``"imagenet100"`` | a folder of its own, or classes of ImageNet | list |
    | ``.npz`` | ``x_train, y_train, x_test, y_test``, as Keras's ``mnist.npz`` | class_names |
    | ``((x_train, y_train), (x_test, y_test))`` | uint8 arrays or tensors | class_names |
    | ``(train, test)`` | map-style torch data sets of (image, label) | class_names |
    | Dataset | returned as it is | |

    Every source but ``"scenes"``, which has its own, takes three options more, here or written
    behind its name, ``"cifar100:classes=0-49,train_per_class=100"``. They choose a part of it
    (`fastcil.data.subset.Subset`):

    - ``classes``: numbers of the classes to take, ranges with both ends, ``0-49`` or ``3+5+7-9``
      (or a sequence of whole numbers); their labels are numbered anew from 0 in ascending order;
    - ``train_per_class``, ``test_per_class``: images to take of each class, evenly over the data
      set's order, the same every time; a class with fewer gives all.

    ``"imagenet100:list=podnet"`` says which hundred classes are meant, ``lucir`` being the default
    (`fastcil.data.imagenet.subset_ids`); a list may also be a file of class names. It stands first
    among written options, and goes with any folder of ``train/<class>`` and ``val/<class>``.

    A relative path that does not exist is looked for under FASTCIL_DATA. Float images of torch
    data sets are taken to lie in [0, 1] and are scaled to 0..255. The EXIF orientation of image
    files is applied.

    Args:
        source: see the table.
        skip_bad: leave out what is bad (images that do not decode, labels out of range, classes
            without training or test images), with one warning that counts it, and list it in
            `Dataset.skipped`, instead of raising.
        download: fetch CIFAR to ~/.cache/fastcil if it is nowhere.
        **options: see the table.

    Returns:
        The data set; every class has at least one training and one test image.

    Raises:
        DataError: If the source is bad; one sentence says where, what, and what would do.

    Example:
        >>> data = load("scenes", classes=2, train_per_class=4, test_per_class=1)
        >>> len(data.train), len(data.test), data.class_names
        (8, 2, ('wheel', 'star'))
    """
    source, written = _written_options(source)
    options = {**written, **options}
    drawn = isinstance(source, str) and source == "scenes"
    subset = WHOLE
    if not drawn:
        subset = Subset.of_options({o: options.pop(o) for o in OPTIONS if o in options})
    reader, allowed, what = _reader(source, skip_bad, download, subset)
    for option in options:
        if option not in allowed:
            takes = ", ".join(allowed if drawn else (*allowed, *OPTIONS))
            raise DataError(f"{what} has no option {option!r}; it takes {takes}")
    data = reader(**options)
    if not isinstance(source, Dataset):
        _tell(data.skipped)
    return data


def _tell(skipped: Sequence[str]) -> None:
    """One warning for all that was left out."""
    if skipped:
        warnings.warn(f"{len(skipped)} left out, the first: {skipped[0]}", stacklevel=3)


def _written_options(source: Any) -> tuple[Any, dict[str, Any]]:
    """Split ``"scenes:classes=8,size=32"`` or ``"cifar100:classes=0-49"``: name and options."""
    if not isinstance(source, str):
        return source, {}
    if source.startswith("scenes:"):
        name, written = "scenes", source.partition(":")[2]
        example = "whole numbers, as in 'scenes:classes=8,size=32'"
    else:
        # What stands behind the last colon, unless it goes on as a path or is one.
        match = re.fullmatch(r"(.+):(\s*list\s*=[^:]*|\s*\w+\s*=[^:/\\]*)", source)
        if match is None or os.path.exists(source):
            return source, {}
        name, written = match.groups()
        example = "options as in 'cifar100:classes=0-49,train_per_class=100'"
    options: dict[str, Any] = {}
    for item in written.split(","):
        option, _, value = (text.strip() for text in item.partition("="))
        if option in ("classes", _LIST) and name != "scenes":
            options[option] = value
        elif value.lstrip("-").isdigit():
            options[option] = int(value)
        else:
            raise DataError(f"data is '{source}'; write {example}")
    return name, options


_Reader = tuple[Callable[..., Dataset], tuple[str, ...], str]


def _reader(source: Any, skip_bad: bool, download: bool, subset: Subset) -> _Reader:
    """Choose who reads a source: the function, its options, and what the source is called."""
    if isinstance(source, Dataset):
        return lambda: subset.of(source), (), "a Dataset"
    if isinstance(source, (str, os.PathLike)):
        return _path_reader(source, skip_bad, download, subset)
    if isinstance(source, (tuple, list)) and len(source) == 2:
        train, test = source
        if _is_pair(train) and _is_pair(test):
            return (
                lambda **o: subset.of(arrays.load_arrays(train, test, skip_bad=skip_bad, **o)),
                _NAMES,
                "a pair of arrays",
            )
        if _is_map_style(train) and _is_map_style(test):
            return (
                lambda **o: subset.of(
                    torch_datasets.load_torch_datasets(train, test, skip_bad=skip_bad, **o)
                ),
                _NAMES,
                "a pair of torch data sets",
            )
    raise DataError(f"source is {_describe(source)}; {_FORMS}")


def _path_reader(
    source: str | os.PathLike[str], skip_bad: bool, download: bool, subset: Subset
) -> _Reader:
    if source == "scenes":
        return scenes.make_scenes, _SCENES, "scenes"
    if source in cifar.ARCHIVES:
        return (
            lambda: subset.of(cifar.load_cifar(str(source), download=download)),
            (),
            str(source),
        )
    path = _place(source)
    kind = cifar.find_cifar(path)
    if kind is not None:
        return lambda: subset.of(cifar.load_cifar(kind, path=path)), (), kind
    if path.suffix == ".npz":
        return (
            lambda **o: subset.of(arrays.load_npz(path, skip_bad=skip_bad, **o)),
            _NAMES,
            str(path),
        )
    published = _published_reader(source, path)
    if published is None:
        _check_tree(path)
    read: Callable[..., Dataset] = published or folder.load_folder
    listed = path.is_dir() and read in (folder.load_folder, imagenet.load_imagenet)
    if source in imagenet.NAMES:
        read, listed = partial(read, name=str(source)), True

    def whole(**options: Any) -> Dataset:
        chosen = options.get(_LIST)
        if chosen is None:
            return read(path, skip_bad=skip_bad, subset=subset)
        how = imagenet.load_imagenet if read is folder.load_folder else read
        return how(path, skip_bad=skip_bad, subset=subset, class_list=str(chosen))

    return whole, (_LIST,) if listed else (), str(path)


def _place(source: str | os.PathLike[str]) -> Path:
    """Where a data set lies that goes by a name or by its path."""
    if source in _NAMED:
        return _NAMED[str(source)][0]()
    if source in imagenet.NAMES:
        return imagenet.find_imagenet(str(source))
    return resolve(source)


def _published_reader(source: str | os.PathLike[str], path: Path) -> Callable[..., Dataset] | None:
    """Who reads a folder of a published form."""
    if source in _NAMED:
        return _NAMED[str(source)][1]
    if source in imagenet.NAMES:
        return imagenet.load_imagenet
    return next((read for tells, read in _PUBLISHED if tells(path)), None)


def _check_tree(path: Path) -> None:
    """Refuse a file that is no tar; one that says it is a tar is left to its reader's message."""
    names_tar = ".tar" in path.name or path.suffix in (".tgz", ".tbz2", ".txz")
    if path.is_file() and not names_tar and not tarfile.is_tarfile(path):
        raise DataError(f"{path} is neither a folder nor a .tar nor a .npz; give one of these")


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def _is_map_style(value: Any) -> bool:
    arrays_and_strings = (str, bytes, Mapping, np.ndarray, torch.Tensor)
    has_items = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    return has_items and not isinstance(value, arrays_and_strings)


def _describe(source: Any) -> str:
    if isinstance(source, (tuple, list)):
        inside = ", ".join(type(item).__name__ for item in source[:4])
        return f"a {type(source).__name__} of {len(source)} ({inside})"
    return f"a {type(source).__name__}"


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
    _tell(skipped)
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
    if _is_map_style(source) and not isinstance(source, tuple):
        names, what = torch_datasets.own_class_names(source), "the data set"
        classes = None if names is None else len(names)
        items = torch_datasets.read_torch_dataset(source, what, classes, skip_bad, skipped)
        return arrays.name_examples(items.images, items.labels, names, what, skip_bad, skipped)
    raise DataError(f"data is {_describe(source)}; {_EXAMPLE_FORMS}")


def _path_examples(
    source: str | os.PathLike[str], skip_bad: bool, skipped: list[str]
) -> tuple[Examples, tuple[str, ...]]:
    whole, written = _written_options(source)
    if whole == "scenes":
        data = load(source)
        return data.train, data.class_names
    chosen = written.pop(_LIST, None)
    for option in written:
        if option not in OPTIONS:
            raise DataError(f"{whole} has no option {option!r}; it takes {', '.join(OPTIONS)}")
    subset = Subset.of_options(written)
    path = None if whole in cifar.ARCHIVES else _place(whole)
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
    read = _published_reader(whole, path)
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
    _check_tree(path)
    return folder.examples_of_folder(path, skip_bad, skipped, subset)
