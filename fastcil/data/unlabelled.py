"""Images without labels, from any tree of image files: what a codec learns from."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from fastcil.data import cifar
from fastcil.data.image_files import read_files
from fastcil.data.listing import SUFFIXES, list_source
from fastcil.data.load_examples import load_examples
from fastcil.data.mapped import is_mapped
from fastcil.data.places import resolve
from fastcil.data.store import Examples, ImageStore
from fastcil.errors import DataError


def load_images(source: Any, *, limit: int | None = None, skip_bad: bool = False) -> Examples:
    """Read images for training that needs no labels; all get label 0.

    Of a folder or a tar every image file is taken, at any depth, in the order of their paths: the
    folders of COCO and of CelebA-HQ, or a camera's. Of one that has parts for training and test,
    ``train/...`` and ``test/...``, only those for training are. Images keep their own size. They
    are held in memory as they are, so a large set may need ``limit``.

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
    named = isinstance(source, (str, os.PathLike)) and source not in ("scenes", *cifar.ARCHIVES)
    if not named:
        return None
    try:
        path = resolve(source)
    except DataError:
        return None
    packed = path.suffix == ".npz" or is_mapped(path) or cifar.find_cifar(path) is not None
    return None if packed else path


def _read_tree(path: Path, limit: int | None, skip_bad: bool) -> Examples:
    """The image files under a folder or in a tar."""
    listing = list_source(path)
    files = sorted(listing.files)
    if {"train", "test"} <= {file[0] for file in files if len(file) > 1}:
        files = [file for file in files if file[0] == "train"]
    if not files:
        raise DataError(
            f"{path} holds no image; give a folder or a tar with files that end in "
            f"{', '.join(SUFFIXES)}"
        )
    wanted = [files[k] for k in _evenly(len(files), limit)]
    skipped: list[str] = []
    examples = read_files(listing, {"": wanted}, [""], skip_bad, skipped)
    if skipped:
        warnings.warn(f"{len(skipped)} left out, the first: {skipped[0]}", stacklevel=3)
    return _unlabelled(examples.images, path)


def _evenly(count: int, limit: int | None) -> list[int]:
    """Positions of so many of ``count``, evenly spaced."""
    taken = count if limit is None else min(limit, count)
    return [k * count // taken for k in range(taken)]


def _unlabelled(images: ImageStore, source: Any) -> Examples:
    """Images with label 0."""
    if not len(images):
        raise DataError(f"{source} has no image that can be read; give at least one")
    return Examples(images, torch.zeros(len(images), dtype=torch.int64, device=images.device))
