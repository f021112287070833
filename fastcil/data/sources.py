"""Whose reader a source is for, by its name or by what lies at its path."""

from __future__ import annotations

import os
import re
import tarfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcil.data import (
    cifar,
    cub200,
    folder,
    food101,
    imagenet,
    imagenet32,
    mapped,
    mini_imagenet,
    mit67,
    mnist,
)
from fastcil.data.image_files import Reader, read_files
from fastcil.data.places import resolve
from fastcil.data.store import Dataset
from fastcil.data.subset import OPTIONS, Subset
from fastcil.errors import DataError

LIST = "list"
Found = tuple[Callable[..., Dataset], tuple[str, ...], str]
"""What reads a source, the options that it takes, and what the source is called."""

# Folders whose images are no files each: who tells one, who reads it.
_PACKED = (
    (mapped.is_mapped, mapped.load_mapped),
    (mnist.is_mnist, mnist.load_mnist),
    (imagenet32.is_imagenet32, imagenet32.load_imagenet32),
)
# Folders of image files in a published form: who tells one, who reads it.
_PUBLISHED = (
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


def written_options(source: Any) -> tuple[Any, dict[str, Any]]:
    """Split ``"scenes:classes=8,size=32"`` or ``"cifar100:classes=0-49"``: name and options.

    Args:
        source: any source; only of text something is split.

    Returns:
        The source without its options, and these.

    Raises:
        DataError: If an option has no value that can be read.

    Example:
        >>> written_options("cifar100:classes=0-49,train_per_class=100")
        ('cifar100', {'classes': '0-49', 'train_per_class': 100})
    """
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
        if option in ("classes", LIST) and name != "scenes":
            options[option] = value
        elif value.lstrip("-").isdigit():
            options[option] = int(value)
        else:
            raise DataError(f"data is '{source}'; write {example}")
    return name, options


def file_reader(
    source: str | os.PathLike[str],
    path: Path,
    skip_bad: bool,
    subset: Subset,
    reader: Reader = read_files,
) -> Found:
    """Who reads a data set of image files.

    Args:
        source: its name or path, as given.
        path: where it lies, of `place`.
        skip_bad: as `fastcil.data.load` has it.
        subset: what to take of it.
        reader: what reads the images of a part.

    Returns:
        What reads it, with the option ``list`` where there can be one.

    Raises:
        DataError: If it is a file that is no tar.

    Example:
        >>> file_reader("here", Path("."), False, Subset())[1:]
        (('list',), '.')
    """
    published = published_reader(source, path)
    if published is None:
        check_tree(path)
    read: Callable[..., Dataset] = published or folder.load_folder
    listed = path.is_dir() and read in (folder.load_folder, imagenet.load_imagenet)
    if source in imagenet.NAMES:
        read, listed = partial(read, name=str(source)), True

    def whole(**options: Any) -> Dataset:
        chosen = options.get(LIST)
        if chosen is None:
            return read(path, skip_bad=skip_bad, subset=subset, reader=reader)
        how = imagenet.load_imagenet if read is folder.load_folder else read
        return how(path, skip_bad=skip_bad, subset=subset, class_list=str(chosen), reader=reader)

    return whole, (LIST,) if listed else (), str(path)


def load_by(source: str | os.PathLike[str], reader: Reader, *, skip_bad: bool = False) -> Dataset:
    """The data set of image files that `fastcil.data.load` gives, its images read in another way.

    Args:
        source: as there, options behind its name included.
        reader: reads the images of a part.
        skip_bad: as there.

    Returns:
        The data set.

    Raises:
        DataError: As there; or if its images are no files.

    Example:
        >>> try:
        ...     load_by("cifar100", read_files)
        ... except DataError as error:
        ...     print(error)
        source is 'cifar100', whose images are no image files; load() reads it as it is
    """
    whole, options = written_options(os.fspath(source))
    subset = Subset.of_options({o: options.pop(o) for o in OPTIONS if o in options})
    path = None if whole == "scenes" or whole in cifar.ARCHIVES else place(whole)
    if path is None or path.suffix == ".npz" or cifar.find_cifar(path) or packed_reader(path):
        raise DataError(
            f"source is '{whole}', whose images are no image files; load() reads it as it is"
        )
    read, allowed, what = file_reader(whole, path, skip_bad, subset, reader)
    check_options(options, allowed, (*allowed, *OPTIONS), what)
    return read(**options)


def check_options(
    options: Mapping[str, Any], allowed: Sequence[str], known: Sequence[str], what: str
) -> None:
    """Refuse an option that a source does not have.

    Args:
        options: those given.
        allowed: those that may be.
        known: those to tell of.
        what: the source, for the error.

    Raises:
        DataError: If there is one.

    Example:
        >>> check_options({"list": "podnet"}, ("list",), ("list",), "photos")
    """
    for option in options:
        if option not in allowed:
            raise DataError(f"{what} has no option {option!r}; it takes {', '.join(known)}")


def packed_reader(path: Path) -> Callable[..., Dataset] | None:
    """Who reads a folder whose images are not a file each.

    Args:
        path: a file or folder.

    Returns:
        What reads it, or None.

    Example:
        >>> packed_reader(Path("photos")) is None
        True
    """
    return next((read for tells, read in _PACKED if tells(path)), None)


def place(source: str | os.PathLike[str]) -> Path:
    """Where a data set lies that goes by a name or by its path.

    Args:
        source: the name or path.

    Raises:
        DataError: If it is nowhere.

    Example:
        >>> place(".").is_dir()
        True
    """
    if source in _NAMED:
        return _NAMED[str(source)][0]()
    if source in imagenet.NAMES:
        return imagenet.find_imagenet(str(source))
    return resolve(source)


def published_reader(source: str | os.PathLike[str], path: Path) -> Callable[..., Dataset] | None:
    """Who reads a folder of image files in a published form.

    Args:
        source: its name or path, as given.
        path: where it lies.

    Returns:
        What reads it; None of plain class folders.

    Example:
        >>> published_reader("photos", Path("photos")) is None
        True
    """
    if source in _NAMED:
        return _NAMED[str(source)][1]
    if source in imagenet.NAMES:
        return imagenet.load_imagenet
    return next((read for tells, read in _PUBLISHED if tells(path)), None)


def check_tree(path: Path) -> None:
    """Refuse a file that is no tar; one that says it is a tar is left to its reader's message.

    Args:
        path: a file or folder.

    Raises:
        DataError: If it is such a file.

    Example:
        >>> check_tree(Path("."))
    """
    names_tar = ".tar" in path.name or path.suffix in (".tgz", ".tbz2", ".txz")
    if path.is_file() and not names_tar and not tarfile.is_tarfile(path):
        raise DataError(f"{path} is neither a folder nor a .tar nor a .npz; give one of these")


def tell(skipped: Sequence[str]) -> None:
    """One warning for all that was left out.

    Args:
        skipped: a line for each.

    Example:
        >>> tell([])
    """
    if skipped:
        warnings.warn(f"{len(skipped)} left out, the first: {skipped[0]}", stacklevel=3)


def is_map_style(value: Any) -> bool:
    """Tell a map-style torch data set.

    Args:
        value: a source.

    Example:
        >>> is_map_style("photos")
        False
    """
    arrays_and_strings = (str, bytes, Mapping, np.ndarray, torch.Tensor)
    has_items = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    return has_items and not isinstance(value, arrays_and_strings)


def describe(source: Any) -> str:
    """Say what a source is that nobody reads.

    Args:
        source: it.

    Example:
        >>> describe((1, "a")), describe(1)
        ('a tuple of 2 (int, str)', 'a int')
    """
    if isinstance(source, (tuple, list)):
        inside = ", ".join(type(item).__name__ for item in source[:4])
        return f"a {type(source).__name__} of {len(source)} ({inside})"
    return f"a {type(source).__name__}"
