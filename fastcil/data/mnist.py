"""MNIST (LeCun et al. 1998), and what comes in its format: Fashion-MNIST, KMNIST.

Four idx files: two zero bytes, a type (8: uint8), the number of axes, their lengths as big-endian
uint32, and the values.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from fastcil.data.arrays import load_arrays
from fastcil.data.store import Dataset
from fastcil.data.subset import WHOLE, Subset
from fastcil.errors import DataError

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_FOLDERS = ("", "raw", "MNIST/raw")  # below the path given
_UINT8 = 8


def is_mnist(path: Path) -> bool:
    """Tell whether a folder holds training images in MNIST's format.

    Args:
        path: a file or folder.

    Returns:
        Whether they are there, or in ``raw`` or ``MNIST/raw`` below it.

    Example:
        >>> is_mnist(Path("photos"))
        False
    """
    return _folder(path) is not None


def load_mnist(path: Path, *, skip_bad: bool = False, subset: Subset = WHOLE) -> Dataset:
    """Read the four files, each as it is or gzipped.

    Grey values become RGB by being repeated.

    Args:
        path: the folder.
        skip_bad: leave out classes that lack a part.
        subset: what to take.

    Returns:
        The data set, named after the folder; the classes are "0", "1" ...

    Raises:
        DataError: If a file is missing, damaged or of another form.

    Example:
        >>> import struct, tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for images, labels in _FILES.values():
        ...         sizes = struct.pack(">4B3I", 0, 0, 8, 3, 2, 28, 28)
        ...         _ = Path(root, images).write_bytes(sizes + bytes(2 * 28 * 28))
        ...         sizes = struct.pack(">4BI", 0, 0, 8, 1, 2)
        ...         _ = Path(root, labels).write_bytes(sizes + bytes([0, 1]))
        ...     len(load_mnist(Path(root)).train)
        2
    """
    folder = _folder(path) or path
    pairs = {
        part: (_read_idx(_find(folder, images), 3), _read_idx(_find(folder, labels), 1))
        for part, (images, labels) in _FILES.items()
    }
    data = load_arrays(
        pairs["train"], pairs["test"], skip_bad=skip_bad, name=path.name, origin=str(folder)
    )
    return subset.of(data)


def _folder(path: Path) -> Path | None:
    for below in _FOLDERS:
        if any((path / below / name).is_file() for name in _spellings(_FILES["train"][0])):
            return path / below
    return None


def _spellings(name: str) -> list[str]:
    """A file's name, as published and as some unpackers write it, gzipped or not."""
    names = (name, name.replace("-idx", ".idx"))
    return [*names, *(f"{name}.gz" for name in names)]


def _find(folder: Path, name: str) -> Path:
    for spelling in _spellings(name):
        if (folder / spelling).is_file():
            return folder / spelling
    raise DataError(f"{folder} has no {name}; put MNIST's four files there, gzipped or not")


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """Read the values of an idx file of uint8."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end ({error}); fetch it again") from error
    start = 4 + 4 * axes
    if len(data) < start or data[:4] != bytes([0, 0, _UINT8, axes]):
        raise DataError(f"{path} is no idx file of uint8 with {axes} axes; fetch it again")
    shape = [int(n) for n in np.frombuffer(data, ">u4", axes, 4)]
    if len(data) - start != math.prod(shape):
        raise DataError(
            f"{path} has {len(data) - start} values instead of {math.prod(shape)}, for"
            f" {' x '.join(map(str, shape))}; fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
