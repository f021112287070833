"""Data sets of image files: `train/<class>/...` and `test/<class>/...` in a folder or a tar.

An image is whatever has one of the `SUFFIXES`; hidden files and files of other kinds are passed
over. All images become RGB uint8 of their own size, as OpenCV decodes them (IMREAD_COLOR): grey is
repeated, palettes are looked up, alpha is dropped, CMYK is converted, of 16 bits the upper 8
remain, and the EXIF orientation is applied, so that an image is held as a viewer shows it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastcil.data.assemble import assemble, check_names
from fastcil.data.image_files import Reader, read_files
from fastcil.data.listing import CLASSES_FILE, SUFFIXES, Listing, list_source
from fastcil.data.store import Dataset, Examples
from fastcil.data.subset import WHOLE, Subset
from fastcil.errors import DataError


def load_folder(
    path: Path,
    *,
    skip_bad: bool = False,
    subset: Subset = WHOLE,
    reader: Reader = read_files,
) -> Dataset:
    """Read a data set of image files.

    The training images are under `train/<class>/`, at any depth, the test images under
    `test/<class>/` or, where there is no such folder, `val/<class>/`. Labels follow the sorted
    class names, or the lines of `classes.txt` where the root has one. Images are in the order of
    their label, then of their path. A tar is read from its beginning to its end and never
    unpacked onto the disk; members that are not regular files are passed over, and a root folder
    that all its members share does not count.

    Args:
        path: a folder, or a tar in any compression that tarfile reads.
        skip_bad: leave out images that do not decode and classes that lack a part, and list them
            in `Dataset.skipped`.
        subset: what to take, its class numbers being places among all class names; other images
            are not decoded.
        reader: reads the images of a part.

    Returns:
        The data set, named after the file or folder.

    Raises:
        DataError: If the tree is another, an image does not decode or is too large, a class lacks
            training or test images, or the archive is damaged.

    Example:
        >>> import cv2, numpy as np, os, tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        ...         os.makedirs(f"{root}/{name}")
        ...         _ = cv2.imwrite(f"{root}/{name}/a.png", np.zeros((8, 6, 3), np.uint8))
        ...     load_folder(Path(root)).class_names
        ('cat', 'dog')
    """
    listing = list_source(path)
    held_out = "test" if listing.images("test") else "val"
    train_files, test_files = listing.images("train"), listing.images(held_out)
    for part, files in (("train", train_files), (held_out, test_files)):
        if not files:
            wanted = "test/ or val/" if part == "val" else "train/"
            raise DataError(
                f"{path} has no class folder in {wanted}; the images go to train/<class>/ and"
                f" test/<class>/, with a name that ends in {', '.join(SUFFIXES)}"
            )
    names = _class_names(listing, {*train_files, *test_files})
    names = [names[k] for k in subset.keep(len(names), str(path), least=2)]
    train_files = subset.files(train_files, subset.train_per_class)
    test_files = subset.files(test_files, subset.test_per_class)
    skipped: list[str] = []
    read: list[str] = []
    train = reader(listing, train_files, names, skip_bad, skipped, read)
    test = reader(listing, test_files, names, skip_bad, skipped)
    title = subset.name(path.name.split(".tar")[0])
    parts = ("train", held_out)
    return assemble(title, str(path), train, test, names, parts, skip_bad, skipped, read)


def examples_of_folder(
    path: Path, skip_bad: bool, skipped: list[str], subset: Subset = WHOLE
) -> tuple[Examples, tuple[str, ...]]:
    """Read the images of new classes: `<class>/...`, or the `train/<class>/...` part.

    Args:
        path: a folder or a tar.
        skip_bad: leave out images that do not decode, and classes without images.
        skipped: gains a line for everything left out.
        subset: what to take, as in `load_folder`.

    Returns:
        The examples and the class names.

    Raises:
        DataError: As `load_folder`.

    Example:
        >>> import cv2, numpy as np, os, tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     os.makedirs(f"{root}/cat")
        ...     _ = cv2.imwrite(f"{root}/cat/a.png", np.zeros((8, 6, 3), np.uint8))
        ...     examples_of_folder(Path(root), False, [])[1]
        ('cat',)
    """
    listing = list_source(path)
    files = listing.images("train") or listing.images("")
    if not files:
        raise DataError(
            f"{path} has no class folder; the images go to <class>/ or train/<class>/, with a name"
            f" that ends in {', '.join(SUFFIXES)}"
        )
    names = _class_names(listing, set(files))
    names = [names[k] for k in subset.keep(len(names), str(path))]
    files = subset.files(files, subset.train_per_class)
    examples = read_files(listing, files, names, skip_bad, skipped)
    present = examples.labels.unique().tolist()
    for label in sorted(set(range(len(names))) - set(present)):
        sentence = f"{path}: class {names[label]!r} has no image"
        if not skip_bad:
            raise DataError(f"{sentence}; add one or remove the folder")
        skipped.append(sentence)
    if not present:
        raise DataError(f"{path} has no image that can be read: {skipped[0]}")
    numbers = torch.searchsorted(torch.tensor(present), examples.labels)
    kept = tuple(names[label] for label in present)
    return Examples(examples.images, numbers), kept


def _class_names(listing: Listing, folders: set[str]) -> list[str]:
    """Order the class names by classes.txt, or sorted."""
    if listing.classes_text is None:
        return sorted(folders)
    where = f"{CLASSES_FILE} of {listing.path}"
    try:
        text = listing.classes_text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text; write one class name per line") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    check_names(names, where)
    unlisted = sorted(folders - set(names))
    if unlisted:
        raise DataError(f"{where} does not list the class {unlisted[0]!r}; add a line for it")
    return names
