"""Data sets that ``fastcil ingest`` wrote: packed pixels in a file that is memory-mapped.

A folder of

- ``pixels.bin``: the pixels of all images, one after the other, uint8 RGB;
- ``index.safetensors``: each image's first byte, size and label, the training images first, the
  objects' true boxes where they are known, and the chunks of the pixels with their checksums;
- ``files.json``: what the training images were called on disk, where that is known;
- ``manifest.json``: name, classes, counts, checksums. It is written last.

Nothing of the pixels is read when such a data set is loaded: the system reads what a batch asks
for, and keeps it for as long as it has memory to spare.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from fastcil.data.store import Dataset, Examples, ImageStore
from fastcil.data.subset import WHOLE, Subset
from fastcil.errors import DataError
from fastcil.files.atomic import write_atomically

FORMAT = 1
MANIFEST, PIXELS, INDEX, FILES = "manifest.json", "pixels.bin", "index.safetensors", "files.json"
_KIND = "fastcil images"
_PIECE = 1 << 24  # bytes read at a time to check them


def is_mapped(path: Path) -> bool:
    """Tell a finished data set of ``fastcil ingest``.

    Args:
        path: a file or folder.

    Returns:
        Whether it is one; what is still being written is none.

    Example:
        >>> is_mapped(Path("photos"))
        False
    """
    file = path / MANIFEST
    try:
        return file.is_file() and f'"{_KIND}"'.encode() in file.read_bytes()[:64]
    except OSError:
        return False


def load_mapped(path: Path, *, skip_bad: bool = False, subset: Subset = WHOLE) -> Dataset:
    """Load a data set whose pixels stay in their file.

    Args:
        path: its folder.
        skip_bad: left aside; what was bad was left out when it was written.
        subset: what to take; a view, of which no pixel is copied.

    Returns:
        The data set. Its pixels are a read-only map of the file: writing to them ends the process.

    Raises:
        DataError: If a file is missing, damaged or of another length, or the subset is none.

    Example:
        >>> try:
        ...     load_mapped(Path("photos"))
        ... except DataError as error:
        ...     print(error)
        photos/manifest.json cannot be read: No such file or directory
    """
    manifest = read_manifest(path)
    index = _read_index(path, manifest)
    pixels = _map(path / PIXELS, manifest["nbytes"])
    count = manifest["train"]
    sizes = index["sizes"].long()
    whole = ImageStore.from_pixels(pixels, sizes)
    train, test = (
        Examples(
            ImageStore(
                pixels, index["offsets"][rows], whole.geometry[rows], True, manifest["checksum"]
            ),
            index["labels"][rows],
        )
        for rows in (slice(0, count), slice(count, None))
    )
    files = json.loads(_read(path, FILES, manifest)) if manifest["files"] else None
    return subset.of(
        Dataset(
            manifest["name"],
            train,
            test,
            tuple(manifest["classes"]),
            index.get("train_boxes"),
            index.get("test_boxes"),
            tuple(manifest["skipped"]),
            None if files is None else tuple(files),
        )
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """Read what a data set says of itself.

    Args:
        path: its folder.

    Raises:
        DataError: If it is none, or of another format.

    Example:
        >>> try:
        ...     read_manifest(Path("photos"))
        ... except DataError as error:
        ...     print(error)
        photos/manifest.json cannot be read: No such file or directory
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is damaged; ingest the images again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
        raise DataError(f"{file} is no manifest of fastcil ingest; give the folder that it wrote")
    if manifest["format"] != FORMAT:
        raise DataError(
            f"{path} is of format {manifest['format']} and this version reads {FORMAT}; ingest the"
            f" images again"
        )
    return manifest


