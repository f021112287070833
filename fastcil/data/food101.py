"""Food-101 (Bossard et al. 2014) as it is published, and as torchvision unpacks it.

`images/<class>/<number>.jpg`, and `meta/train.json` and `meta/test.json` (or the `.txt` files
beside them), which name 750 and 250 images of each class as `<class>/<number>`, without a suffix.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fastcil.data.assemble import assemble
from fastcil.data.image_files import Reader, read_files
from fastcil.data.listing import Listing, Parts
from fastcil.data.places import find_folder
from fastcil.data.store import Dataset
from fastcil.data.subset import WHOLE, Subset
from fastcil.errors import DataError

NAME = "food101"
FOLDERS = ("food101", "food-101", "Food-101", "Food101")
_IMAGES, _META = "images", "meta"
_SPLITS = {"train": ("train.json", "train.txt"), "test": ("test.json", "test.txt")}


def find_food101() -> Path:
    """Find the data set under one of its usual names, here or in FASTCIL_DATA.

    Returns:
        The folder that holds ``images`` and ``meta``.

    Raises:
        DataError: If there is none.

    Example:
        >>> from fastcil.errors import DataError
        >>> try:
        ...     found = find_food101().is_dir()
        ... except DataError as error:
        ...     found = "food-101" in str(error)
        >>> found
        True
    """
    return _root(find_folder(NAME, FOLDERS, f"the folder that holds {_IMAGES} and {_META}"))


def is_food101(path: Path) -> bool:
    """Tell whether a folder holds the images and one of the lists, itself or in ``food-101``.

    Args:
        path: a file or folder.

    Returns:
        Whether it does.

    Example:
        >>> is_food101(Path("photos"))
        False
    """
    root = _root(path)
    lists = (root / _META / file for files in _SPLITS.values() for file in files)
    return (root / _IMAGES).is_dir() and any(file.is_file() for file in lists)


def load_food101(
    path: Path,
    *,
    skip_bad: bool = False,
    subset: Subset = WHOLE,
    reader: Reader = read_files,
) -> Dataset:
    """Read the images that the two lists name.

    Args:
        path: the folder that holds ``images`` and ``meta``, or the one above it.
        skip_bad: leave out images that do not decode and classes that lack a part.
        subset: what to take.
        reader: reads the images of a part.

    Returns:
        The data set ``food101``, its classes sorted by name, their images as listed.

    Raises:
        DataError: If a folder or a list is missing or of another form, or an image is missing or
            does not decode.

    Example:
        >>> import cv2, numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = Path(folder)
        ...     (root / "meta").mkdir()
        ...     for dish in ("pho", "tacos"):
        ...         (root / "images" / dish).mkdir(parents=True)
        ...         _ = cv2.imwrite(f"{root}/images/{dish}/7.jpg", np.zeros((8, 6, 3), np.uint8))
        ...     for part in ("train", "test"):
        ...         lists = {"tacos": ["tacos/7"], "pho": ["pho/7"]}
        ...         _ = (root / "meta" / f"{part}.json").write_text(json.dumps(lists))
        ...     load_food101(root).class_names
        ('pho', 'tacos')
    """
    root = _root(path)
    if not (root / _IMAGES).is_dir():
        raise DataError(
            f"{path} has no {_IMAGES}/; give the folder that holds {_IMAGES}/ and {_META}/, as the"
            f" archive food-101 unpacks to"
        )
    listed = {part: _read_list(root, part) for part in _SPLITS}
    names = sorted({*listed["train"], *listed["test"]})
    names = [names[k] for k in subset.keep(len(names), str(root), least=2)]
    listing = Listing(root / _IMAGES)
    for files in listed.values():
        listing.files.update((f, listing.path.joinpath(*f)) for fs in files.values() for f in fs)
    skipped: list[str] = []
    read: list[str] = []
    train, test = (
        reader(listing, subset.files(listed[part], per_class), names, skip_bad, skipped, found)
        for part, per_class, found in (
            ("train", subset.train_per_class, read),
            ("test", subset.test_per_class, None),
        )
    )
    title, parts = subset.name(NAME), (f"{_META}/train", f"{_META}/test")
    return assemble(title, str(root), train, test, names, parts, skip_bad, skipped, read)


def _root(path: Path) -> Path:
    """The folder itself, or the one in it that torchvision makes."""
    inside = path / "food-101"
    return inside if not (path / _IMAGES).is_dir() and inside.is_dir() else path


def _read_list(root: Path, part: str) -> dict[str, list[Parts]]:
    """Class name to its files, in the order of the list."""
    file = next((root / _META / f for f in _SPLITS[part] if (root / _META / f).is_file()), None)
    if file is None:
        raise DataError(
            f"{root / _META} has neither {' nor '.join(_SPLITS[part])}; the archive brings both"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
        named = _json_entries(json.loads(text)) if file.suffix == ".json" else text.splitlines()
    except (UnicodeDecodeError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{file} is no list of <class>/<number>; unpack the archive again"
        ) from error
    files: dict[str, list[Parts]] = {}
    for entry in named:
        parts = tuple(str(entry).strip().split("/"))
        if parts == ("",):
            continue
        if len(parts) != 2 or any(part in ("", ".", "..") for part in parts):
            raise DataError(f"{file} names '{entry}'; every image is named as <class>/<number>")
        files.setdefault(parts[0], []).append((parts[0], f"{parts[1]}.jpg"))
    return files


def _json_entries(lists: dict[str, list[str]]) -> Iterable[str]:
    """All entries of a mapping from class to its images."""
    return [entry for entries in lists.values() for entry in entries]
