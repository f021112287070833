"""AutoAugment's two policies and how a batch goes through them (Cubuk et al. 2019).

A policy is 25 sub-policies of two steps; each image draws one sub-policy, and each of its steps
is taken with the step's probability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fastcil.data import pixel_ops

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
class Operation:
    """How an operation is run, and the range of its magnitude.

    Attributes:
        run: Takes images, magnitudes [B] and the fill colour.
        first: Magnitude at level 0.
        last: Magnitude at level 9; the levels between are evenly spaced.
        signed: Whether a coin decides if the distance from `first` is added or taken away.
        whole: Whether the magnitude is rounded to a whole number.
    """

    run: Callable[[Tensor, Tensor, pixel_ops.Colour], Tensor]
    first: float = 0.0
    last: float = 0.0
    signed: bool = False
    whole: bool = False

    def magnitude(self, level: int) -> tuple[float, float]:
        """Middle and swing: the magnitude is middle + sign * swing with the sign drawn.

        Args:
            level: From 0 to 9.

        Example:
            >>> OPERATIONS["rotate"].magnitude(9), OPERATIONS["solarize"].magnitude(9)
            ((0.0, 30.0), (0.0, 0.0))
        """
        way = (self.last - self.first) * level / 9
        if self.signed:
            return self.first, way
        return float(round(self.first + way)) if self.whole else self.first + way, 0.0


def _plain(change: Callable[[Tensor], Tensor]) -> Operation:
    """An operation without a magnitude."""
    return Operation(lambda images, m, fill: change(images))


def _levels(
    change: Callable[[Tensor, Tensor], Tensor], first: float, last: float, **kind: bool
) -> Operation:
    """An operation that brings nothing in from outside the image."""
    return Operation(lambda images, m, fill: change(images, m), first, last, **kind)


def _shift_x(images: Tensor, share: Tensor, fill: pixel_ops.Colour) -> Tensor:
    """Translates by a share of the width."""
    return pixel_ops.translate_x(images, share * images.shape[3], fill)


def _shift_y(images: Tensor, share: Tensor, fill: pixel_ops.Colour) -> Tensor:
    """Translates by a share of the height."""
    return pixel_ops.translate_y(images, share * images.shape[2], fill)


# The ranges are those of Cubuk et al. 2019; its translation by up to 150 pixels was meant for
# images of side 331, and is that share of the side here, as in the released policies.
OPERATIONS = {
    "shear_x": Operation(pixel_ops.shear_x, 0.0, 0.3, signed=True),
    "shear_y": Operation(pixel_ops.shear_y, 0.0, 0.3, signed=True),
    "translate_x": Operation(_shift_x, 0.0, 150 / 331, signed=True),
    "translate_y": Operation(_shift_y, 0.0, 150 / 331, signed=True),
    "rotate": Operation(pixel_ops.rotate, 0.0, 30.0, signed=True),
    "autocontrast": _plain(pixel_ops.autocontrast),
    "invert": _plain(pixel_ops.invert),
    "equalize": _plain(pixel_ops.equalize),
    "solarize": _levels(pixel_ops.solarize, 256.0, 0.0),
    "posterize": _levels(pixel_ops.posterize, 8.0, 4.0, whole=True),
    "contrast": _levels(pixel_ops.contrast, 1.0, 1.9, signed=True),
    "colour": _levels(pixel_ops.colour, 1.0, 1.9, signed=True),
    "brightness": _levels(pixel_ops.brightness, 1.0, 1.9, signed=True),
    "sharpness": _levels(pixel_ops.sharpness, 1.0, 1.9, signed=True),
}
_NAMES = tuple(OPERATIONS)


@dataclass(frozen=True)
class Plan:
    """What each image of a batch goes through: `draw`'s result, on the CPU.

    Attributes:
        operations: int64 [B, 2], a place in `OPERATIONS` for each of the two steps, or
            len(OPERATIONS) where the step is not taken.
        magnitudes: float64 [B, 2].
    """

    operations: Tensor
    magnitudes: Tensor


@cache
def _tables(policy: str) -> tuple[Tensor, Tensor, Tensor]:
    """Operations int64 [25, 2], probabilities [25, 2], (middle, swing) float64 [25, 2, 2]."""
    table = POLICIES[policy]
    names = torch.tensor([[_NAMES.index(name) for name, _, _ in pair] for pair in table])
    chances = torch.tensor([[chance for _, chance, _ in pair] for pair in table])
    ranges = [[OPERATIONS[name].magnitude(level) for name, _, level in pair] for pair in table]
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


def apply(images: Tensor, plan: Plan, fill: pixel_ops.Colour = pixel_ops.GREY) -> Tensor:
    """Takes a batch through a plan: each operation runs once per step, on the images that have it.

    The images are sorted by operation, so that each operation sees one stretch of memory; the
    order is worked out on the CPU, where the plan lies, and nothing waits for the device.

    Args:
        images: uint8 [B, 3, H, W].
        plan: What `draw` gave for B images.
        fill: Colour of what a geometric operation brings in from outside.

    Returns:
        uint8 [B, 3, H, W], channels_last.

    Raises:
        ValueError: If images are not uint8 [B, 3, H, W] or the plan is for another number.

    Example:
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> invert = torch.full((2, 2), list(OPERATIONS).index("invert"))
        >>> torch.equal(apply(images, Plan(invert, torch.zeros(2, 2))), images)
        True
    """
    pixels = pixel_ops.pixel_rows(images)
    count = len(pixels)
    if plan.operations.shape != (count, 2):
        raise ValueError(f"plan is for {len(plan.operations)} images; draw one for {count}.")
    place = torch.arange(count)  # where each image lies now
    for step in range(2):
        operations, order = plan.operations[:, step].sort(stable=True)
        sizes = operations.bincount(minlength=len(_NAMES) + 1).tolist()
        magnitudes = plan.magnitudes[order, step].to(images.device, non_blocking=True)
        pixels = pixels.index_select(0, place[order].to(images.device, non_blocking=True))
        *parts, untouched = pixels.split(sizes)
        *amounts, _ = magnitudes.split(sizes)
        done = [
            OPERATIONS[name].run(part.permute(0, 3, 1, 2), amount, fill).permute(0, 2, 3, 1)
            for name, part, amount in zip(_NAMES, parts, amounts, strict=True)
            if len(part)
        ]
        pixels = torch.cat([*done, untouched])
        place = order.argsort()
    pixels = pixels.index_select(0, place.to(images.device, non_blocking=True))
    return pixels.permute(0, 3, 1, 2)


def autoaugment(
    images: Tensor,
    policy: Literal["cifar", "imagenet"],
    generator: torch.Generator,
    fill: pixel_ops.Colour = pixel_ops.GREY,
) -> Tensor:
    """AutoAugment (Cubuk et al. 2019): `draw` a plan for the batch and `apply` it.

    Args:
        images: uint8 [B, 3, H, W].
        policy: Which of its two policies.
        generator: A CPU generator; all draws come from it.
        fill: Colour of what a geometric operation brings in from outside.

    Returns:
        uint8 [B, 3, H, W], channels_last.

    Raises:
        ValueError: If the policy is unknown or images are not uint8 [B, 3, H, W].

    Example:
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> autoaugment(images, "imagenet", torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """
    return apply(images, draw(images.shape[0], policy, generator), fill)
