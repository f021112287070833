"""Exemplars as JPEG files (MRDC, Wang et al. 2022)."""

from __future__ import annotations

import math
from typing import cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcil.data import ImageStore
from fastcil.errors import FastcilError
from fastcil.memory.codecs.byte_store import ByteStore
from fastcil.memory.codecs.codec import Codec
from fastcil.memory.codecs.parallel import in_parallel

Pixels = NDArray[np.uint8]


class JpegCodec(Codec[ByteStore]):
    """Every image at its own resolution as a JPEG file, all of one quality.

    The files are byte for byte those that Pillow writes by default (and through it scikit-image,
    by which Wang et al. 2022 wrote theirs): baseline, standard Huffman tables, chroma at half the
    resolution both ways (4:2:0). libjpeg-turbo does it, inside OpenCV, on as many threads as torch
    has. It also decodes them, on the host whatever the device: decoders differ in the last bit,
    and exemplars must be the same bits everywhere. A file says its own quality, so files of
    several stand side by side.

    An exemplar takes its file and 12 bytes: length (4), height and width (4), label (4). A file
    has a header of some 620 bytes, so that the smallest images grow.

    Args:
        quality: libjpeg's scale, 1 to 100.
        bits_per_pixel: Of what counts as one image in a budget of images: 24 for a raw one.
            Wang et al. count against the data set's files, which are JPEG themselves, and in
            their account 20 images become 37 at quality 50. The mean of the files at hand, here,
            makes such an account.

    Raises:
        FastcilError: A quality that is no whole number from 1 to 100; ``bits_per_pixel`` that are
            not positive.

    Example:
        >>> store = ImageStore.from_batch(torch.full((1, 64, 64, 3), 90, dtype=torch.uint8))
        >>> codec = JpegCodec(quality=50)
        >>> kept = codec.encode(store)
        >>> codec.decode(kept).image(0)[0, 0].tolist()
        [90, 90, 90]
        >>> bool(codec.nbytes(kept) == len(kept.strings()[0]) + 12)
        True
    """

    name = "jpeg"
    store = ByteStore

    def __init__(self, quality: int = 75, bits_per_pixel: float = 24.0) -> None:
        check_quality("quality", quality)
        number = isinstance(bits_per_pixel, (int, float)) and not isinstance(bits_per_pixel, bool)
        if not (number and math.isfinite(bits_per_pixel) and bits_per_pixel > 0):
            raise FastcilError(
                f"bits_per_pixel is {bits_per_pixel!r}; it must be a positive number, and is 24 "
                f"for raw images."
            )
        self.quality = quality
        self.bits_per_pixel = float(bits_per_pixel)

    def encode(self, images: ImageStore, marks: Tensor | None = None) -> ByteStore:
        """The files, written one by one on all threads; marks are not looked at."""
        host = images.to("cpu")
        if bool((host.geometry[:, 6] > 0).any()):
            host = host.reconstruct()
        pixels, offsets, sizes = host.pixels.numpy(), host.offsets.tolist(), host.sizes.tolist()
        options = [
            *(cv2.IMWRITE_JPEG_QUALITY, self.quality),
            *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
        ]

        def write(place: int) -> Pixels:
            height, width = sizes[place]
            start = offsets[place]
            rgb = pixels[start : start + 3 * height * width].reshape(height, width, 3)
            file: Pixels = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)[1]
            return file.reshape(-1)

        files = in_parallel(write, len(host))
        return ByteStore.from_strings(files, host.sizes).to(images.device)

    def decode(self, encoded: ByteStore) -> ImageStore:
        """The images, raw.

        Raises:
            FastcilError: A string that is no JPEG file, or one of another size.
        """
        files, sizes = encoded.strings(), encoded.sizes.cpu().long()
        pixels = torch.empty(3 * int(sizes.prod(1).sum()), dtype=torch.uint8)
        arena, shapes = pixels.numpy(), sizes.tolist()
        ends = sizes.prod(1).mul(3).cumsum(0).tolist()

        def read(place: int) -> None:
            height, width = shapes[place]
            bgr = _decode(files[place])
            if bgr is None or bgr.shape != (height, width, 3):
                raise FastcilError(
                    f"exemplar {place} is no JPEG file of {height} x {width} pixels; what memory "
                    f"holds is damaged."
                )
            rgb = arena[ends[place] - bgr.size : ends[place]].reshape(bgr.shape)
            cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, dst=rgb)

        in_parallel(read, len(files))
        return ImageStore.from_pixels(pixels, sizes).to(encoded.device)

    def units(self, encoded: ByteStore) -> Tensor:
        """Bytes of the file over those of a raw image, float64 [N] (Wang et al. 2022).

        With ``bits_per_pixel`` b, ``8 * bytes / (b * H * W)``: where 20 raw images would fit,
        20 / units files do. What lies beside the file is not counted, as nowhere in such a budget.
        """
        area = encoded.sizes.double().prod(1)
        return 8 * encoded.lengths.double() / (self.bits_per_pixel * area)


def check_quality(name: str, value: object) -> None:
    """Raises unless ``value`` is a quality that JPEG files can have.

    Example:
        >>> check_quality("quality", 75)
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 100:
        raise FastcilError(f"{name} is {value!r}; it must be a whole number from 1 to 100.")


def _decode(file: Pixels) -> Pixels | None:
    """The image, BGR; None if it is none."""
    try:
        bgr = cv2.imdecode(file, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    return cast("Pixels | None", bgr)
