"""CUB-200-2011 (Wah et al. 2011) as it is published.

`images/<class>/*.jpg`, and beside the folder

- `images.txt`: lines `<number> <class>/<file>`;
- `image_class_labels.txt`: lines `<number> <class number>`;
- `train_test_split.txt`: lines `<number> <1 for training, 0 for testing>`;
- `bounding_boxes.txt`, if it is there: lines `<number> <x> <y> <width> <height>` in pixels.

5,994 and 5,794 images of 200 birds; classes are named as their folders are, `001.Black_footed_...`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastcil.data.assemble import assemble
from fastcil.data.image_files import Reader, read_files
from fastcil.data.listing import Listing, Parts
from fastcil.data.places import find_folder
from fastcil.data.store import Dataset, Examples
from fastcil.data.subset import WHOLE, Subset
from fastcil.errors import DataError

NAME = "cub200"
FOLDERS = (
    *("CUB_200_2011", "cub200", "CUB200", "cub-200-2011", "CUB-200-2011", "cub_200_2011"),
    *("CUB-200", "cub"),
)
_IMAGES = "images"
_FILES, _LABELS, _PARTS = "images.txt", "image_class_labels.txt", "train_test_split.txt"
_BOXES = "bounding_boxes.txt"
_BEHIND = {
    _FILES: "its <class>/<file>",
    _LABELS: "the number of its class",
    _PARTS: "1 for training or 0 for testing",
    _BOXES: "x, y, width and height of the bird",
}


def find_cub200() -> Path:
    """Find the data set under one of its usual names, here or in FASTCIL_DATA.

    Returns:
        The folder that holds ``images`` and its lists.

    Raises:
        DataError: If there is none.

    Example:
        >>> try:
        ...     found = find_cub200().is_dir()
        ... except DataError as error:
        ...     found = "CUB_200_2011" in str(error)
        >>> found
        True
    """
    return _root(find_folder(NAME, FOLDERS, f"the folder that holds {_IMAGES} and its lists"))


def is_cub200(path: Path) -> bool:
    """Tell whether a folder holds images and the two lists, itself or in ``CUB_200_2011``.

    Args:
        path: a file or folder.

    Returns:
        Whether it does.

    Example:
        >>> is_cub200(Path("photos"))
        False
    """
    root = _root(path)
    lists = (_FILES, _PARTS)
    return (root / _IMAGES).is_dir() and all((root / name).is_file() for name in lists)


def load_cub200(
    path: Path,
    *,
    skip_bad: bool = False,
    subset: Subset = WHOLE,
    reader: Reader = read_files,
) -> Dataset:
    """Read the images that the lists name.

    Args:
        path: the folder that holds ``images`` and the lists, or the one above it.
        skip_bad: leave out images that do not decode and classes that lack a part.
        subset: what to take.
        reader: reads the images of a part.

    Returns:
        The data set ``cub200``, its classes in the order of their numbers, their images as listed;
        with the birds' boxes, widened to whole pixels, where ``bounding_boxes.txt`` is there.

    Raises:
        DataError: If a list is missing or of another form, or an image is missing or does not
            decode.

    Example:
        >>> import cv2, numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root, lines = Path(folder), {_FILES: "", _LABELS: "", _PARTS: ""}
        ...     for k, bird in enumerate(("1.Owl", "1.Owl", "2.Wren", "2.Wren")):
        ...         (root / "images" / bird).mkdir(parents=True, exist_ok=True)
        ...         _ = cv2.imwrite(f"{root}/images/{bird}/{k}.jpg", np.zeros((8, 6, 3), np.uint8))
        ...         values = f"{bird}/{k}.jpg", bird[0], k % 2
        ...         for name, value in zip(lines, values):
        ...             lines[name] += f"{k} {value}" + chr(10)
        ...     for name, text in lines.items():
        ...         _ = (root / name).write_text(text)
        ...     data = load_cub200(root)
        >>> data.class_names, data.train_files
        (('1.Owl', '2.Wren'), ('1.Owl/1.jpg', '2.Wren/3.jpg'))
    """
    root = _root(path)
    files = _read_files(root)
    names = _class_names(root, files)
    names = [names[k] for k in subset.keep(len(names), str(root), least=2)]
    training = {k: value == "1" for k, value in _read(root / _PARTS, "0|1", files).items()}
    listing = Listing(root / _IMAGES)
    listing.files.update((f, listing.path.joinpath(*f)) for f in files.values())
    skipped: list[str] = []
    train_read: list[str] = []
    test_read: list[str] = []
    train, test = (
        reader(
            listing,
            subset.files(_of_part(files, training, wanted), per_class),
            names,
            skip_bad,
            skipped,
            read,
        )
        for wanted, per_class, read in (
            (True, subset.train_per_class, train_read),
            (False, subset.test_per_class, test_read),
        )
    )
    parts = ("the training part", "the test part")
    title = subset.name(NAME)
    data = assemble(title, str(root), train, test, names, parts, skip_bad, skipped, train_read)
    if not (root / _BOXES).is_file():
        return data
    boxes = _read_boxes(root, files)
    kept = set(data.class_names)
    return replace(
        data,
        train_boxes=_boxes_of(data.train, train_read, boxes, kept),
        test_boxes=_boxes_of(data.test, test_read, boxes, kept),
    )


def _root(path: Path) -> Path:
    """The folder itself, or the one in it that the archive unpacks to."""
    inside = path / FOLDERS[0]
    return inside if not (path / _IMAGES).is_dir() and inside.is_dir() else path


def _read(file: Path, form: str, wanted: Iterable[str] | None = None) -> dict[str, str]:
    """Number -> what stands behind it, in the order of the list.

    Args:
        file: The list.
        form: Regular expression of what may stand there.
        wanted: Numbers that must be in it.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a list; unpack the archive again") from error
    found: dict[str, str] = {}
    for row, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(rf"(\d+)\s+({form})", line.strip())
        if match is None or match[1] in found:
            raise DataError(
                f"line {row} of {file} is '{line}'; every line is the number of an image, each"
                f" once, and {_BEHIND[file.name]}"
            )
        found[match[1]] = match[2]
    for number in wanted or ():
        if number not in found:
            raise DataError(f"{file} has no line for image {number} of {_FILES}; unpack it again")
    return found


