"""A process that decodes images into their places in a file, chunk after chunk.

``python -m fastcil.files.decoder PIXELS`` reads jobs from its standard input, a line of JSON each:

    {"chunk": 3, "at": 4096, "nbytes": 300, "short_side": null,
     "images": [[name, file, first, length, height, width], ...]}

An image is ``length`` bytes of ``file`` from ``first`` on, the whole file where ``length`` is null;
where ``file`` is null, its bytes follow the line, in order. The pixels of all images stand one
after the other from byte ``at`` on, and are on the disk before the answer is given, a line of JSON:

    {"chunk": 3, "crc32": 305419896, "bad": [[2, "why"]], "turned": [[0, 5, 4]]}

The pixels of a bad image are zeros. ``turned`` are images of another height and width than was
planned, and of as many pixels. When its input ends, for instance because whoever gave it died, the
process ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import zlib
from typing import IO, Any

import cv2
import numpy as np

from fastcil.errors import DataError
from fastcil.files.decode import decode_image, shrink


def read_stretch(file: str | os.PathLike[str], first: int, length: int | None) -> bytes:
    """Some bytes of a file.

    Args:
        file: Its path.
        first: The first of them.
        length: How many; None for all that follow.

    Raises:
        OSError: The file can't be read, or ends before.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(b"abcdef"), file.flush()
        ...     read_stretch(file.name, 1, 2), read_stretch(file.name, 4, None)
        (b'bc', b'ef')
    """
    with open(file, "rb") as opened:
        opened.seek(first)
        data = opened.read() if length is None else opened.read(length)
    if length is not None and len(data) < length:
        raise OSError(0, "it ends before")
    return data


def main() -> int:
    """Works until its input ends."""
    # An interruption from the keyboard is for whoever gives the jobs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    jobs, answers = sys.stdin.buffer, sys.stdout
    pixels = os.open(sys.argv[1], os.O_WRONLY)
    for line in iter(jobs.readline, b""):
        answer = _work(json.loads(line), pixels, jobs)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


def _work(job: dict[str, Any], pixels: int, jobs: IO[bytes]) -> dict[str, Any]:
    """Decodes a chunk, writes it and waits until it is on the disk."""
    chunk = np.zeros(job["nbytes"], np.uint8)
    bad: list[tuple[int, str]] = []
    turned: list[tuple[int, int, int]] = []
    end = 0
    for number, (name, file, first, length, height, width) in enumerate(job["images"]):
        begin, end = end, end + 3 * height * width
        data = jobs.read(length) if file is None else None
        if data is not None and len(data) < length:
            # Whoever gave the job died; what another may have written since is not to be touched.
            sys.exit(1)
        try:
            if data is None:
                data = read_stretch(file, first, length)
            image = shrink(decode_image(data, name), job["short_side"])
            if image.size != end - begin:
                raise DataError(
                    f"{name} is {image.shape[0]} x {image.shape[1]} pixels and was to be"
                    f" {height} x {width}: its header says something else; save it anew"
                )
        except DataError as error:
            bad.append((number, str(error)))
        except OSError as error:
            bad.append((number, f"{name} cannot be read: {error.strerror}"))
        else:
            chunk[begin:end] = image.reshape(-1)
            if image.shape[:2] != (height, width):
                turned.append((number, *image.shape[:2]))
    try:
        _write(pixels, chunk, job["at"])
    except OSError as error:
        return {"chunk": job["chunk"], "failed": error.strerror}
    return {"chunk": job["chunk"], "crc32": zlib.crc32(chunk.data), "bad": bad, "turned": turned}


def _write(pixels: int, chunk: np.ndarray, at: int) -> None:
    """Writes all of a chunk and waits until it is on the disk."""
    rest = memoryview(chunk.data)
    while rest:
        written = os.pwrite(pixels, rest, at)
        rest, at = rest[written:], at + written
    os.fdatasync(pixels)


if __name__ == "__main__":
    sys.exit(main())
