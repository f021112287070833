"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their original binary archives.

A record is the label bytes (CIFAR-100: coarse, then fine; the fine one counts) and 3072 bytes of
pixels, the red, green and blue planes of 32 x 32.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastcil.data.assemble import assemble, make_examples
from fastcil.data.places import cache_folder, data_folder, describe_data_folder
from fastcil.data.store import Dataset, Examples, ImageStore
from fastcil.errors import DataError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class Archive:
    """What is published of one data set.

    Attributes:
        url: of the archive.
        md5: its checksum, hexadecimal.
        folder: the folder it unpacks to.
        train: files of training images.
        test: file of test images.
        names: file of class names, a line each.
        label_bytes: bytes before the pixels of a record; the last is the label.
        records: images in each file.
    """

    url: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int
    records: dict[str, int]

    @property
    def file(self) -> str:
        """Name of the archive."""
        return self.url.rsplit("/", 1)[1]


ARCHIVES = {
    "cifar10": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test="test_batch.bin",
        names="batches.meta.txt",
        label_bytes=1,
        records={"test_batch.bin": 10000, **{f"data_batch_{i}.bin": 10000 for i in range(1, 6)}},
    ),
    "cifar100": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        train=("train.bin",),
        test="test.bin",
        names="fine_label_names.txt",
        label_bytes=2,
        records={"train.bin": 50000, "test.bin": 10000},
    ),
}


def load_cifar(name: str, *, download: bool = False, path: Path | None = None) -> Dataset:
    """Read CIFAR-10 or CIFAR-100.

    The archive, or the folder it unpacks to, is looked for in FASTCIL_DATA and then in
    ~/.cache/fastcil. An archive is read only if its MD5 is the published one; of a folder the
    number of records is checked.

    Args:
        name: "cifar10" or "cifar100".
        download: fetch the archive to ~/.cache/fastcil if it is in neither place.
        path: read this archive or folder (or one inside this folder) instead of searching.

    Returns:
        The data set in the order of its files, 32 x 32 pixels.

    Raises:
        DataError: If it is not found, cannot be fetched, or is not what was published.

    Example:
        >>> ARCHIVES["cifar100"].file
        'cifar-100-binary.tar.gz'
    """
    archive = ARCHIVES[name]
    places = [path] if path is not None else [p for p in (data_folder(), cache_folder()) if p]
    source = next((s for s in (_inside(p, archive) for p in places) if s is not None), None)
    if source is None and download:
        source = _download(archive, cache_folder())
    if source is None:
        raise DataError(
            f"{archive.file} is in none of {', '.join(map(str, places))}"
            f" ({describe_data_folder()}); put it there or load with download=True, which fetches"
            f" {archive.url}"
        )
    contents = _read_folder(source, archive) if source.is_dir() else _read_archive(source, archive)
    try:
        lines = contents[archive.names].decode("ascii").split()
    except UnicodeDecodeError as error:
        where = f"{source}/{archive.names}"
        raise DataError(f"{where} is not text; unpack {archive.file} again") from error
    train = [_examples(contents[f], f"{source}/{f}", archive, len(lines)) for f in archive.train]
    test = _examples(contents[archive.test], f"{source}/{archive.test}", archive, len(lines))
    parts = ("the training files", "the test file")
    return assemble(name, str(source), Examples.cat(train), test, lines, parts, False, ())


def find_cifar(path: Path) -> str | None:
    """Tell whether a path is, or a folder holds, a CIFAR archive.

    Args:
        path: a file or folder.

    Returns:
        "cifar10", "cifar100" or None.

    Raises:
        DataError: If the folder holds both.

    Example:
        >>> find_cifar(Path("photos")) is None
        True
    """
    found = [name for name, archive in ARCHIVES.items() if _inside(path, archive) is not None]
    if len(found) > 1:
        raise DataError(f"{path} holds both {found[0]} and {found[1]}; give the path of one")
    return found[0] if found else None


def _inside(path: Path, archive: Archive) -> Path | None:
    """Find the archive or its unpacked folder at a path or in the folder there."""
    if path.is_file():
        return path if path.name == archive.file else None
    if (path / archive.file).is_file():
        return path / archive.file
    for folder in (path, path / archive.folder):
        if (folder / archive.test).is_file() and (folder / archive.names).is_file():
            return folder
    return None


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _read_archive(path: Path, archive: Archive) -> dict[str, bytes]:
    """Read the wanted files of the archive, without unpacking it onto the disk."""
    found = _md5(path)
    if found != archive.md5:
        raise DataError(
            f"{path} has MD5 {found}, but {archive.md5} was published: it is cut short or changed;"
            " delete it and fetch it again (download=True)"
        )
    contents = {}
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                if folder == archive.folder and member.isreg():
                    file = tar.extractfile(member)
                    assert file is not None  # it is a regular file
                    contents[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end ({error}); fetch it again") from error
    return _complete(contents.get, path, archive)


def _read_folder(path: Path, archive: Archive) -> dict[str, bytes]:
    def read(name: str) -> bytes | None:
        file = path / name
        return file.read_bytes() if file.is_file() else None

    return _complete(read, path, archive)


def _complete(
    read: Callable[[str], bytes | None], path: Path, archive: Archive
) -> dict[str, bytes]:
    """Take every file of the data set, each of its full length."""
    contents = {}
    for name in (*archive.train, archive.test, archive.names):
        data = read(name)
        if data is None:
            raise DataError(f"{path} lacks {name}; unpack {archive.file} again")
        size = archive.records.get(name, 0) * (archive.label_bytes + _PIXELS)
        if size and len(data) != size:
            raise DataError(
                f"{path}/{name} has {len(data)} bytes instead of {size}; unpack {archive.file}"
                " again"
            )
        contents[name] = data
    return contents


def _examples(data: bytes, where: str, archive: Archive, classes: int) -> Examples:
    records = np.frombuffer(data, np.uint8).reshape(-1, archive.label_bytes + _PIXELS)
    planes = records[:, archive.label_bytes :].reshape(-1, 3, _SIDE, _SIDE)
    images = ImageStore.from_batch(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)))
    labels = torch.from_numpy(records[:, archive.label_bytes - 1].astype(np.int64))
    return make_examples(images, labels, classes, f"labels of {where}", False, [])


def _download(archive: Archive, folder: Path) -> Path:
    """Fetch the archive; only a complete and right one appears under its name."""
    part = folder / f"{archive.file}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(archive.url, timeout=60) as response, part.open("wb") as file:
            shutil.copyfileobj(response, file, 1 << 20)
        found = _md5(part)
        if found != archive.md5:
            raise DataError(
                f"{archive.url} gave a file with MD5 {found}, but {archive.md5} was published;"
                " nothing was kept, try again"
            )
        return part.replace(folder / archive.file)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{archive.url} cannot be fetched ({error}); fetch it by other means and put it into"
            f" {folder}"
        ) from error
    finally:
        part.unlink(missing_ok=True)