def write_rest(
    folder: Path, data: Dataset, nbytes: int, chunks: Tensor, about: dict[str, Any]
) -> None:
    """Write what makes a folder with ``pixels.bin`` a data set, the manifest last.

    Args:
        folder: where the pixels are.
        data: what they are; offsets are places in the file.
        nbytes: length of the file.
        chunks: each chunk's end in bytes, number of images up to there, and crc32, int64 [C, 3].
        about: more that the manifest is to say.

    Example:
        >>> import tempfile
        >>> store = ImageStore.from_batch(torch.zeros(3, 4, 4, 3, dtype=torch.uint8))
        >>> both = Examples(store, torch.tensor([0, 1, 1]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "pixels.bin").write_bytes(bytes(144))
        ...     write_rest(Path(folder), Dataset("d", both, both, ("a", "b")), 144,
        ...                torch.tensor([[144, 3, zlib.crc32(bytes(144))]]), {})
        ...     load_mapped(Path(folder)).class_names, check_pixels(Path(folder))
        (('a', 'b'), 144)
    """
    parts = data.train, data.test
    tensors = {
        "offsets": torch.cat([part.images.offsets for part in parts]),
        "sizes": torch.cat([part.images.sizes for part in parts]).to(torch.int16),
        "labels": torch.cat([part.labels for part in parts]),
        "chunks": chunks,
    }
    for name, boxes in (("train_boxes", data.train_boxes), ("test_boxes", data.test_boxes)):
        if boxes is not None:
            tensors[name] = boxes
    contents = {INDEX: bytes_of({name: value.contiguous() for name, value in tensors.items()})}
    if data.train_files is not None:
        contents[FILES] = json.dumps(data.train_files).encode()
    for name, content in contents.items():
        write_atomically(folder / name, content)
    names = json.dumps(data.class_names).encode()
    checksum = hashlib.blake2b(contents[INDEX] + names, digest_size=16).hexdigest()
    manifest = {
        "kind": _KIND,
        "format": FORMAT,
        "name": data.name,
        "train": len(data.train),
        "test": len(data.test),
        "nbytes": nbytes,
        "checksum": checksum,
        "crc32": {name: zlib.crc32(content) for name, content in contents.items()},
        "files": data.train_files is not None,
        "classes": data.class_names,
        "skipped": data.skipped,
        **about,
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def check_pixels(path: Path) -> int:
    """Read all pixels and compare every chunk's checksum.

    Args:
        path: folder of the data set.

    Returns:
        Bytes that were checked.

    Raises:
        DataError: If a file is damaged; of the pixels the first damaged chunk is named.

    Example:
        >>> try:
        ...     check_pixels(Path("photos"))
        ... except DataError as error:
        ...     print(error)
        photos/manifest.json cannot be read: No such file or directory
    """
    manifest = read_manifest(path)
    index = _read_index(path, manifest)
    if manifest["files"]:
        _read(path, FILES, manifest)
    _check_length(path / PIXELS, manifest["nbytes"])
    begin = images = 0
    chunks: list[list[int]] = index["chunks"].tolist()
    with open(path / PIXELS, "rb") as file:
        for number, (end, so_far, crc32) in enumerate(chunks):
            value = 0
            for length in _pieces(end - begin):
                value = zlib.crc32(file.read(length), value)
            if value != crc32:
                raise DataError(
                    f"{path / PIXELS} is damaged in chunk {number} of {len(chunks)}, bytes {begin}"
                    f" to {end}, which hold images {images} to {so_far - 1}; ingest them again"
                )
            begin, images = end, so_far
    return begin


def _pieces(length: int) -> Iterator[int]:
    """A length in pieces that fit into memory."""
    for begin in range(0, length, _PIECE):
        yield min(_PIECE, length - begin)


def _read(path: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """A small file that the manifest has the checksum of."""
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise DataError(f"{path / name} cannot be read: {error.strerror}") from error
    if zlib.crc32(content) != manifest["crc32"][name]:
        raise DataError(f"{path / name} is damaged; ingest the images again")
    return content


def _read_index(path: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    index: dict[str, Tensor] = tensors_of(_read(path, INDEX, manifest))
    return index


def _check_length(file: Path, nbytes: int) -> None:
    """Refuse a file of another length, most often a copy that was cut short."""
    try:
        found = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if found != nbytes:
        raise DataError(f"{file} has {found} bytes and should have {nbytes}; copy it again")


def _map(file: Path, nbytes: int) -> Tensor:
    """A file's bytes, uint8 [P], none of which is read yet."""
    _check_length(file, nbytes)
    # Mapped for reading only: a writable private map would count as memory that may be needed.
    with open(file, "rb") as opened:
        buffer = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no tensors that are read-only, and says so
        return torch.frombuffer(buffer, dtype=torch.uint8)


def scale_boxes(boxes: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The smallest boxes of whole pixels that hold what boxes held before images were shrunk.

    Args:
        boxes: int16 [N, 4], (y0, x0, y1, x1).
        old: heights and widths of the images then, int64 [N, 2].
        new: heights and widths now, int64 [N, 2].

    Example:
        >>> size = torch.tensor([[8, 8]])
        >>> scale_boxes(torch.tensor([[1, 2, 5, 8]]), size, size // 2)
        tensor([[0, 1, 3, 4]], dtype=torch.int16)
    """
    begin, end = boxes.long().split(2, 1)
    return torch.cat([begin * new // old, -(-end * new // old)], 1).to(torch.int16)
