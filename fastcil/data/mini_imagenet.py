"""mini-ImageNet (Vinyals et al. 2016): 100 classes of ImageNet, 600 images of each.

It was made for few-shot learning, with classes of their own for training, validation and test. Here
as in continual learning (Bai et al. 2023, App. A) every class is learned: of its images, in order,
the first five sixths are for training (500) and the last sixth for testing (100). On disk it is

- `images/*.jpg` and `train.csv`, `val.csv`, `test.csv`, lines `filename,label` of 64, 16 and 20
  classes (Ravi and Larochelle 2017): in the order of the lists;
- `<class>/*.jpg`, here or in `images/`, or in `train/`, `val/` and `test/`: by file name.

Where a list `train.csv` and a list `test.csv`, or folders `train/` and `test/`, have classes in
common, they say themselves which images are for training and which for testing, as in few-shot
class-incremental learning: `train/<class>/*.jpg` and `test/<class>/*.jpg` with 500 and 100 images
of each class (Tao et al. 2020), or `images/*.jpg` and two lists of 100 classes, often in `split/`
(Zhang et al. 2021).
"""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

from fastcil.data.assemble import assemble
from fastcil.data.image_files import Reader, read_files
from fastcil.data.listing import Listing, Parts, is_image
from fastcil.data.places import find_folder
from fastcil.data.store import Dataset
from fastcil.data.subset import WHOLE, Subset
from fastcil.errors import DataError

NAME = "mini-imagenet"
FOLDERS = (
    *("mini-imagenet", "mini_imagenet", "miniImageNet", "miniimagenet", "mini-ImageNet"),
    *("MiniImageNet", "Mini-ImageNet", "MINI-ImageNet"),
)
_IMAGES = "images"
_SPLIT = "split"
_SPLITS = ("train", "val", "test")
_CLASSES = 100
_SIXTH = 6
_PICKLE = re.compile(r"mini-?_?imagenet.*\.(pkl|pickle)", re.IGNORECASE)
_WNID = re.compile(r"n\d{8}")
_FORMS = (
    "give the folder that holds images/ with train.csv, val.csv and test.csv, or a folder of images"
    " for each class"
)


def find_mini_imagenet() -> Path:
    """Find the data set under one of its usual names, here or in FASTCIL_DATA.

    Returns:
        The folder.

    Raises:
        DataError: If there is none.

    Example:
        >>> try:
        ...     found = find_mini_imagenet().is_dir()
        ... except DataError as error:
        ...     found = "miniImageNet" in str(error)
        >>> found
        True
    """
    wanted = "the folder that holds images and its three lists, or a folder for each class"
    return find_folder(NAME, FOLDERS, wanted)


def is_mini_imagenet(path: Path) -> bool:
    """Tell the data set by what is nowhere else: the lists, its 100 class folders, its pickles.

    Args:
        path: a file or folder.

    Returns:
        Whether it is one; of class folders in ``train``, ``val`` and ``test`` only its name tells.

    Example:
        >>> is_mini_imagenet(Path("photos"))
        False
    """
    if not path.is_dir():
        return _is_pickle(path.name)
    if _lists(path) and (path / _IMAGES).is_dir():
        return True
    folders = _folders(path)
    named = len(folders) == _CLASSES and all(_WNID.fullmatch(name) for name in folders)
    return named or (not folders and bool(_pickles(path)))


def load_mini_imagenet(
    path: Path,
    *,
    skip_bad: bool = False,
    subset: Subset = WHOLE,
    reader: Reader = read_files,
) -> Dataset:
    """Read all classes, the last sixth of each one's images for testing, or those said to be.

    Args:
        path: the folder.
        skip_bad: leave out images that do not decode and classes that lack a part.
        subset: what to take.
        reader: reads the images of a part.

    Returns:
        The data set ``mini-imagenet``, its classes sorted by name (WordNet ids), their images as
        listed, or by path.

    Raises:
        DataError: If it is of another form, an image is missing or does not decode, or only
            pickles are there, which are not opened: that would run what is in them.

    Example:
        >>> import cv2, numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("n2", "n1"):
        ...         os.mkdir(f"{folder}/{name}")
        ...         for k in range(6):
        ...             _ = cv2.imwrite(f"{folder}/{name}/{k}.png", np.zeros((8, 8, 3), np.uint8))
        ...     data = load_mini_imagenet(Path(folder))
        >>> data.class_names, len(data.train), len(data.test)
        (('n1', 'n2'), 10, 2)
    """
    found = _listed(path) if _lists(path) else _by_folder(path)
    if not any(found.values()):
        raise DataError(_nothing(path))
    by_part, what = _divided(path, found)
    names = sorted({*by_part[0], *by_part[1]})
    names = [names[k] for k in subset.keep(len(names), str(path), least=2)]
    listing = Listing(path)
    for files in by_part:
        listing.files.update((f, path.joinpath(*f)) for fs in files.values() for f in fs)
    skipped: list[str] = []
    read: list[str] = []
    train, test = (
        reader(listing, subset.files(files, per_class), names, skip_bad, skipped, kept)
        for files, per_class, kept in (
            (by_part[0], subset.train_per_class, read),
            (by_part[1], subset.test_per_class, None),
        )
    )
    title = subset.name(NAME)
    return assemble(title, str(path), train, test, names, what, skip_bad, skipped, read)