def _read_files(root: Path) -> dict[str, Parts]:
    """Number -> class folder and file."""
    found = _read(root / _FILES, r"[^/]+/[^/]+")
    if not found:
        raise DataError(f"{root / _FILES} names no image; unpack the archive again")
    files: dict[str, Parts] = {number: tuple(file.split("/")) for number, file in found.items()}
    for file in files.values():
        if any(part in (".", "..") for part in file):
            raise DataError(f"{root / _FILES} names '{'/'.join(file)}', which is no file in images")
    return files


def _class_names(root: Path, files: dict[str, Parts]) -> list[str]:
    """Folders of the classes, in the order of their numbers."""
    labels = _read(root / _LABELS, r"\d+", files)
    number_of: dict[str, int] = {}
    for number, (folder, name) in files.items():
        if number_of.setdefault(folder, int(labels[number])) != int(labels[number]):
            raise DataError(
                f"{root / _LABELS} has {folder}/{name} in class {labels[number]}, but others of"
                f" its folder in class {number_of[folder]}; the lists are of two data sets"
            )
    return sorted(number_of, key=lambda folder: (number_of[folder], folder))


def _of_part(
    files: dict[str, Parts], training: dict[str, bool], wanted: bool
) -> dict[str, list[Parts]]:
    """Class to its images of a part, in the order of the list."""
    mine: dict[str, list[Parts]] = {}
    for number, file in files.items():
        if training[number] == wanted:
            mine.setdefault(file[0], []).append(file)
    return mine


def _read_boxes(root: Path, files: dict[str, Parts]) -> dict[str, list[float]]:
    """Image -> x, y, width and height."""
    number = r"\d+(?:\.\d*)?"
    found = _read(root / _BOXES, rf"{number}(?:\s+{number}){{3}}", files)
    return {"/".join(f): [float(v) for v in found[k].split()] for k, f in files.items()}


def _boxes_of(
    examples: Examples, read: Sequence[str], boxes: dict[str, list[float]], classes: set[str]
) -> Tensor:
    """The smallest boxes of whole pixels around the published ones, inside the images."""
    mine = [boxes[name] for name in read if name.partition("/")[0] in classes]
    x, y, width, height = torch.tensor(mine, dtype=torch.float64).reshape(-1, 4).unbind(1)
    limits = examples.images.sizes.cpu().repeat(1, 2)  # [N, 4]
    ends = torch.stack([y.floor(), x.floor(), (y + height).ceil(), (x + width).ceil()], 1)
    return ends.long().minimum(limits).to(torch.int16)
