"""What lies in a folder or a tar, by class: paths, places in a tar, or the bytes of images."""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastcil.errors import DataError
from fastcil.files.decoder import read_stretch

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".jp2", ".avif"),
)
CLASSES_FILE = "classes.txt"
SPLITS = ("train", "test", "val")

Parts = tuple[str, ...]


class Stretch(NamedTuple):
    """Some bytes of a file: a member of a tar that is not compressed."""

    file: Path
    first: int
    length: int


Source = Path | Stretch | bytes


@dataclass
class Listing:
    """The images, folders and class list under a root.

    Attributes:
        path: the folder or tar.
        files: image files by the components of their path below the root.
        folders: components of the folders that exist, images in them or not.
        classes_text: content of the root's classes.txt.
    """

    path: Path
    files: dict[Parts, Source] = field(default_factory=dict)
    folders: set[Parts] = field(default_factory=set)
    classes_text: bytes | None = None

    def images(self, part: str) -> dict[str, list[Parts]]:
        """List the images of a part by class.

        Args:
            part: "train", "test", "val", or "" for the root itself.

        Returns:
            Class name to its files, sorted by path; folders without images are there too, unless
            no folder of the part has any.
        """
        at = 1 if part else 0
        classes: dict[str, list[Parts]] = {
            f[at]: [] for f in self.folders if len(f) == at + 1 and (not part or f[0] == part)
        }
        for file in sorted(self.files):
            if len(file) > at + 1 and (not part or file[0] == part):
                classes.setdefault(file[at], []).append(file)
        return classes if any(classes.values()) else {}


def list_source(path: Path) -> Listing:
    """List a folder or read a tar.

    Args:
        path: it exists.

    Returns:
        What is in it.

    Raises:
        DataError: If it is neither, or the archive is damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     list_source(Path(root)).files
        {}
    """
    return _list_folder(path) if path.is_dir() else _list_tar(path)


def _list_folder(root: Path) -> Listing:
    listing = Listing(root)
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        here = Path(folder)
        above = {here.resolve(), *here.resolve().parents}
        # A link to a folder above would be walked for ever.
        folders[:] = sorted(f for f in folders if (here / f).resolve() not in above)
        parts = here.relative_to(root).parts
        if any(_hidden(part) for part in parts):
            continue
        listing.folders.update((*parts, f) for f in folders if not _hidden(f))
        for file in files:
            if is_image((file,)):
                listing.files[(*parts, file)] = here / file
    text = root / CLASSES_FILE
    listing.classes_text = text.read_bytes() if text.is_file() else None
    return listing


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}") from error


class _Header(tarfile.TarInfo):
    """A tar header that does not let a damaged archive pass for a shorter one.

    tarfile takes a header that is cut off or wrong, after the first, for the end of the archive;
    the end is only where a block of zeros says so.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: Any, errors: str) -> _Header:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise tarfile.ReadError("the archive ends early or is damaged") from error


def read_source(source: Source) -> bytes:
    """The content of a listed file.

    Args:
        source: A value of `Listing.files`.

    Raises:
        OSError: It can't be read.

    Example:
        >>> read_source(b"whole")
        b'whole'
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, Stretch):
        return read_stretch(*source)
    return source.read_bytes()


def _open_tar(path: Path) -> tuple[tarfile.TarFile, bool]:
    """A tar, and whether its members lie in the file as they are; else it is a stream."""
    try:
        return tarfile.open(path, "r:", tarinfo=_Header), True
    except tarfile.TarError:  # It is compressed, or none: then this says so.
        return tarfile.open(path, "r|*", tarinfo=_Header, bufsize=1 << 20), False


def _list_tar(path: Path) -> Listing:
    files: dict[Parts, Source] = {}
    folders: set[Parts] = set()
    texts: dict[Parts, bytes] = {}
    try:
        archive, plain = _open_tar(path)
        with archive as tar:
            for member in tar:
                parts = tuple(p for p in member.name.split("/") if p not in ("", "."))
                if any(_hidden(part) for part in parts):
                    continue
                if member.isdir():
                    folders.add(parts)
                # A sparse member's size is whatever it claims, not what the archive holds.
                if not member.isreg() or member.issparse() or not parts:
                    continue
                folders.update(parts[:n] for n in range(1, len(parts)))
                if parts[-1] == CLASSES_FILE or is_image(parts):
                    if plain and parts[-1] != CLASSES_FILE:
                        files[parts] = Stretch(path, member.offset_data, member.size)
                        continue
                    content = tar.extractfile(member)
                    assert content is not None  # it is a regular file
                    target = texts if parts[-1] == CLASSES_FILE else files
                    target[parts] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{path} cannot be read as a tar archive to its end ({error}); copy it again"
        ) from error
    root = _shared_root(files)
    if root:
        files = {parts[root:]: source for parts, source in files.items()}
        folders = {parts[root:] for parts in folders if len(parts) > root}
        texts = {parts[root:]: text for parts, text in texts.items()}
    outside = next((parts for parts in files if ".." in parts), None)
    if outside is not None:
        raise DataError(
            f"{path} has a member '{'/'.join(outside)}', which lies outside of it; make the archive"
            f" anew, from within its folder"
        )
    return Listing(path, files, folders, texts.get((CLASSES_FILE,)))


def _shared_root(files: Iterable[Parts]) -> int:
    """Count the leading folders that all images share and that are above the class folders."""
    images = list(files)
    depth = 0
    while images and all(len(f) > depth + 2 and f[depth] == images[0][depth] for f in images):
        if images[0][depth] in SPLITS:
            break
        depth += 1
    return depth


def is_image(parts: Parts) -> bool:
    """Tell an image file by its name.

    Args:
        parts: components of its path.

    Returns:
        Whether it ends in one of the SUFFIXES and is not hidden.

    Example:
        >>> is_image(("cat", "a.JPG")), is_image((".a.jpg",))
        (True, False)
    """
    return parts[-1].lower().endswith(SUFFIXES) and not _hidden(parts[-1])


def _hidden(name: str) -> bool:
    """Pass over what file managers leave behind."""
    return name == "__MACOSX" or (name.startswith(".") and name != "..")
