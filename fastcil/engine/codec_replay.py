"""Files of a learned codec as what knowledge replay replays."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcil.compression import CodecModel
from fastcil.compression.bitstream import Bitstream
from fastcil.compression.codec import ImageCodec
from fastcil.compression.errors import BitstreamError
from fastcil.data import resolve
from fastcil.data.listing import list_source
from fastcil.engine.codec_files import SUFFIX
from fastcil.errors import DataError


def stream_files(source: Any) -> list[Path]:
    """Files of the learned codec at a source, in order; none where it is something else.

    Args:
        source: As the ``replay`` of `fastcil.engine.codec_training.finetune_codec`.

    Raises:
        DataError: A folder that holds images beside them.

    Example:
        >>> stream_files("scenes:classes=2")
        []
    """
    if not isinstance(source, (str, os.PathLike)):
        return []
    try:
        path = resolve(source)
    except DataError:
        return []  # whoever reads images says so
    if path.is_file():
        return [path] if path.suffix == SUFFIX else []
    found = sorted(path.rglob(f"*{SUFFIX}"))
    if found and list_source(path).files:
        raise DataError(
            f"{path} holds both images and {SUFFIX} files; give a folder of one kind to replay"
        )
    return found


def read_streams(
    files: Sequence[Path], model: CodecModel, side: int, *, limit: int | None, skip_bad: bool
) -> list[Bitstream]:
    """The streams in files, none of them decoded yet.

    Args:
        files: The files.
        model: The codec that is to replay them.
        side: Of the windows that will be cut of them.
        limit: How many to take, evenly; None for all.
        skip_bad: Leave out those that can't be used, with one warning that counts them.

    Raises:
        BitstreamError: A file that is none, or is damaged or of another entropy model; or an image
            that is smaller than a window.
        DataError: None is left.
    """
    count = len(files) if limit is None else min(limit, len(files))
    codec = ImageCodec(model)
    known = codec.entropy_hash
    found: list[Bitstream] = []
    skipped: list[str] = []
    for file in (files[k * len(files) // count] for k in range(count)):
        try:
            stream = Bitstream.parse(file.read_bytes(), codec.max_pixels)
            stream.check_hash(known)
            _check_side(stream, model, side)
            found.append(stream)
        except BitstreamError as error:
            if not skip_bad:
                raise BitstreamError(f"'{file}': {error}") from error
            skipped.append(f"'{file}': {error}")
    if skipped:
        warnings.warn(f"{len(skipped)} left out, the first: {skipped[0]}", stacklevel=2)
    if not found:
        raise DataError("replay has no file that can be used; give one at least")
    return found


def _check_side(stream: Bitstream, model: CodecModel, side: int) -> None:
    """Refuses an image that no window fits in."""
    padded = model.padded(stream.height, stream.width)
    if min(padded) < side:
        raise BitstreamError(
            f"The stream's image is {padded[0]} x {padded[1]} pixels with its padding, and windows "
            f"are of {side} (size); take a smaller size, or leave the file out."
        )
