"""Image files of all kinds for tests of what is written once and mapped."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Soft noise, uint8 [H, W, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4 + 2, width // 4 + 2, 3))
    return cv2.resize(coarse.astype(np.uint8), (width, height))


def encoded(seed: int, height: int, width: int, orientation: int = 1, form: str = "jpeg") -> bytes:
    """A file with an EXIF orientation."""
    file, tags = io.BytesIO(), Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(picture(seed, height, width)).save(file, form, exif=tags)
    return file.getvalue()


def with_late_orientation(png: bytes) -> bytes:
    """The same PNG file with its EXIF block behind the pixels, where a header does not tell it."""
    begin = png.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(png[begin : begin + 4], "big")
    rest = png[:begin] + png[end:]
    last = rest.index(b"IEND") - 4
    return rest[:last] + png[begin:end] + rest[last:]


def tree() -> dict[str, bytes]:
    """Three classes of odd sizes, turned in every way, in several formats."""
    files = {}
    for k in range(18):
        part, name = ("train", "test")[k % 3 == 2], ["cat", "dog", "emu"][k // 6]
        form = "png" if k % 7 == 5 else "webp" if k == 9 else "jpeg"
        data = encoded(k, 31 + 3 * k, 77 - 2 * k, 1 + k % 8, form)
        data = with_late_orientation(data) if k in (5, 12) else data
        files[f"{part}/{name}/{k:02}.{'jpg' if form == 'jpeg' else form}"] = data
    return files


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    """The files in a folder."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    """The files in a tar, not sorted."""
    with tarfile.open(path, mode) as tar:
        for name, data in reversed(files.items()):
            member = tarfile.TarInfo(f"pets/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
