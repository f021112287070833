"""The images of a part of a data set, read from their files."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Protocol

import numpy as np
import torch

from fastcil.cores import usable_cores
from fastcil.data.listing import Listing, Parts, Source, read_source
from fastcil.data.store import Examples, ImageStore
from fastcil.errors import DataError
from fastcil.files.decode import decode_image


class Reader(Protocol):
    """What reads the images of a part, or only looks how large they are; see `read_files`."""

    def __call__(
        self,
        listing: Listing,
        files: Mapping[str, Sequence[Parts]],
        names: Sequence[str],
        skip_bad: bool,
        skipped: list[str],
        read: list[str] | None = None,
    ) -> Examples:
        """The examples, by label and then as listed."""
        ...


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
        >>> from pathlib import Path
        >>> len(read_files(Listing(Path("photos")), {}, ["cat"], False, []))
        0
    """
    wanted = labelled(files, names)
    labels: list[int] = []

    def images() -> Iterator[np.ndarray]:
        # Left to the garbage collector, a thread of the pool might have to join itself.
        with closing(_decode_all(listing, [file for _, file in wanted])) as results:
            for (label, file), image in zip(wanted, results, strict=True):
                if isinstance(image, np.ndarray):
                    labels.append(label)
                    if read is not None:
                        read.append(file_name(file, names[label]))
                    yield image
                elif skip_bad:
                    skipped.append(str(image))
                else:
                    raise image

    store = ImageStore.from_images(images())
    return Examples(store, torch.tensor(labels, dtype=torch.int64))


def labelled(files: Mapping[str, Sequence[Parts]], names: Sequence[str]) -> list[tuple[int, Parts]]:
    """The files of a part with their labels, by label and then as listed.

    Args:
        files: class name to its files.
        names: the classes, by label.

    Example:
        >>> labelled({"dog": [("a.jpg",)], "cat": [("b.jpg",)]}, ["cat", "dog"])
        [(0, ('b.jpg',)), (1, ('a.jpg',))]
    """
    return [(label, f) for label, name in enumerate(names) for f in files.get(name, ())]


def file_name(file: Parts, class_name: str) -> str:
    """The path of an image from its class's folder on, or its own name.

    Args:
        file: components of its path.
        class_name: its class.

    Example:
        >>> file_name(("train", "cat", "a.jpg"), "cat"), file_name(("val", "a.jpg"), "cat")
        ('cat/a.jpg', 'a.jpg')
    """
    return "/".join(file[file.index(class_name) :] if class_name in file[:-1] else file[-1:])


def _decode_all(
    listing: Listing, files: Sequence[Parts]
) -> Generator[np.ndarray | DataError, None, None]:
    """Decode in parallel, giving the images or what is wrong with them in order."""
    threads = len(usable_cores())
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
        return decode_image(read_source(source), path)
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"{path} cannot be read: {error.strerror}")
