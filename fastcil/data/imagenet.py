"""ImageNet (Russakovsky et al. 2015) as people have it on disk, and the two subsets of 100 classes.

Training images lie in `train/<class>/`, validation images in `val/<class>/`, or all together in
`val/` with what says their classes beside it: Kaggle's `LOC_val_solution.csv`, or the development
kit's `data/ILSVRC2012_validation_ground_truth.txt` and `data/meta.mat`. Kaggle's archive has both
folders in `ILSVRC/Data/CLS-LOC`. Its two lists, where they lie beside the images, tell the objects'
true boxes (`fastcil.data.imagenet_boxes`).
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from scipy import io
from torch import Tensor

from fastcil.data.assemble import assemble
from fastcil.data.image_files import Reader, read_files
from fastcil.data.imagenet_boxes import FILES, true_boxes
from fastcil.data.listing import Listing, Parts, is_image
from fastcil.data.places import find_folder, look_for_folder, resolve
from fastcil.data.store import Dataset, Examples
from fastcil.data.subset import WHOLE, Subset
from fastcil.errors import DataError

NAMES = ("imagenet", "imagenet100")
_WHOLE_FOLDERS = (
    *("imagenet", "ImageNet", "ILSVRC2012", "ilsvrc2012", "imagenet-1k", "imagenet1k"),
    *("imagenet1000", "ILSVRC"),
)
_OWN_FOLDERS = (
    *("imagenet100", "imagenet-100", "imagenet_100", "ImageNet100", "ImageNet-100"),
    "seed_1993_subset_100_imagenet/data",
)
_INSIDE = ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
_KAGGLE = FILES["val"]
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_KITS = ("", "data", "devkit", "devkit/data", "ILSVRC2012_devkit_t12/data")
_WNID = re.compile(r"n\d{8}")
# The same classes under the names of those who use them.
_SAME = {"foster": "lucir", "pycil": "lucir", "der": "podnet", "dytox": "podnet"}


def class_ids() -> tuple[str, ...]:
    """The WordNet ids of the 1,000 classes of ILSVRC2012, sorted.

    Example:
        >>> ids = class_ids()
        >>> len(ids), ids[0], ids[-1]
        (1000, 'n01440764', 'n15075141')
    """
    text = (resources.files("fastcil.data") / "imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.split())


def subset_ids(name: str) -> tuple[str, ...]:
    """The classes of an "ImageNet-100", sorted; papers mean two different ones by that.

    - ``lucir``: 100 of the sorted ids drawn by numpy's legacy generator with seed 1993, without
      replacement (Hou et al. 2019). FOSTER's and PyCIL's list holds the same classes.
    - ``podnet``: the first 100 of the sorted ids (Douillard et al. 2020). DER and DyTox use it.

    Luo et al. (2023) say that they follow the first; the 129,395 training images of their
    Table S1 are those of the second (the first has 128,856).

    Args:
        name: ``lucir`` (or ``foster``, ``pycil``) or ``podnet`` (or ``der``, ``dytox``).

    Raises:
        DataError: Another name.

    Example:
        >>> subset_ids("lucir")[0], subset_ids("podnet")[-1]
        ('n01514668', 'n01855672')
        >>> subset_ids("foster") == subset_ids("lucir")
        True
    """
    ids = class_ids()
    name = _SAME.get(name, name)
    if name == "lucir":
        return tuple(sorted(np.random.RandomState(1993).choice(ids, 100, replace=False).tolist()))
    if name == "podnet":
        return ids[:100]
    raise DataError(
        f"list is '{name}', which is neither a file nor known; give a file of class names, a line"
        f" each, or lucir, podnet, {', '.join(_SAME)}"
    )


def read_class_list(name: str) -> tuple[str, ...]:
    """The classes that a list names.

    Args:
        name: as `subset_ids` takes, or a text file: a class name a line, or a line for each image
            with a WordNet id in it, such as ``train/n01440764/n01440764_18.JPEG 0``.

    Returns:
        Each class once, sorted.

    Raises:
        DataError: No such list, or an empty one.

    Example:
        >>> len(read_class_list("podnet"))
        100
    """
    if not ("/" in name or os.sep in name or Path(name).suffix or Path(name).is_file()):
        return subset_ids(name)
    path = resolve(name)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list of classes, a name a line") from error
    found = {match[0] if (match := _WNID.search(line)) else line for line in lines if line}
    if not found:
        raise DataError(f"{path} names no class; write one name per line")
    return tuple(sorted(found))


def find_imagenet(name: str) -> Path:
    """Find ImageNet, or a folder of 100 of its classes, here or in FASTCIL_DATA.

    Args:
        name: ``imagenet`` or ``imagenet100``; the latter may be a folder of its own, and else is
            taken out of ImageNet.

    Returns:
        The folder.

    Raises:
        DataError: If there is none.

    Example:
        >>> try:
        ...     found = find_imagenet("imagenet").is_dir()
        ... except DataError as error:
        ...     found = "ILSVRC2012" in str(error)
        >>> found
        True
    """
    own = look_for_folder(_OWN_FOLDERS) if name == "imagenet100" else None
    folders = (*_OWN_FOLDERS, *_WHOLE_FOLDERS) if name == "imagenet100" else _WHOLE_FOLDERS
    return own or find_folder(name, folders, "the folder that holds train and val")


def is_imagenet(path: Path) -> bool:
    """Tell a layout that plain class folders are not: Kaggle's, or validation images in one folder.

    Args:
        path: a file or folder.

    Returns:
        Whether it is one.

    Example:
        >>> is_imagenet(Path("photos"))
        False
    """
    root = _root(path)
    if root is None:
        return False
    return root != path or _validation_labels(path, root) is not None


def load_imagenet(
    path: Path,
    *,
    skip_bad: bool = False,
    subset: Subset = WHOLE,
    name: str | None = None,
    class_list: str | None = None,
    reader: Reader = read_files,
) -> Dataset:
    """Read ImageNet, or the classes of a list.

    Args:
        path: the folder that holds ``train`` and ``val``, or Kaggle's.
        skip_bad: leave out images that do not decode and classes that lack a part.
        subset: what to take, its class numbers being places among the classes of the list.
        name: what the data set is called; None for the folder's name.
        class_list: which classes, as `read_class_list` takes; None for all folders in ``train``,
            and ``lucir`` where ``name`` is ``imagenet100``.
        reader: reads the images of a part.

    Returns:
        The data set, its classes sorted, their images by path; with the objects' boxes where
        Kaggle's lists of them are there.

    Raises:
        DataError: If a folder, or the labels of validation images, is missing, or an image does
            not decode.

    Example:
        >>> import cv2, tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for folder in ("train/n1", "train/n2", "train/n3", "val/n1", "val/n2", "val/n3"):
        ...         os.makedirs(f"{root}/{folder}")
        ...         _ = cv2.imwrite(f"{root}/{folder}/a.png", np.zeros((8, 6, 3), np.uint8))
        ...     _ = Path(root, "two.txt").write_text("n3" + chr(10) + "n1")
        ...     load_imagenet(Path(root), class_list=f"{root}/two.txt").class_names
        ('n1', 'n3')
    """
    root = _root(path)
    if root is None:
        looked = ", ".join(f"{inside}/train".lstrip("/") for inside in _INSIDE)
        raise DataError(
            f"{path} has no training images; looked for the folders {looked}, with a folder of"
            f" images for each class"
        )
    class_list = class_list or ("lucir" if name == "imagenet100" else None)
    names = list(read_class_list(class_list)) if class_list else _folders(root / "train")
    names = [names[k] for k in subset.keep(len(names), str(path), least=2)]
    _check_folders(root / "train", names, class_list)
    train = _by_folder(root, "train", names)
    labels = _validation_labels(path, root)
    if labels is None:
        _check_folders(root / "val", names, class_list)
        test = _by_folder(root, "val", names)
    else:
        test = _by_label(root, labels(), names)
    listing = Listing(root)
    for files in (*train.values(), *test.values()):
        listing.files.update((f, root.joinpath(*f)) for f in files)
    skipped: list[str] = []
    read: list[str] = []
    test_files: list[str] = []
    train_read, test_read = (
        reader(listing, subset.files(files, per_class), names, skip_bad, skipped, found)
        for files, per_class, found in (
            (train, subset.train_per_class, read),
            (test, subset.test_per_class, test_files),
        )
    )
    title = subset.name((name or path.name) + (f" ({class_list})" if class_list else ""))
    parts = ("train", "val")
    data = assemble(title, str(path), train_read, test_read, names, parts, skip_bad, skipped, read)
    kept = set(data.class_names)
    lists = {part: _find(path, root, file) for part, file in FILES.items()}
    return replace(
        data,
        train_boxes=_boxes(lists["train"], train_read, read, names, kept),
        test_boxes=_boxes(lists["val"], test_read, test_files, names, kept),
    )


def _boxes(
    file: Path | None, part: Examples, files: Sequence[str], names: Sequence[str], kept: set[str]
) -> Tensor | None:
    """The true boxes of a part's images, of classes that were kept; None where nothing tells."""
    if file is None:
        return None
    classes = [names[label] for label in part.labels.tolist()]
    boxes = true_boxes(file, part, [Path(name).stem for name in files], classes)
    return None if boxes is None else boxes[torch.tensor([name in kept for name in classes])]


