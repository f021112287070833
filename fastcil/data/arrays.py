"""Data sets from arrays and `.npz` files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcil.data.assemble import assemble_numbered, check_names, make_examples
from fastcil.data.convert import image_store, label_tensor
from fastcil.data.store import Dataset, Examples, ImageStore
from fastcil.errors import DataError

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_arrays(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    class_names: Sequence[str] | None = None,
    skip_bad: bool = False,
    name: str = "arrays",
    origin: str = "arrays",
) -> Dataset:
    """Make a Dataset of arrays.

    Args:
        train: images and labels: what `image_store` and `label_tensor` take.
        test: the same.
        class_names: name of each label; without it the labels' decimal forms are the names.
        skip_bad: leave out rows whose label is out of range, and classes that lack a part.
        name: of the data set.
        origin: its path, for errors.

    Returns:
        The data set.

    Raises:
        DataError: If something does not hold together; the sentence says what.

    Example:
        >>> x, y = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])
        >>> load_arrays((x, y), (x, y), class_names=["cat", "dog"]).class_names
        ('cat', 'dog')
    """
    skipped: list[str] = []
    classes = None if class_names is None else len(class_names)
    parts = []
    for split, pair in (("train", train), ("test", test)):
        x, y = f"x_{split} of {origin}", f"y_{split} of {origin}"
        images = image_store(pair[0], x)
        labels = label_tensor(pair[1], len(images), y, x)
        parts.append(make_examples(images, labels, classes, y, skip_bad, skipped))
    return assemble_numbered(name, origin, parts[0], parts[1], class_names, skip_bad, skipped)


def load_npz(
    path: Path, *, class_names: Sequence[str] | None = None, skip_bad: bool = False
) -> Dataset:
    """Read a data set from a `.npz` file.

    It holds x_train and x_test, uint8 [N, H, W, 3] or [N, H, W], and y_train and y_test, integers
    [N]; it may hold class_names, strings [K]. Nothing in it is unpickled.

    Args:
        path: the file.
        class_names: name of each label, before the file's own.
        skip_bad: leave out rows whose label is out of range, and classes that lack a part.

    Returns:
        The data set, named after the file.

    Raises:
        DataError: If the file or its content is not of this form.

    Example:
        >>> import tempfile
        >>> x, y = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "tiny.npz"
        ...     np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
        ...     len(load_npz(path).train)
        4
    """
    arrays = read_npz(path, NPZ_KEYS)
    names = arrays.get("class_names")
    if class_names is None and names is not None:
        class_names = [str(name) for name in names.tolist()]
    train, test = (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])
    return load_arrays(
        train, test, class_names=class_names, skip_bad=skip_bad, name=path.stem, origin=str(path)
    )


def read_npz(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Read arrays, and class_names if it is there, from a `.npz` file without pickle.

    Args:
        path: the file.
        keys: the arrays that must be there.

    Returns:
        The arrays by key.

    Raises:
        DataError: If the file is not a whole `.npz`, lacks a key or holds objects.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "one.npz"
        ...     np.savez(path, x_train=np.arange(3))
        ...     read_npz(path, ["x_train"])["x_train"].tolist()
        [0, 1, 2]
    """
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is not a .npz file or is cut short; write it with numpy.savez")
    arrays = {}
    with np.load(path, allow_pickle=False) as file:
        missing = [key for key in keys if key not in file]
        if missing:
            raise DataError(
                f"{path} has no array {missing[0]}; it has {', '.join(file.files) or 'none'},"
                f" and {', '.join(keys)} are needed"
            )
        for key in (*keys, *(k for k in ("class_names",) if k in file)):
            try:
                arrays[key] = file[key]
            except ValueError as error:
                raise DataError(
                    f"{path}: array {key} is not plain numbers or strings but would need pickle,"
                    " which could run code; store it with a numeric dtype"
                ) from error
            except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise DataError(f"{path}: array {key} is damaged ({error})") from error
    return arrays


def examples_of_arrays(
    images: Any,
    labels: Any,
    class_names: Sequence[str] | None,
    skip_bad: bool,
    skipped: list[str],
) -> tuple[Examples, tuple[str, ...]]:
    """Make examples of arrays for `Learner.learn`.

    Args:
        images: what `image_store` takes.
        labels: what `label_tensor` takes.
        class_names: name of each label; every name needs an image. Without it the classes are the
            labels that occur, in ascending order, and their decimal forms are the names.
        skip_bad: leave out rows whose label is out of range.
        skipped: gains a line for each row left out.

    Returns:
        The examples, labelled by position in the names, and the names.

    Raises:
        DataError: If the arrays do not hold together.

    Example:
        >>> x = np.zeros((2, 8, 8, 3), np.uint8)
        >>> examples_of_arrays(x, [7, 5], None, False, [])[1]
        ('5', '7')
    """
    store = image_store(images, "x")
    numbers = label_tensor(labels, len(store), "y", "x")
    return name_examples(store, numbers, class_names, "y", skip_bad, skipped)


def name_examples(
    store: ImageStore,
    labels: torch.Tensor,
    class_names: Sequence[str] | None,
    where: str,
    skip_bad: bool,
    skipped: list[str],
) -> tuple[Examples, tuple[str, ...]]:
    """Label images by position in the class names.

    Args:
        store: N images.
        labels: integers [N].
        class_names: as in `examples_of_arrays`.
        where: what holds the labels, for errors.
        skip_bad: leave out rows whose label is out of range.
        skipped: gains a line for each row left out.

    Returns:
        The examples and the names.

    Raises:
        DataError: If a label is out of range or a name has no image.

    Example:
        >>> store = ImageStore.from_batch(np.zeros((2, 8, 8, 3), np.uint8))
        >>> name_examples(store, torch.tensor([0, 1]), ["cat", "dog"], "y", False, [])[1]
        ('cat', 'dog')
    """
    classes = None if class_names is None else len(class_names)
    examples = make_examples(store, labels, classes, where, skip_bad, skipped)
    present = examples.labels.unique().tolist()
    if not present:
        raise DataError(f"no label in {where} is in range; give at least one image to learn")
    if class_names is None:
        numbers = torch.searchsorted(torch.tensor(present), examples.labels)
        return Examples(examples.images, numbers), tuple(str(label) for label in present)
    check_names(class_names, "class_names")
    lacking = [name for label, name in enumerate(class_names) if label not in set(present)]
    if lacking:
        raise DataError(f"class {lacking[0]!r} has no image in {where}; leave its name out")
    return examples, tuple(class_names)


def examples_of_dict(images: Mapping[str, Any]) -> tuple[Examples, tuple[str, ...]]:
    """Make examples of images by class name for `Learner.learn`.

    Args:
        images: class name to what `image_store` takes; the classes keep the mapping's order.

    Returns:
        The examples and the class names.

    Raises:
        DataError: If a class has no image, or an image is of another form.

    Example:
        >>> examples_of_dict({"cat": [np.zeros((8, 8, 3), np.uint8)]})[1]
        ('cat',)
    """
    check_names(list(images), "the mapping of images")
    if not images:
        raise DataError("the mapping of images is empty; give at least one class")
    stores = [image_store(batch, f"class {name!r}") for name, batch in images.items()]
    counts = torch.tensor([len(store) for store in stores])
    labels = torch.arange(len(stores)).repeat_interleave(counts)
    return Examples(ImageStore.cat(stores), labels), tuple(images)
