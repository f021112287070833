"""Programs of pixel operations: for each image of a batch its own few, one after the other.

A program is numbers, so that a kernel can carry it out while an image is in cache:
``operations`` int8 [B, K] says which (`OPERATIONS`; 0 none), ``amounts`` float64 [B, K, 9] how: up
to six numbers, then a fill colour. `run` is the plain PyTorch that every kernel agrees with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.ops import pixel_ops
from fastcil.ops._packed import check_tensor

AMOUNTS = 9  # columns of ``amounts``
FILL = 6  # the first of the fill colour's
LARGEST_AMOUNT = 16383  # keeps Pillow's 16.16 fixed point within 32 bits

_Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def _levels(change: Callable[[Tensor, Tensor], Tensor]) -> _Run:
    """An operation with one number."""
    return lambda images, amounts, fill: change(images, amounts[:, 0])


def _plain(change: Callable[[Tensor], Tensor]) -> _Run:
    """An operation without any."""
    return lambda images, amounts, fill: change(images)


# In the order of csrc/pixel_ops.h; each takes images, six numbers [B, 6] and colours [B, 3].
_RUN: dict[str, _Run] = {
    "affine": pixel_ops.affine,
    "autocontrast": _plain(pixel_ops.autocontrast),
    "equalize": _plain(pixel_ops.equalize),
    "invert": _plain(pixel_ops.invert),
    "solarize": _levels(pixel_ops.solarize),
    "posterize": _levels(pixel_ops.posterize),
    "brightness": _levels(pixel_ops.brightness),
    "contrast": _levels(pixel_ops.contrast),
    "colour": _levels(pixel_ops.colour),
    "sharpness": _levels(pixel_ops.sharpness),
    "cutout": lambda images, amounts, fill: pixel_ops.cutout(
        images, amounts[:, 0], amounts[:, 1], amounts[:, 2], fill
    ),
}
_NAMES = ("none", *_RUN)
OPERATIONS = {name: number for number, name in enumerate(_NAMES)}


@dataclass(frozen=True)
class PixelProgram:
    """What happens to each image of a batch, on the CPU or the images' device.

    Attributes:
        operations: int8 [B, K], numbers of `OPERATIONS`.
        amounts: float64 [B, K, 9]: of ``affine`` the six coefficients, of ``solarize`` the
            threshold, of ``posterize`` the bits, of ``brightness``, ``contrast``, ``colour`` and
            ``sharpness`` the factor, of ``cutout`` y, x and side (see `fastcil.ops.pixel_ops`);
            the last three are the fill colour of ``affine`` and ``cutout``.

    Example:
        >>> half = PixelProgram.of("brightness", torch.full((2,), 0.5))
        >>> program = half.then(PixelProgram.of("invert", count=2))
        >>> program.operations.tolist(), program.amounts[0, 0, 0].item()
        ([[7, 4], [7, 4]], 0.5)
    """

    operations: Tensor
    amounts: Tensor

    @classmethod
    def of(
        cls,
        name: str,
        *numbers: Tensor,
        fill: tuple[int, int, int] = (0, 0, 0),
        count: int | None = None,
    ) -> PixelProgram:
        """One operation for all images, each with its own numbers.

        Args:
            name: One of `OPERATIONS`.
            *numbers: The operation's, [B] each.
            fill: Colour of what ``affine`` shows from outside the image or ``cutout`` covers it
                with.
            count: B, where there are no numbers to tell.

        Raises:
            FastcilError: No such operation.
        """
        if name not in OPERATIONS:
            raise FastcilError(f"name is {name!r}; use one of {', '.join(OPERATIONS)}")
        batch = len(numbers[0]) if numbers else count or 0
        amounts = torch.zeros((batch, 1, AMOUNTS), dtype=torch.float64)
        for column, number in enumerate(numbers):
            amounts[:, 0, column] = number
        amounts[:, 0, FILL:] = torch.tensor(fill, dtype=torch.float64)
        return cls(torch.full((batch, 1), OPERATIONS[name], dtype=torch.int8), amounts)

    @classmethod
    def empty(cls, count: int) -> PixelProgram:
        """The program that does nothing to a batch of this size."""
        return cls(
            torch.zeros((count, 0), dtype=torch.int8),
            torch.zeros((count, 0, AMOUNTS), dtype=torch.float64),
        )

    def then(self, other: PixelProgram) -> PixelProgram:
        """This program and then another, of as many images."""
        return PixelProgram(
            torch.cat([self.operations, other.operations], 1),
            torch.cat([self.amounts, other.amounts], 1),
        )

    def run(self, images: Tensor) -> Tensor:
        """Takes a batch of bytes through the program, in plain PyTorch.

        Args:
            images: uint8 [B, 3, H, W]; not written to.

        Returns:
            uint8 [B, 3, H, W], channels_last.

        Raises:
            ValueError: Images are not uint8 [B, 3, H, W], the program is for another number, or
                a number of it is out of its range.

        Example:
            >>> images = torch.full((2, 3, 1, 1), 100, dtype=torch.uint8)
            >>> PixelProgram.of("brightness", torch.tensor([0.5, 1.1])).run(images)[:, 0, 0, 0]
            tensor([ 50, 110], dtype=torch.uint8)
        """
        check_program(self.operations, self.amounts, len(images))
        return run(images, self.operations, self.amounts)


def check_program(operations: Tensor, amounts: Tensor, batch: int) -> None:
    """Refuses, by dtype and shape alone, what is no program for a batch."""
    check_tensor("operations", operations, torch.int8, (batch, None))
    check_tensor("amounts", amounts, torch.float64, (batch, operations.shape[1], AMOUNTS))


def run(images: Tensor, operations: Tensor, amounts: Tensor) -> Tensor:
    """Takes images [B, 3, H, W] through a program; each operation runs once per step.

    It looks at the numbers: a program on a GPU makes the host wait, one on the CPU does not.
    """
    _check_numbers(operations, amounts)
    pixels = pixel_ops.pixel_rows(images)
    steps = _steps(operations)
    if steps:
        pixels = pixels.clone()
    for step, number in steps:
        members = (operations[:, step] == number).nonzero().flatten()
        numbers = amounts[members, step]
        place = members.to(pixels.device, non_blocking=True)
        done = _RUN[_NAMES[number]](
            pixels.index_select(0, place).permute(0, 3, 1, 2),
            numbers[:, :FILL],
            numbers[:, FILL:].to(torch.uint8),
        )
        pixels.index_copy_(0, place, done.permute(0, 2, 3, 1))
    return pixels.permute(0, 3, 1, 2)


def _steps(operations: Tensor) -> list[tuple[int, int]]:
    """The steps in their order, and for each the numbers of the operations that it has."""
    codes = operations.long() + len(OPERATIONS) * torch.arange(
        operations.shape[1], device=operations.device
    )
    found = [divmod(code, len(OPERATIONS)) for code in codes.unique().tolist()]
    return [(step, number) for step, number in found if number > 0]


def _check_numbers(operations: Tensor, amounts: Tensor) -> None:
    """Refuses numbers that no kernel takes."""
    known = (operations >= 0) & (operations < len(OPERATIONS))
    colours, bits = amounts[..., FILL:], amounts[..., 0]
    within = (amounts.abs() <= LARGEST_AMOUNT).all(-1)
    within &= ((colours >= 0) & (colours <= 255)).all(-1)
    within &= (operations != OPERATIONS["posterize"]) | ((bits >= 0) & (bits <= 8))
    if not bool((known & within).all()):
        image, step = (~(known & within)).nonzero()[0].tolist()
        if not known[image, step]:
            raise FastcilError(
                f"operations[{image}, {step}] is {int(operations[image, step])}, which is no "
                "operation's number"
            )
        raise FastcilError(
            f"amounts[{image}, {step}] has a number out of its range: all must lie within "
            f"{LARGEST_AMOUNT}, posterize's bits between 0 and 8, and fill colours between 0 and "
            "255"
        )
