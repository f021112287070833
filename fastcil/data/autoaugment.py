"""AutoAugment's two policies and what they do to a batch (Cubuk et al. 2019).

A policy is 25 sub-policies of two steps; each image draws one sub-policy, and each of its steps
is taken with the step's probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fastcil.ops import PixelProgram
from fastcil.ops.pixel_ops import rotation
from fastcil.ops.pixel_program import AMOUNTS, FILL, OPERATIONS

Step = tuple[str, float, int]
"""Operation, probability, magnitude level from 0 to 9."""

# The appendix of Cubuk et al. 2019. It prints a level for invert, autocontrast and equalize too,
# which have no magnitude: theirs is 0 here.
CIFAR: tuple[tuple[Step, Step], ...] = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("colour", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("colour", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("colour", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("colour", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("colour", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)
IMAGENET: tuple[tuple[Step, Step], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("colour", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("colour", 1.0, 2)),
    (("colour", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("colour", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)
POLICIES = {"cifar": CIFAR, "imagenet": IMAGENET}


@dataclass(frozen=True)
class Range:
    """The range of an operation's magnitude.

    Attributes:
        first: Magnitude at level 0.
        last: Magnitude at level 9; the levels between are evenly spaced.
        signed: Whether a coin decides if the distance from `first` is added or taken away.
        whole: Whether the magnitude is rounded to a whole number.
    """

    first: float = 0.0
    last: float = 0.0
    signed: bool = False
    whole: bool = False

    def magnitude(self, level: int) -> tuple[float, float]:
        """Middle and swing: the magnitude is middle + sign * swing with the sign drawn.

        Args:
            level: From 0 to 9.

        Example:
            >>> RANGES["rotate"].magnitude(9), RANGES["solarize"].magnitude(9)
            ((0.0, 30.0), (0.0, 0.0))
        """
        way = (self.last - self.first) * level / 9
        if self.signed:
            return self.first, way
        return float(round(self.first + way)) if self.whole else self.first + way, 0.0


# The ranges are those of Cubuk et al. 2019; its translation by up to 150 pixels was meant for
# images of side 331, and is that share of the side here, as in the released policies.
RANGES = {
    "shear_x": Range(0.0, 0.3, signed=True),
    "shear_y": Range(0.0, 0.3, signed=True),
    "translate_x": Range(0.0, 150 / 331, signed=True),
    "translate_y": Range(0.0, 150 / 331, signed=True),
    "rotate": Range(0.0, 30.0, signed=True),
    "autocontrast": Range(),
    "invert": Range(),
    "equalize": Range(),
    "solarize": Range(256.0, 0.0),
    "posterize": Range(8.0, 4.0, whole=True),
    "contrast": Range(1.0, 1.9, signed=True),
    "colour": Range(1.0, 1.9, signed=True),
    "brightness": Range(1.0, 1.9, signed=True),
    "sharpness": Range(1.0, 1.9, signed=True),
}
_NAMES = tuple(RANGES)
_GEOMETRIC = 5  # the first of them, all affine
# The program's number for each, and for a step not taken.
_NUMBERS = torch.tensor(
    [OPERATIONS.get(name, OPERATIONS["affine"]) for name in _NAMES] + [OPERATIONS["none"]],
    dtype=torch.int8,
)


@dataclass(frozen=True)
class Plan:
    """What each image of a batch goes through: `draw`'s result, on the CPU.

    Attributes:
        operations: int64 [B, 2], a place in `RANGES` for each of the two steps, or len(RANGES)
            where the step is not taken.
        magnitudes: float64 [B, 2].
    """

    operations: Tensor
    magnitudes: Tensor

    def program(
        self, height: int, width: int, fill: tuple[int, int, int] = (128, 128, 128)
    ) -> PixelProgram:
        """The plan for images of one size, in numbers that `fastcil.ops.read_batch` takes.

        Args:
            height: Height of the images.
            width: Width of the images.
            fill: Colour of what a geometric operation brings in from outside.

        Returns:
            A program of two steps.

        Example:
            >>> invert = torch.tensor([[list(RANGES).index("invert"), len(RANGES)]])
            >>> Plan(invert, torch.zeros(1, 2)).program(32, 32).operations
            tensor([[4, 0]], dtype=torch.int8)
        """
        which = torch.arange(_GEOMETRIC) == self.operations[..., None]  # [B, 2, 5]
        shares = torch.where(which, self.magnitudes[..., None], 0.0)
        shear_x, shear_y, right, down, degrees = shares.unbind(-1)
        # Pillow takes floor(x + 0.5 + shift) in double precision here, not in fixed point.
        right, down = (right * width + 0.5).floor(), (down * height + 0.5).floor()
        zero = torch.zeros_like(right)
        affine = rotation(degrees, height, width)  # [B, 2, 6]
        affine = affine + torch.stack([zero, shear_x, right, shear_y, zero, down], -1)
        amounts = torch.zeros((*self.operations.shape, AMOUNTS), dtype=torch.float64)
        amounts[..., 0] = self.magnitudes
        geometric = which.any(-1, keepdim=True)
        amounts[..., :FILL] = torch.where(geometric, affine, amounts[..., :FILL])
        amounts[..., FILL:] = torch.tensor(fill, dtype=torch.float64)
        return PixelProgram(_NUMBERS[self.operations], amounts)


@cache
def _tables(policy: str) -> tuple[Tensor, Tensor, Tensor]:
    """Operations int64 [25, 2], probabilities [25, 2], (middle, swing) float64 [25, 2, 2]."""
    table = POLICIES[policy]
    names = torch.tensor([[_NAMES.index(name) for name, _, _ in pair] for pair in table])
    chances = torch.tensor([[chance for _, chance, _ in pair] for pair in table])
    ranges = [[RANGES[name].magnitude(level) for name, _, level in pair] for pair in table]
    return names, chances, torch.tensor(ranges, dtype=torch.float64)


def draw(count: int, policy: Literal["cifar", "imagenet"], generator: torch.Generator) -> Plan:
    """Draws a sub-policy for each image, whether each step is taken, and its sign.

    Args:
        count: Number of images, B.
        policy: Which of the two policies of Cubuk et al. 2019.
        generator: A CPU generator; all draws come from it.

    Returns:
        The plan for the batch.

    Raises:
        ValueError: If the policy is unknown.

    Example:
        >>> draw(3, "cifar", torch.Generator().manual_seed(0)).magnitudes.shape
        torch.Size([3, 2])
    """
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; use one of {', '.join(POLICIES)}.")
    names, chances, ranges = _tables(policy)
    which = torch.randint(len(names), (count,), generator=generator)
    taken = torch.rand((count, 2), generator=generator) < chances[which]
    sign = torch.randint(2, (count, 2), generator=generator) * 2 - 1
    operations = names[which].masked_fill_(~taken, len(_NAMES))
    middle, swing = ranges[which].unbind(2)
    return Plan(operations, middle + sign * swing)
