"""Image files as RGB uint8, and how large they are once they were shrunk."""

from __future__ import annotations

import cv2
import numpy as np

from fastcil.errors import DataError

LARGEST_SIDE = np.iinfo(np.int16).max  # what a geometry row of an ImageStore can hold


def check_side(height: int, width: int, where: str) -> None:
    """Refuse an image that an ImageStore cannot hold.

    Args:
        height: rows of pixels.
        width: columns of pixels.
        where: the image's path or place, for the error.

    Raises:
        DataError: If a side is 0 or more than 32767 pixels.

    Example:
        >>> check_side(480, 640, "a.jpg")
    """
    if min(height, width) < 1 or max(height, width) > LARGEST_SIDE:
        raise DataError(
            f"{where} is {height} x {width} pixels; an image has 1 to {LARGEST_SIDE} pixels a side"
        )


def decode_image(data: bytes, path: str) -> np.ndarray:
    """Decode an image file.

    Args:
        data: its content.
        path: for errors.

    Returns:
        uint8 [H, W, 3], RGB, as OpenCV decodes it (see `fastcil.data.folder`), turned as its EXIF
        orientation says.

    Raises:
        DataError: If it does not decode or has a side of more than 32767 pixels.

    Example:
        >>> _, data = cv2.imencode(".png", np.full((4, 6), 7, np.uint8))
        >>> decode_image(data.tobytes(), "a.png")[0, 0].tolist()
        [7, 7, 7]
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # an empty file, or more pixels than OpenCV allows
        image = None
    if image is None:
        raise DataError(
            f"{path} does not decode as an image ({len(data)} bytes); replace it, or pass"
            " skip_bad=True to leave such files out"
        )
    check_side(image.shape[0], image.shape[1], path)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def shrunk_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """The size of an image whose shorter side is to be no longer than so many pixels.

    Args:
        height: Of the image.
        width: Of the image.
        short_side: What to shrink the shorter side to; None leaves every image as it is.

    Returns:
        Height and width; the longer side in proportion, rounded to the nearest pixel (half up).
        An image that is no larger keeps its size: none is enlarged.

    Example:
        >>> shrunk_size(500, 375, 256), shrunk_size(100, 900, 256), shrunk_size(9, 7, None)
        ((341, 256), (100, 900), (9, 7))
    """
    shorter = min(height, width)
    if short_side is None or shorter <= short_side:
        return height, width
    high, wide = ((2 * s * short_side + shorter) // (2 * shorter) for s in (height, width))
    return high, wide


def shrink(image: np.ndarray, short_side: int | None) -> np.ndarray:
    """Shrink an image to `shrunk_size`.

    The filter is OpenCV's ``INTER_AREA``: each pixel is the mean over the area that it covers.

    Args:
        image: uint8 [H, W, 3].
        short_side: As there.

    Returns:
        uint8 [h, w, 3]; the image itself where it keeps its size.

    Example:
        >>> shrink(np.arange(8, dtype=np.uint8).repeat(6).reshape(4, 4, 3), 2)[..., 0].tolist()
        [[1, 2], [5, 6]]
    """
    height, width = shrunk_size(image.shape[0], image.shape[1], short_side)
    if (height, width) == image.shape[:2]:
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
