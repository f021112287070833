"""What every launcher needs: the device of its tensors, dense memory, and sizes in tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcil.errors import FastcilError

ACCESS_BYTES = 16  # the widest load or store that a thread makes at once
LONGEST_SIDE = 32767  # of an image: what int16 holds


def check_sides(least: int, most: int) -> None:
    """Raise unless the shortest and the longest side of some images are within bounds."""
    if least < 1 or most > LONGEST_SIDE:
        raise FastcilError(
            f"sizes holds sides from {least} to {most}; a side must be 1 to {LONGEST_SIDE} pixels "
            f"long."
        )


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run so many programs of a kernel on the device of its first argument.

    Every launch of fastcil passes through here, so that the tests can see what would be launched.
    """
    constants = options(constants)
    device = arguments[0].device
    if device.type != "cuda":  # Triton's interpreter
        kernel[(programs,)](*arguments, **constants)
        return
    # An op is called for the device of its tensors, Triton launches on the current one.
    with torch.cuda.device(device):
        kernel[(programs,)](*arguments, **constants)


def options(constants: dict[str, Any]) -> dict[str, Any]:
    """The constants and options of a launch with those that Triton's versions disagree on."""
    if torch.version.hip is not None:
        constants = {k: v for k, v in constants.items() if k != "maxnreg"}  # NVIDIA's assembler's
    return {"enable_fp_fusion": True} | constants


def dense(x: Tensor) -> Tensor:
    """x with its elements one after the other in memory, from an aligned address on.

    Its strides are then those of ``torch.empty_like(x)``, as every op's result has them.
    """
    fits = x.is_contiguous() or x.stride() == torch.empty_like(x, device="meta").stride()
    return x if fits and x.data_ptr() % ACCESS_BYTES == 0 else torch.empty_like(x).copy_(x)


def beside(value: Tensor, x: Tensor) -> Tensor:
    """The value with its elements in the memory order of x, which is dense."""
    if value.stride() == x.stride() and value.data_ptr() % ACCESS_BYTES == 0:
        return value
    return torch.empty_like(x, dtype=value.dtype).copy_(value)


def arranged(value: Tensor, like: Tensor) -> Tensor:
    """The value with the strides of ``torch.empty_like(like)``."""
    if value.stride() == torch.empty_like(like, device="meta").stride():
        return value
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


def power_of_two_divisor(number: int, most: int) -> int:
    """The largest power of two that divides the number, up to ``most``."""
    return min(number & -number, most)
