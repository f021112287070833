"""Downsampled ImageNet (Chrabaszcz et al. 2017): ImageNet32, and 16 and 64, in the npz form.

Each file holds `data`, uint8 [n, 3 s s], the red, green and blue planes of s x s, and `labels`,
integers [n] from 1 on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastcil.data.arrays import read_npz
from fastcil.data.assemble import assemble
from fastcil.data.convert import label_tensor
from fastcil.data.store import Dataset, Examples, ImageStore
from fastcil.data.subset import WHOLE, Subset
from fastcil.errors import DataError

_BATCHES = tuple(f"train_data_batch_{k}.npz" for k in range(1, 11))
_VAL = "val_data.npz"
_CLASSES = 1000


def is_imagenet32(path: Path) -> bool:
    """Tell whether a folder holds training batches of downsampled ImageNet.

    Args:
        path: a file or folder.

    Returns:
        Whether some are there or in a folder in it, such as ``Imagenet32_train``.

    Example:
        >>> is_imagenet32(Path("photos"))
        False
    """
    return any(_find(path, name) is not None for name in (_BATCHES[0], _pickled(_BATCHES[0])))


def load_imagenet32(path: Path, *, skip_bad: bool = False, subset: Subset = WHOLE) -> Dataset:
    """Read ``train_data_batch_1.npz`` to ``_10.npz`` and ``val_data.npz``.

    They lie in the folder or, as they are published, in two folders in it. The validation images
    are the test part. Batches are read one after the other into one store: beside it, never more
    than one of them is in memory, and of what ``subset`` leaves out nothing is kept.

    Args:
        path: the folder.
        skip_bad: leave out classes that lack a part.
        subset: what to take; its class numbers start at 0.

    Returns:
        The data set, ``imagenet32`` if that is its size; a class's name is its published number,
        "1" to "1000".

    Raises:
        DataError: If a file is missing, damaged or of another form.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in (*_BATCHES, _VAL):
        ...         data = np.zeros((2, 3 * 32 * 32), np.uint8)
        ...         np.savez(Path(root) / name, data=data, labels=[1, 2])
        ...     data = load_imagenet32(Path(root))
        >>> data.name, len(data.train), data.class_names
        ('imagenet32', 20, ('1', '2'))
    """
    if _find(path, _BATCHES[0]) is None:
        raise DataError(
            f"{path} holds downsampled ImageNet as Python pickles, which could run code; get its"
            " npz form"
        )
    found = {name: _find(path, name) for name in (*_BATCHES, _VAL)}
    for name, file in found.items():
        if file is None:
            raise DataError(f"{path} has no {name}, nor has a folder in it; get it too")
    train_files = [file for name, file in found.items() if file is not None and name != _VAL]
    val_files = [file for name, file in found.items() if file is not None and name == _VAL]
    train_labels, val_labels = ([_labels(f) for f in files] for files in (train_files, val_files))
    count = int(max(labels.max() for labels in (*train_labels, *val_labels))) + 1
    keep = subset.keep(count, str(path), least=2)
    train = _read(train_files, train_labels, subset, keep, subset.train_per_class)
    val = _read(val_files, val_labels, subset, keep, subset.test_per_class)
    name = subset.name(f"imagenet{int(train.images.sizes[0, 0])}" if len(train) else path.name)
    names = [str(k + 1) for k in keep]
    return assemble(name, str(path), train, val, names, ("train", "val"), skip_bad, ())


def _pickled(name: str) -> str:
    return name.removesuffix(".npz")


def _find(path: Path, name: str) -> Path | None:
    """Find a file in the folder or in a folder in it."""
    if (path / name).is_file():
        return path / name
    return min((file for file in path.glob(f"*/{name}") if file.is_file()), default=None)


def _labels(path: Path) -> torch.Tensor:
    """Labels from 0 on, int64 [n]."""
    array = read_npz(path, ["labels"])["labels"]
    labels = label_tensor(array, array.size, f"labels of {path}", "data")
    if not len(labels) or labels.min() < 1 or labels.max() > _CLASSES:
        shown = f"from {int(labels.min())} to {int(labels.max())}" if len(labels) else "none"
        raise DataError(f"labels of {path} are {shown}; they must be from 1 to {_CLASSES}")
    return labels - 1


def _read(
    files: Sequence[Path],
    labels: Sequence[torch.Tensor],
    subset: Subset,
    keep: Sequence[int],
    per_class: int | None,
) -> Examples:
    """Read the images to take of each file into their place."""
    rows, renumbered = subset.rows(torch.cat(list(labels)), keep, per_class)
    images: np.ndarray | None = None  # [M, s, s, 3]
    start = 0
    for path, mine in zip(files, labels, strict=True):
        # Rows are ascending: those of one file are a stretch of them.
        first, last = torch.searchsorted(rows, torch.tensor([start, start + len(mine)])).tolist()
        if first < last:
            planes = _planes(path, len(mine))  # [n, 3, s, s]
            side = planes.shape[2]
            if images is None:
                images = np.empty((len(rows), side, side, 3), np.uint8)
            if side != images.shape[1]:
                raise DataError(
                    f"{path} holds images of {side} x {side} pixels, but {files[0].name} of"
                    f" {images.shape[1]} x {images.shape[1]}; keep the sizes apart"
                )
            chosen = (rows[first:last] - start).numpy()
            whole = len(chosen) == len(mine)
            images[first:last] = (planes if whole else planes[chosen]).transpose(0, 2, 3, 1)
        start += len(mine)
    if images is None:
        return Examples(ImageStore.from_images([]), renumbered)
    return Examples(ImageStore.from_batch(images), renumbered)


def _planes(path: Path, count: int) -> np.ndarray:
    """The images of a file, uint8 [n, 3, s, s]."""
    data = read_npz(path, ["data"])["data"]
    side = math.isqrt(data.shape[1] // 3) if data.ndim == 2 else 0
    if data.dtype != np.uint8 or data.ndim != 2 or not side or data.shape[1] != 3 * side**2:
        raise DataError(
            f"data of {path} is {data.dtype} of shape {list(data.shape)}; it must be uint8"
            " [n, 3 s s]"
        )
    if len(data) != count:
        raise DataError(f"{path} has {len(data)} images and {count} labels; get it again")
    return data.reshape(count, 3, side, side)
