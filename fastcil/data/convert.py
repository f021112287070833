"""Images and labels as they come from Python: checked, and brought to RGB uint8 and int64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastcil.data.store import ImageStore
from fastcil.errors import DataError
from fastcil.files.decode import check_side

_FORMS = "give uint8 [H, W, 3] or [H, W], floats in [0, 1] of such a shape, or a Pillow image"


def image_array(image: Any, where: str) -> np.ndarray:
    """Bring one image to the form an ImageStore takes.

    Floats are taken to lie in [0, 1] and are scaled: round(255 x). A tensor with 1 or 3 rows first
    is [C, H, W], an array with 1 or 3 values last is [H, W, C]; the other order is tried next.
    Grey becomes RGB, a Pillow image is converted as it is seen, 16 bits by their upper 8.

    Args:
        image: Pillow image, or array or tensor [H, W], [H, W, 1 or 3] or [1 or 3, H, W].
        where: its place, for errors.

    Returns:
        uint8 [H, W, 3].

    Raises:
        DataError: If its dtype, range or shape is another.

    Example:
        >>> image_array(torch.ones(1, 2, 2), "images[0]")[0, 0].tolist()
        [255, 255, 255]
    """
    if hasattr(image, "convert") and hasattr(image, "getbands"):
        array = _pillow_array(image, where)
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        array = _as_uint8(_to_numpy(image), where)
    else:
        raise DataError(f"{where} is a {type(image).__name__}; {_FORMS}")
    array = _channels_last(array, 0, isinstance(image, torch.Tensor), where)
    check_side(array.shape[0], array.shape[1], where)
    return array


def _pillow_array(image: Any, where: str) -> np.ndarray:
    """Convert without importing Pillow: whoever passes an image of it has it."""
    if image.mode.startswith("I;16"):
        return (np.asarray(image) >> 8).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise DataError(f"{where} is a Pillow image of mode {image.mode!r}, whose range is unknown")
    try:
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # what Pillow raises while it decodes
        raise DataError(f"{where} does not decode: {error}") from error


def _to_numpy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu()
    return (array.float() if array.dtype.is_floating_point else array).numpy()


def _as_uint8(array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f" or array.size == 0:
        raise DataError(f"{where} has dtype {array.dtype}; {_FORMS}")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):
        raise DataError(f"{where} holds floats from {low:.3g} to {high:.3g}; {_FORMS}")
    return np.rint(array * 255).astype(np.uint8)


def _channels_last(array: np.ndarray, lead: int, first: bool, where: str) -> np.ndarray:
    """Bring [H, W], [H, W, C] or [C, H, W], after `lead` axes, to [H, W, 3]."""
    shape, axes = list(array.shape), (lead, -1) if first else (-1, lead)
    if array.ndim == lead + 2:
        array = array[..., None]
    elif array.ndim == lead + 3:
        channel = next((axis for axis in axes if array.shape[axis] in (1, 3)), -1)
        array = np.moveaxis(array, channel, -1)
    if array.ndim != lead + 3 or array.shape[-1] not in (1, 3):
        raise DataError(f"{where} has shape {shape}; {_FORMS}")
    return np.repeat(array, 3, -1) if array.shape[-1] == 1 else array


def image_store(images: Any, where: str) -> ImageStore:
    """Pack a batch or a list of images.

    A contiguous uint8 [N, H, W, 3] batch is not copied: do not write to it afterwards.

    Args:
        images: uint8 array or tensor [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3, or a
            sequence of what `image_array` takes, of any sizes.
        where: what holds the images, for errors.

    Returns:
        A raw store of N images.

    Raises:
        DataError: If a dtype or shape is another, or there is no image.

    Example:
        >>> len(image_store(np.zeros((5, 8, 8), np.uint8), "x"))
        5
    """
    if not isinstance(images, (np.ndarray, torch.Tensor, Sequence)):
        raise DataError(f"{where} is a {type(images).__name__}; give an array of images or a list")
    if len(images) == 0:
        raise DataError(f"{where} holds no image; give at least one")
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.dtype != object:
        array = _to_numpy(images)
        if array.dtype != np.uint8:
            raise DataError(f"{where} has dtype {array.dtype}; give uint8, 0 to 255")
        array = _channels_last(array, 1, isinstance(images, torch.Tensor), where)
        check_side(array.shape[1], array.shape[2], where)
        return ImageStore.from_batch(array)
    return ImageStore.from_images(image_array(x, f"{where}[{i}]") for i, x in enumerate(images))


def label_tensor(labels: Any, count: int, where: str, images: str) -> torch.Tensor:
    """Read one integer label per image.

    Args:
        labels: integers [N] or [N, 1]: array, tensor or sequence.
        count: number of images.
        where: what holds the labels, for errors.
        images: what holds the images, for errors.

    Returns:
        int64 [N].

    Raises:
        DataError: If they are not integers or not N.

    Example:
        >>> label_tensor([1, 0], 2, "y", "x")
        tensor([1, 0])
    """
    array = _to_numpy(labels) if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if array.dtype.kind not in "iu":
        raise DataError(f"{where} has dtype {array.dtype}; labels are integers 0, 1, 2 ...")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or len(array) != count:
        raise DataError(
            f"{where} has shape {list(array.shape)} for the {count} images of {images}; give one"
            " label per image"
        )
    return torch.from_numpy(array.astype(np.int64))
