"""Data sets of image files: `train/<class>/...` and `test/<class>/...` in a folder or a tar.

An image is whatever has one of the `SUFFIXES`; hidden files and files of other kinds are passed
over. All images become RGB uint8 of their own size, as OpenCV decodes them (IMREAD_COLOR): grey is
repeated, palettes are looked up, alpha is dropped, CMYK is converted, of 16 bits the upper 8
remain, and the EXIF orientation is applied, so that an image is held as a viewer shows it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import torch

from fastcil.data.assemble import assemble, check_names, check_side
from fastcil.data.listing import CLASSES_FILE, SUFFIXES, Listing, Parts, Source, list_source
from fastcil.data.store import Dataset, Examples, ImageStore
from fastcil.data.subset import WHOLE, Subset
from fastcil.errors import DataError


def load_folder(path: Path, *, skip_bad: bool = False, subset: Subset = WHOLE) -> Dataset:
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

    Returns:
        The data set, named after the file or folder.

    Raises:
        DataError: If the tree is another, an image does not decode or is too large, a class lacks
            training or test images, or the archive is damaged.

    Example:
        >>> import tempfile
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
    train = read_files(listing, train_files, names, skip_bad, skipped, read)
    test = read_files(listing, test_files, names, skip_bad, skipped)
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
        >>> import tempfile
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


def read_files(
    listing: Listing,
    files: Mapping[str, Sequence[Parts]],
    names: Sequence[str],
    skip_bad: bool,
    skipped: list[str],
    read: list[str] | None = None,
) -> Examples:
    """Decode the images of a part.

    Args:
        listing: what holds them.
        files: class name to its files, keys of `Listing.files`.
        names: the classes to read, by label.
        skip_bad: leave out images that do not decode.
        skipped: gains a line for each image left out.
        read: gains the path of each image read, from its class's folder on, for
            `Dataset.train_files`; of an image in no such folder its name.

    Returns:
        The examples, by label and then as listed.

    Raises:
        DataError: If an image does not decode and `skip_bad` is false.

    Example:
        >>> len(read_files(Listing(Path("photos")), {}, ["cat"], False, []))
        0
    """
    wanted = [(label, f) for label, name in enumerate(names) for f in files.get(name, ())]
    labels: list[int] = []

    def images() -> Iterator[np.ndarray]:
        # Left to the garbage collector, a thread of the pool might have to join itself.
        with closing(_decode_all(listing, [file for _, file in wanted])) as results:
            for (label, file), image in zip(wanted, results, strict=True):
                if isinstance(image, np.ndarray):
                    labels.append(label)
                    if read is not None:
                        read.append(_name(file, names[label]))
                    yield image
                elif skip_bad:
                    skipped.append(str(image))
                else:
                    raise image

    store = ImageStore.from_images(images())
    return Examples(store, torch.tensor(labels, dtype=torch.int64))


def _name(file: Parts, class_name: str) -> str:
    """The path from the class's folder on, or the file's own name."""
    return "/".join(file[file.index(class_name) :] if class_name in file[:-1] else file[-1:])


def _decode_all(
    listing: Listing, files: Sequence[Parts]
) -> Generator[np.ndarray | DataError, None, None]:
    """Decode in parallel, giving the images or what is wrong with them in order."""
    threads = os.cpu_count() or 1
    waiting: deque[Future[np.ndarray | DataError]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for file in files:
            path = f"{listing.path}/{'/'.join(file)}"
            waiting.append(pool.submit(_try_decode, path, listing.files[file]))
            if len(waiting) > 8 * threads:  # bounds the decoded images nobody has taken yet
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _try_decode(path: str, source: Source) -> np.ndarray | DataError:
    try:
        return decode_image(source if isinstance(source, bytes) else source.read_bytes(), path)
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"{path} cannot be read: {error.strerror}")


def decode_image(data: bytes, path: str) -> np.ndarray:
    """Decode an image file.

    Args:
        data: its content.
        path: for errors.

    Returns:
        uint8 [H, W, 3], RGB, as the module's text says.

    Raises:
        DataError: If it does not decode or has a side of more than 32767 pixels.

    Example:
        >>> _, data = cv2.imencode(".png", np.full((4, 6), 7, np.uint8))
        >>> decode_image(data.tobytes(), "a.png")[0, 0].tolist()
        [7, 7, 7]
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # an empty file, or more pixels than OpenCV allows
        image = None
    if image is None:
        raise DataError(
            f"{path} does not decode as an image ({len(data)} bytes); replace it, or pass"
            " skip_bad=True to leave such files out"
        )
    check_side(image.shape[0], image.shape[1], path)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
