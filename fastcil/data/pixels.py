"""What is given as the pixels of images, checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.ops._packed import LARGEST_SIDE


def as_tensor(image: Any, name: str) -> Tensor:
    """A uint8 tensor over the same memory where that can be.

    Args:
        image: An array or a tensor.
        name: What the error calls it.

    Raises:
        FastcilError: Another dtype, or neither of the two.

    Example:
        >>> as_tensor(np.zeros((2, 3, 3), np.uint8), "image").shape
        torch.Size([2, 3, 3])
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise FastcilError(f"{name} is {image.dtype}; it must be uint8, 0 to 255.")
        image = np.ascontiguousarray(image)
        return torch.from_numpy(image if image.flags.writeable else image.copy())
    if not isinstance(image, Tensor):
        raise FastcilError(f"{name} is a {type(image).__name__}; it must be an array or a tensor.")
    if image.dtype != torch.uint8:
        raise FastcilError(f"{name} is {image.dtype}; it must be uint8, 0 to 255.")
    return image.contiguous()


def check_side(height: int, width: int, name: str) -> None:
    """Refuse a side that geometry's int16 cannot hold.

    Args:
        height: Of an image.
        width: Of an image.
        name: What the error calls it.

    Raises:
        FastcilError: A side is 0 or more than 32767 pixels.

    Example:
        >>> check_side(480, 640, "image")
    """
    if not (0 < height <= LARGEST_SIDE and 0 < width <= LARGEST_SIDE):
        raise FastcilError(
            f"{name} is {height} x {width}; sides must be between 1 and {LARGEST_SIDE} pixels."
        )
