"""What learned codecs are compared with: common image formats, and VTM's published points."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.files.decode import decode_image

Pixels = NDArray[np.uint8]

VTM_KODAK = ((0.113, 28.54), (0.331, 32.47), (0.881, 37.47), (1.587, 41.04))
"""(bits per pixel, PSNR in dB) of VTM 22.0 on the 24 Kodak images, as Duan et al. (2024) give it.

They hold for these images alone: a BD-rate against them on others would compare nothing.
"""


@dataclass(frozen=True)
class Anchor:
    """A format that images are compressed to at a quality.

    Args:
        name: The format.
        qualities: At which it is measured, 0 to 100, ascending.
        write: Pixels [H, W, 3] (RGB) and a quality to the bytes of a file.
        read: The bytes of a file to pixels.
        installed: Whether it can be used here.
    """

    name: str
    qualities: tuple[int, ...]
    write: Callable[[Pixels, int], bytes]
    read: Callable[[bytes], Pixels]
    installed: Callable[[], bool]

    def encode(self, image: Tensor, quality: int) -> bytes:
        """The file of an image.

        Args:
            image: uint8 [H, W, 3], RGB.
            quality: 0 to 100.

        Raises:
            FastcilError: The format is not installed, or refuses the image.
        """
        if not self.installed():
            package = "imagecodecs" if self.name == "jpegxl" else "an OpenCV that was built with it"
            raise FastcilError(f"{self.name} is not there; install {package}.")
        try:
            return self.write(image.numpy(), quality)
        except Exception as error:
            height, width = image.shape[:2]
            raise FastcilError(
                f"{self.name} does not take an image of {height} x {width} pixels ({error})."
            ) from error

    def decode(self, data: bytes) -> Tensor:
        """The image in a file that `encode` gave: uint8 [H, W, 3], RGB."""
        return torch.from_numpy(self.read(data))


def _opencv(suffix: str, *options: int, quality: int) -> Callable[[Pixels, int], bytes]:
    """A writer of OpenCV's; ``quality`` is the name of that option."""

    def write(image: Pixels, level: int) -> bytes:
        flipped = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        done, data = cv2.imencode(suffix, flipped, [quality, level, *options])
        if not done:
            raise FastcilError(f"OpenCV could not write {suffix}")
        return bytes(data)

    return write


def _read(data: bytes) -> Pixels:
    """A file of a format that OpenCV reads."""
    return decode_image(data, "anchor")


def _jpegxl() -> Any:
    import imagecodecs

    return imagecodecs


def _has_jpegxl() -> bool:
    return importlib.util.find_spec("imagecodecs") is not None and _jpegxl().JPEGXL.available


def _has_avif() -> bool:
    return bool(cv2.haveImageWriter("a.avif"))


ANCHORS: Mapping[str, Anchor] = MappingProxyType(
    {
        "jpeg": Anchor(
            "jpeg",
            (5, 10, 20, 30, 50, 75, 90, 95),
            _opencv(
                ".jpg",
                *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
                *(cv2.IMWRITE_JPEG_OPTIMIZE, 1),
                quality=cv2.IMWRITE_JPEG_QUALITY,
            ),
            _read,
            lambda: True,
        ),
        "webp": Anchor(
            "webp",
            (1, 10, 30, 50, 75, 90, 97),
            _opencv(".webp", quality=cv2.IMWRITE_WEBP_QUALITY),
            _read,
            lambda: bool(cv2.haveImageWriter("a.webp")),
        ),
        "avif": Anchor(
            "avif",
            (10, 20, 35, 50, 65, 80, 90),
            _opencv(".avif", cv2.IMWRITE_AVIF_SPEED, 6, quality=cv2.IMWRITE_AVIF_QUALITY),
            _read,
            _has_avif,
        ),
        "jpegxl": Anchor(
            "jpegxl",
            (10, 30, 50, 70, 85, 92, 96),
            lambda image, quality: bytes(_jpegxl().jpegxl_encode(image, level=quality)),
            lambda data: np.asarray(_jpegxl().jpegxl_decode(data)),
            _has_jpegxl,
        ),
    }
)
"""By name: JPEG (4:2:0, optimised Huffman tables), WebP and AVIF (speed 6) by OpenCV, which the
package has anyway; JPEG XL by imagecodecs where it is installed."""


def installed_anchors() -> tuple[str, ...]:
    """Names of the formats that can be used here.

    Example:
        >>> "jpeg" in installed_anchors()
        True
    """
    return tuple(name for name, anchor in ANCHORS.items() if anchor.installed())
