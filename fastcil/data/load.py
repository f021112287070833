"""`load`: whatever the source is, the same packed Dataset."""

from __future__ import annotations

import os
from typing import Any

from fastcil.data import arrays, cifar, imagenet, scenes, torch_datasets
from fastcil.data.sources import (
    Found,
    check_options,
    describe,
    file_reader,
    is_map_style,
    packed_reader,
    place,
    tell,
    written_options,
)
from fastcil.data.store import Dataset
from fastcil.data.subset import OPTIONS, WHOLE, Subset
from fastcil.errors import DataError

_SCENES = ("classes", "size", "train_per_class", "test_per_class", "seed")
_NAMES = ("class_names",)
_FORMS = (
    'give a path, "scenes", "cifar10", "cifar100", ((x_train, y_train), (x_test, y_test)), a pair'
    " of map-style torch data sets, or a Dataset"
)


def load(source: Any, *, skip_bad: bool = False, download: bool = False, **options: Any) -> Dataset:
    """Read a data set of any kind into packed uint8 images at their own resolution.

    | source | what it is | options |
    |---|---|---|
    | ``"scenes"`` | drawn by fastcil: `fastcil.data.scenes.make_scenes` | classes, size, ... |
    | ``"scenes:classes=8,size=32"`` | the same, options in the name | |
    | ``"cifar10"``, ``"cifar100"`` | the original binary archives, or a path to one | |
    | folder | what ``fastcil ingest`` wrote, memory-mapped: `fastcil.data.mapped.load_mapped` | |
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
    source, written = written_options(source)
    options = {**written, **options}
    drawn = isinstance(source, str) and source == "scenes"
    subset = WHOLE
    if not drawn:
        subset = Subset.of_options({o: options.pop(o) for o in OPTIONS if o in options})
    reader, allowed, what = _reader(source, skip_bad, download, subset)
    check_options(options, allowed, allowed if drawn else (*allowed, *OPTIONS), what)
    data = reader(**options)
    if not isinstance(source, Dataset):
        tell(data.skipped)
    return data


def _reader(source: Any, skip_bad: bool, download: bool, subset: Subset) -> Found:
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
        if is_map_style(train) and is_map_style(test):
            return (
                lambda **o: subset.of(
                    torch_datasets.load_torch_datasets(train, test, skip_bad=skip_bad, **o)
                ),
                _NAMES,
                "a pair of torch data sets",
            )
    raise DataError(f"source is {describe(source)}; {_FORMS}")


def _path_reader(
    source: str | os.PathLike[str], skip_bad: bool, download: bool, subset: Subset
) -> Found:
    if source == "scenes":
        return scenes.make_scenes, _SCENES, "scenes"
    if source in cifar.ARCHIVES:
        return (
            lambda: subset.of(cifar.load_cifar(str(source), download=download)),
            (),
            str(source),
        )
    path = place(source)
    kind = cifar.find_cifar(path)
    if kind is not None:
        return lambda: subset.of(cifar.load_cifar(kind, path=path)), (), kind
    if path.suffix == ".npz":
        return (
            lambda **o: subset.of(arrays.load_npz(path, skip_bad=skip_bad, **o)),
            _NAMES,
            str(path),
        )
    packed = None if source in imagenet.NAMES else packed_reader(path)
    if packed is not None:
        return lambda: packed(path, skip_bad=skip_bad, subset=subset), (), str(path)
    return file_reader(source, path, skip_bad, subset)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2