def _near(path: Path, root: Path) -> Iterator[Path]:
    """Folders where what belongs to the images may lie."""
    yield from dict.fromkeys((path, root, *root.parents[:3]))


def _find(path: Path, root: Path, name: str) -> Path | None:
    """A file that lies beside the images; None where there is none."""
    return next((place / name for place in _near(path, root) if (place / name).is_file()), None)


def _root(path: Path) -> Path | None:
    """What holds ``train``: the folder itself, or the one in it that Kaggle's archive has."""
    roots = [path / inside for inside in _INSIDE]
    return next((root for root in roots if (root / "train").is_dir()), None)


def _folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(folder: Path) -> list[str]:
    """Names of the images in a folder, sorted."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if is_image((e.name,)))


def _check_folders(folder: Path, names: Sequence[str], class_list: str | None) -> None:
    """Refuses a tree that lacks a class, with what there is instead."""
    have = _folders(folder)
    missing = sorted(set(names) - set(have))
    if not names or not missing:
        return
    if not have and folder.name == "val":
        loose = f" {len(_images(folder)):,} images and" if _images(folder) else ""
        raise DataError(
            f"{folder} has{loose} no class folders; sort the images into val/<class>/, or put"
            f" {_KAGGLE} or the development kit's {_TRUTH} and {_META} beside it"
        )
    of = f" of the list '{class_list}'" if class_list else ""
    other = [
        known
        for known in ("lucir", "podnet")
        if class_list and set(have) >= set(subset_ids(known)) and known != class_list
    ]
    hint = f"; it holds those of '{other[0]}': write list={other[0]}" if other else ""
    raise DataError(
        f"{folder} lacks {len(missing)} of the {len(names)} classes{of}, the first:"
        f" {missing[0]}{hint}"
    )


def _by_folder(root: Path, part: str, names: Sequence[str]) -> dict[str, list[Parts]]:
    """Class name to the images in its folder."""
    return {name: [(part, name, file) for file in _images(root / part / name)] for name in names}


def _by_label(
    root: Path, labels: Mapping[str, str], names: Sequence[str]
) -> dict[str, list[Parts]]:
    """Class name to its images among those that lie together in ``val``."""
    files: dict[str, list[Parts]] = {name: [] for name in names}
    for file in _images(root / "val"):
        name = labels.get(Path(file).stem)
        if name is None:
            raise DataError(f"{root / 'val' / file} has no label; the list of labels is another's")
        if name in files:
            files[name].append(("val", file))
    return files


def _validation_labels(path: Path, root: Path) -> Callable[[], dict[str, str]] | None:
    """Reads the class of each validation image by its stem; None where folders say it."""
    if _folders(root / "val") or not _images(root / "val"):
        return None
    for place in _near(path, root):
        if (place / _KAGGLE).is_file():
            return lambda: _kaggle_labels(place / _KAGGLE)
        for kit in _KITS:
            if (place / kit / _TRUTH).is_file() and (place / kit / _META).is_file():
                return lambda: _kit_labels(place / kit, _images(root / "val"))
    return None


def _kaggle_labels(file: Path) -> dict[str, str]:
    """From lines ``ILSVRC2012_val_00000001,n01751748 111 108 ...``."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = [row for row in csv.reader(lines) if len(row) == 2 and _WNID.match(row[1])]
    if not rows:
        raise DataError(f"{file} names no class; its lines are <image>,<class> and boxes")
    return {image: prediction.split()[0] for image, prediction in rows}


def _kit_labels(kit: Path, images: Sequence[str]) -> dict[str, str]:
    """From the development kit: a number for each image in order, and what the numbers mean."""
    try:
        synsets = io.loadmat(str(kit / _META), squeeze_me=True)["synsets"]
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
        truth = [ids[int(line)] for line in (kit / _TRUTH).read_text().split()]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{kit} holds no development kit of ILSVRC2012: {error}") from error
    if len(truth) != len(images):
        raise DataError(
            f"{kit / _TRUTH} has {len(truth):,} labels for {len(images):,} validation images"
        )
    return {Path(image).stem: name for image, name in zip(images, truth, strict=True)}
