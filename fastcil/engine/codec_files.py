"""Images on disk to files of the learned codec and back, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np

from fastcil.compression.bitstream import MAX_PIXELS, Bitstream, inspect
from fastcil.compression.codec import ImageCodec
from fastcil.compression.errors import BitstreamError
from fastcil.compression.evaluation import Photos
from fastcil.compression.training import is_trained_for, lambda_range
from fastcil.data import ImageStore, resolve
from fastcil.data.listing import SUFFIXES, Source, list_source, read_source
from fastcil.engine.state import write_atomically
from fastcil.errors import DataError, FastcilError
from fastcil.files.decode import decode_image

SUFFIX = ".fcl"
"""How names of the learned codec's files end."""


def find_photos(sources: Sequence[str | Path]) -> dict[str, Source]:
    """Images by name, which is their path below the folder or tar, without its ending.

    Args:
        sources: Image files, folders or tars; found by path or in FASTCIL_DATA.

    Returns:
        In the order of the sources, and of the paths in each.

    Raises:
        DataError: A source that is not there or holds no image, or two images of one name.
    """
    found: dict[str, Source] = {}
    for source in sources:
        path = resolve(source)
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            images: dict[tuple[str, ...], Source] = {(path.name,): path}
        else:
            images = list_source(path).files
        if not images:
            raise DataError(f"{path} holds no image; their names end in {', '.join(SUFFIXES)}")
        for parts in sorted(images):
            name = str(PurePosixPath(*parts).with_suffix(""))
            if name in found:
                raise DataError(f"two images are called '{name}'; pass them one at a time")
            found[name] = images[parts]
    return found


def read_photo(name: str, source: Source) -> np.ndarray:
    """An image of `find_photos`, uint8 [H, W, 3].

    Raises:
        DataError: It can't be read or does not decode.
    """
    if isinstance(source, Path):
        return decode_image(_bytes_of(source), str(source))
    return decode_image(read_source(source), name)


def load_photos(sources: Sequence[str | Path]) -> Photos:
    """All images of `find_photos`, in memory.

    Args:
        sources: Image files, folders or tars.

    Raises:
        DataError: As `find_photos` and `read_photo`.
    """
    found = find_photos(sources)
    images = (read_photo(name, source) for name, source in found.items())
    return Photos(tuple(found), ImageStore.from_images(images))


def encode_files(
    codec: ImageCodec, sources: Sequence[str | Path], lmbda: float, out: str | Path
) -> Iterator[tuple[Path, float]]:
    """Codes images, each into a file ``out/NAME.fcl`` that is verified before it is written.

    Args:
        codec: The codec.
        sources: As `find_photos`.
        lmbda: Trade-off of all.
        out: Folder for the files; made if it is not there, files of the same names replaced.

    Yields:
        Each file and its bits per pixel, once it is complete.

    Raises:
        DataError: As `find_photos` and `read_photo`.
        FastcilError: As `ImageCodec.encode`; a λ that the codec was not trained for; a file that
            can't be written.
    """
    if not is_trained_for(codec.model, lmbda):
        low, high = lambda_range(codec.model)
        raise FastcilError(
            f"lambda is {lmbda:g}; the codec was trained from {low:g} to {high:g}, and would code "
            f"others as the nearest of these."
        )
    for name, source in find_photos(sources).items():
        image = read_photo(name, source)
        try:
            data = codec.encode(image, lmbda)
            codec.verify(data)
        except FastcilError as error:
            raise type(error)(f"'{name}': {error}") from error
        path = Path(out) / f"{name}{SUFFIX}"
        write_atomically(path, data)
        yield path, 8 * len(data) / (image.shape[0] * image.shape[1])


def inspect_file(path: str | Path, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """What a file says of itself; see `fastcil.compression.bitstream.inspect`.

    Args:
        path: The file.
        max_pixels: Larger images are refused.

    Raises:
        DataError: There is no such file.
        BitstreamError: It is no file of the learned codec, or damaged.
    """
    try:
        return inspect(_bytes_of(Path(path)), max_pixels)
    except BitstreamError as error:
        raise BitstreamError(f"'{path}': {error}") from error


def find_streams(sources: Sequence[str | Path]) -> dict[Path, str]:
    """Files of the learned codec, and their names as `find_photos` would name the images.

    Args:
        sources: Files, whatever their names, or folders with ``.fcl`` files at any depth.

    Raises:
        DataError: A source that is not there, or a folder without such files.
    """
    found: dict[Path, str] = {}
    for source in sources:
        path = Path(source)
        if not path.exists():
            raise DataError(f"{path} does not exist; pass files, or folders of them")
        inside = sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else []
        if path.is_dir() and not inside:
            raise DataError(f"{path} has no file whose name ends in {SUFFIX}")
        below = {file: file.relative_to(path).with_suffix("").as_posix() for file in inside}
        found |= below or {path: path.with_suffix("").name}
    return found


def decode_files(
    codec: ImageCodec, sources: Sequence[str | Path], out: str | Path
) -> Iterator[Path]:
    """Decodes files, each into ``out/NAME.png``.

    Args:
        codec: The codec.
        sources: As `find_streams`.
        out: Folder for the images.

    Yields:
        Each image's path, once it is complete.

    Raises:
        BitstreamError: As `ImageCodec.decode`, with the file's name.
        FastcilError: Two files of one name; an image that can't be written.
    """
    streams = find_streams(sources)
    if len(set(streams.values())) < len(streams):
        raise FastcilError("Two of the files have one name; decode them into folders of their own.")
    for path, name in streams.items():
        try:
            image = codec.decode(_bytes_of(path))
        except BitstreamError as error:
            raise BitstreamError(f"'{path}': {error}") from error
        _, data = cv2.imencode(".png", image.numpy()[..., ::-1])
        target = Path(out) / f"{name}.png"
        write_atomically(target, data.tobytes())
        yield target


def verify_files(
    sources: Sequence[str | Path],
    codec: ImageCodec | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[Path, str | None]]:
    """What is wrong with files, if anything.

    Args:
        sources: As `find_streams`.
        codec: Without one, magic, version, size and CRC-32 are checked; with one, symbols are
            decoded and compared with the encoder's too.
        max_pixels: Without a codec, which has its own: larger images are bad.

    Yields:
        Each file with None where it is good, or with what is wrong.
    """
    for path in find_streams(sources):
        data = _bytes_of(path)
        try:
            if codec is None:
                Bitstream.parse(data, max_pixels)
            else:
                codec.verify(data)
        except BitstreamError as error:
            yield path, str(error)
        else:
            yield path, None


def streams_of(sources: Sequence[str | Path], names: Sequence[str]) -> list[tuple[str, bytes]]:
    """Files with the images that they are of.

    A file belongs to the image whose name its path ends in, so that ``32/kodim01.fcl`` is one of
    ``kodim01``.

    Args:
        sources: As `find_streams`.
        names: Those of the images.

    Raises:
        DataError: A file of no image.
    """
    known, found = set(names), []
    for path, name in find_streams(sources).items():
        parts = PurePosixPath(name).parts
        ends = ["/".join(parts[k:]) for k in range(len(parts))]
        match = next((end for end in ends if end in known), None)
        if match is None:
            raise DataError(f"{path} is of none of the images, such as '{names[0]}'")
        found.append((match, _bytes_of(path)))
    return found


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
