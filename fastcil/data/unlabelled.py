"""Images without labels, from any tree of image files: what a codec learns from."""

from __future__ import annotations

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fastcil.data import cifar
from fastcil.data.image_files import Reader, read_files
from fastcil.data.listing import SUFFIXES, Listing, Parts, list_source
from fastcil.data.load_examples import load_examples
from fastcil.data.places import resolve
from fastcil.data.sources import packed_reader
from fastcil.data.store import Dataset, Examples, ImageStore
from fastcil.errors import DataError

CLASS = "unlabelled"
"""What the one class of a data set without labels is called."""
# train, train2017, val2017, test-set, validation: the group tells the parts for training.
_SPLIT = re.compile(
    r"(?:(train|training)|val|valid|validation|test|testing)(?:[-_]?(?:set|\d{4}))?", re.IGNORECASE
)


def load_images(source: Any, *, limit: int | None = None, skip_bad: bool = False) -> Examples:
    """Read images for training that needs no labels; all get label 0.

    Of a folder or a tar every image file is taken, at any depth, in the order of their paths: the
    folders of COCO and of CelebA-HQ, or a camera's. Where a part for training lies beside others,
    such as ``train`` and ``val``, or COCO's ``train2017``, ``val2017`` and ``test2017``, only what
    is in that part is taken, wherever in the tree that is. Images keep their own size.

    They are held in memory, decoded. What is too large for that is first written as a data set
    that is memory-mapped, by ``fastcil ingest SOURCE OUT --unlabelled true``, whose ``OUT`` is
    read here; or ``limit`` takes some.

    Args:
        source: a path, looked for under FASTCIL_DATA too; an `ImageStore`, `Examples`, or anything
            else that `fastcil.data.load_examples` reads, such as ``"scenes"``, ``"cifar100"`` or an
            ``.npz``, of which the training part is taken.
        limit: the number of images to take, evenly over their order, the same every time; None for
            all. Of folders and tars the others are not decoded.
        skip_bad: leave out images that do not decode, with one warning that counts them, instead
            of raising.

    Returns:
        The images, with labels 0.

    Raises:
        DataError: If there is no image, or the source is bad.

    Example:
        >>> examples = load_images("scenes:classes=2,size=32,train_per_class=4,test_per_class=1")
        >>> len(examples), examples.labels.unique().tolist()
        (8, [0])
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be at least 1, or None for all images")
    tree = _tree(source)
    if tree is not None:
        return _read_tree(tree, limit, skip_bad)
    if isinstance(source, Examples):
        images = source.images
    elif isinstance(source, ImageStore):
        images = source
    else:
        images = load_examples(source, skip_bad=skip_bad)[0].images
    kept = _evenly(len(images), limit)
    if len(kept) < len(images):
        images = images.part(torch.tensor(kept))
    return _unlabelled(images, source)


def _tree(source: Any) -> Path | None:
    """The folder or tar that a source is, unless its images are no files there."""
    if not isinstance(source, (str, os.PathLike)) or _is_named(source):
        return None
    try:
        path = resolve(source)
    except DataError:
        return None
    packed = path.suffix == ".npz" or packed_reader(path) or cifar.find_cifar(path) is not None
    return None if packed else path


def _is_named(source: str | os.PathLike[str]) -> bool:
    """Whether a source goes by a name that is no path."""
    return source in ("scenes", *cifar.ARCHIVES)


def tree_by(source: str | os.PathLike[str], reader: Reader, *, skip_bad: bool = False) -> Dataset:
    """The image files that `load_images` takes, as a data set of one class, read in another way.

    Args:
        source: a folder or tar.
        reader: reads the images.
        skip_bad: as there.

    Returns:
        The data set, whose test part is empty.

    Raises:
        DataError: If there is no image, or the source's images are no files.

    Example:
        >>> try:
        ...     tree_by("scenes", read_files)
        ... except DataError as error:
        ...     print(error)
        source is 'scenes', whose images are no image files; load_images() reads it as it is
    """
    tree = _tree(source)
    if tree is None:
        if not _is_named(source):
            resolve(source)  # which says so if nothing is there
        raise DataError(
            f"source is '{source}', whose images are no image files; load_images() reads it as it "
            f"is"
        )
    listing, files = _files_of(tree)
    skipped: list[str] = []
    examples = reader(listing, {"": files}, [""], skip_bad, skipped)
    none = examples.view(torch.empty(0, dtype=torch.int64))
    name = tree.name.split(".tar")[0]
    return Dataset(name, examples, none, (CLASS,), skipped=tuple(skipped))


def _read_tree(path: Path, limit: int | None, skip_bad: bool) -> Examples:
    """The image files under a folder or in a tar."""
    listing, files = _files_of(path)
    wanted = [files[k] for k in _evenly(len(files), limit)]
    skipped: list[str] = []
    examples = read_files(listing, {"": wanted}, [""], skip_bad, skipped)
    if skipped:
        warnings.warn(f"{len(skipped)} left out, the first: {skipped[0]}", stacklevel=3)
    return _unlabelled(examples.images, path)


def _files_of(path: Path) -> tuple[Listing, list[Parts]]:
    """What lies in a tree, and the files to learn from, in order.

    Raises:
        DataError: There is none.
    """
    listing = list_source(path)
    files = _for_training(sorted(listing.files))
    if not files:
        raise DataError(
            f"{path} holds no image; give a folder or a tar with files that end in "
            f"{', '.join(SUFFIXES)}"
        )
    return listing, files


def _for_training(files: Iterable[Parts]) -> list[Parts]:
    """Without what lies beside a part for training, wherever there are parts of both kinds."""
    files = list(files)
    kinds: dict[Parts, set[bool]] = defaultdict(set)
    for file in files:
        for depth, folder in enumerate(file[:-1]):
            kind = _kind(folder)
            if kind is not None:
                kinds[file[:depth]].add(kind)
    divided = {parent for parent, found in kinds.items() if len(found) == 2}
    return [
        file
        for file in files
        if all(
            depth < len(file) - 1 and _kind(file[depth])
            for depth in range(len(file))
            if file[:depth] in divided
        )
    ]


@lru_cache(maxsize=1 << 12)
def _kind(folder: str) -> bool | None:
    """Whether a folder is by its name a part for training; None if it is no part."""
    match = _SPLIT.fullmatch(folder)
    return None if match is None else match[1] is not None


def _evenly(count: int, limit: int | None) -> list[int]:
    """Positions of so many of ``count``, evenly spaced."""
    taken = count if limit is None else min(limit, count)
    return [k * count // taken for k in range(taken)]


def _unlabelled(images: ImageStore, source: Any) -> Examples:
    """Images with label 0."""
    if not len(images):
        raise DataError(f"{source} has no image that can be read; give at least one")
    return Examples(images, torch.zeros(len(images), dtype=torch.int64, device=images.device))
