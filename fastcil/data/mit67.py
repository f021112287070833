"""MIT-67 indoor scenes (Quattoni and Torralba 2009) as they are published.

`Images/<class>/*.jpg`, and `TrainImages.txt` and `TestImages.txt`, which name 80 and 20 images of
each class, a line each, as `<class>/<file>`.
"""

from __future__ import annotations

from pathlib import Path

from fastcil.data.assemble import assemble
from fastcil.data.image_files import Reader, read_files
from fastcil.data.listing import Listing, Parts
from fastcil.data.store import Dataset
from fastcil.data.subset import WHOLE, Subset
from fastcil.errors import DataError

_IMAGES = "Images"
_LISTS = {"train": "TrainImages.txt", "test": "TestImages.txt"}


def is_mit67(path: Path) -> bool:
    """Tell whether a folder holds the images and one of the two lists.

    Args:
        path: a file or folder.

    Returns:
        Whether it does; the lists may be in ``Images`` too.

    Example:
        >>> is_mit67(Path("photos"))
        False
    """
    return (path / _IMAGES).is_dir() and any(_list(path, name) for name in _LISTS.values())


def load_mit67(
    path: Path,
    *,
    skip_bad: bool = False,
    subset: Subset = WHOLE,
    reader: Reader = read_files,
) -> Dataset:
    """Read the images that the two lists name; the others in ``Images`` are passed over.

    Args:
        path: the folder.
        skip_bad: leave out images that do not decode and classes that lack a part.
        subset: what to take.
        reader: reads the images of a part.

    Returns:
        The data set ``mit67``, its classes sorted by name, their images as listed.

    Raises:
        DataError: If a list is missing or not of this form, or an image is missing or does not
            decode.

    Example:
        >>> import cv2, numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for room in ("bar", "gym"):
        ...         folder = Path(root) / "Images" / room
        ...         folder.mkdir(parents=True)
        ...         _ = cv2.imwrite(str(folder / "a.jpg"), np.zeros((8, 6, 3), np.uint8))
        ...     for name in _LISTS.values():
        ...         _ = (Path(root) / name).write_text("bar/a.jpg" + chr(10) + "gym/a.jpg")
        ...     load_mit67(Path(root)).class_names
        ('bar', 'gym')
    """
    listed = {part: _read_list(path, name) for part, name in _LISTS.items()}
    names = sorted({*listed["train"], *listed["test"]})
    names = [names[k] for k in subset.keep(len(names), str(path), least=2)]
    listing = Listing(path / _IMAGES)
    for files in listed.values():
        listing.files.update((f, path / _IMAGES / "/".join(f)) for fs in files.values() for f in fs)
    skipped: list[str] = []
    read: list[str] = []
    train, test = (
        reader(listing, subset.files(listed[part], per_class), names, skip_bad, skipped, found)
        for part, per_class, found in (
            ("train", subset.train_per_class, read),
            ("test", subset.test_per_class, None),
        )
    )
    title, parts = subset.name("mit67"), (_LISTS["train"], _LISTS["test"])
    return assemble(title, str(path), train, test, names, parts, skip_bad, skipped, read)


def _list(path: Path, name: str) -> Path | None:
    places = (path / name, path / _IMAGES / name)
    return next((place for place in places if place.is_file()), None)


def _read_list(path: Path, name: str) -> dict[str, list[Parts]]:
    """Class name to its files, in the order of the list."""
    file = _list(path, name)
    if file is None:
        raise DataError(f"{path} has no {name}; put both published lists beside {_IMAGES}")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text; get it again") from error
    files: dict[str, list[Parts]] = {}
    for number, line in enumerate(lines, 1):
        parts = tuple(line.strip().split("/"))
        if parts == ("",):
            continue
        if len(parts) != 2 or any(part in ("", ".", "..") for part in parts):
            raise DataError(
                f"line {number} of {file} is '{line}'; every line names an image as <class>/<file>"
            )
        files.setdefault(parts[0], []).append(parts)
    return files