_Files = dict[str, list[Parts]]
"""Class name to its images."""


def _divided(path: Path, found: dict[str, _Files]) -> tuple[tuple[_Files, _Files], tuple[str, str]]:
    """Images for training and for testing, and what these parts are called."""
    train, test = found.get("train", {}), found.get("test", {})
    listed = bool(_lists(path))
    if train.keys() & test.keys():
        return (train, test), ("train.csv", "test.csv") if listed else ("train", "test")
    missing = [f"{split}.csv" for split in _SPLITS if listed and split not in found]
    if missing:
        raise DataError(
            f"{path} has no {missing[0]}; all three lists are needed, for the classes of each are"
            f" learned"
        )
    together: _Files = {}
    for files in found.values():
        for name, mine in files.items():
            together.setdefault(name, []).extend(mine)
    halves = {name: _split(files) for name, files in together.items()}
    parts = tuple({name: both[k] for name, both in halves.items()} for k in (0, 1))
    return (parts[0], parts[1]), (
        "the first five sixths of its images",
        "the last sixth of its images",
    )


def _split(files: list[Parts]) -> tuple[list[Parts], list[Parts]]:
    """The first five sixths, and the last sixth: 500 and 100 of 600."""
    held_out = max(1, len(files) // _SIXTH)
    return files[:-held_out], files[-held_out:]


def _lists(path: Path) -> dict[str, Path]:
    """Which of the three lists there are, beside the images or in a folder of their own."""
    places = {split: (path / f"{split}.csv", path / _SPLIT / f"{split}.csv") for split in _SPLITS}
    found = {split: [f for f in files if f.is_file()] for split, files in places.items()}
    return {split: files[0] for split, files in found.items() if files}


def _listed(path: Path) -> dict[str, _Files]:
    """List to class name to its images, in the order of the list."""
    found: dict[str, _Files] = {}
    listed: set[str] = set()
    for split, file in _lists(path).items():
        files = found.setdefault(split, {})
        try:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                rows = [row for row in csv.reader(lines) if row]
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{file} is no list of filename,label; get it again") from error
        if len(rows) < 2 or rows[0] != ["filename", "label"]:
            raise DataError(f"{file} is no list of images; it begins with the line filename,label")
        for number, row in enumerate(rows[1:], 2):
            if len(row) != 2 or not all(row) or Path(row[0]).name != row[0]:
                raise DataError(
                    f"line {number} of {file} is '{','.join(row)}'; every line names an image as"
                    f" filename,label"
                )
            if row[0] in listed:
                raise DataError(
                    f"line {number} of {file} lists '{row[0]}' again; an image is of one class, and"
                    f" listed once"
                )
            listed.add(row[0])
            files.setdefault(row[1], []).append((_IMAGES, row[0]))
    return found


def _by_folder(path: Path) -> dict[str, _Files]:
    """Part to class name to its images in class folders, sorted."""
    if not path.is_dir():
        return {}
    inner = [_IMAGES] if (path / _IMAGES).is_dir() else list(_SPLITS)
    roots: list[Parts] = [(name,) for name in inner if (path / name).is_dir()] or [()]
    found: dict[str, _Files] = {}
    for root in roots:
        files = found.setdefault("/".join(root), {})
        for name in _folders(path.joinpath(*root)):
            inside = path.joinpath(*root, name)
            images = sorted(file for file in os.listdir(inside) if is_image((file,)))
            if images:
                files[name] = [(*root, name, file) for file in images]
    return found


def _folders(path: Path) -> list[str]:
    """Names of the folders in one, without hidden ones."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _is_pickle(name: str) -> bool:
    return bool(_PICKLE.fullmatch(name))


def _pickles(path: Path) -> list[str]:
    """Names of its pickled form in a folder."""
    return sorted(name for name in os.listdir(path) if _is_pickle(name))


def _nothing(path: Path) -> str:
    """What to say where no image is."""
    pickles = _pickles(path) if path.is_dir() else [path.name]
    if pickles:
        return (
            f"{path if path.is_file() else path / pickles[0]} is a pickle, which would run whatever"
            f" is in it and is not opened; {_FORMS}"
        )
    return f"{path} holds no mini-ImageNet; {_FORMS}"
