"""Feature extractors by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Literal

from torch import nn

from fastcil.errors import FastcilError
from fastcil.nn.linearize import leaky
from fastcil.nn.mlp import mlp
from fastcil.nn.resnet import Stem, resnet18, resnet20, resnet32

Activation = Literal["relu", "leaky"]
"""ReLU, or LeakyReLU of slope 0.01."""

ACTIVATIONS: tuple[Activation, ...] = ("relu", "leaky")

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "mlp": mlp,
}
"""Builders by name, called with ``width``, ``stem`` and ``image_size`` where those are given.

One that has no argument ``stem`` or ``image_size`` is not told that of the images.
"""


def stem_for(image_size: int) -> Stem:
    """The stem that leaves maps of a useful size.

    Args:
        image_size: Side of the training images in pixels.

    Returns:
        "cifar" up to 40 pixels, "small" up to 112, "imagenet" beyond.

    Example:
        >>> stem_for(32), stem_for(64), stem_for(224)
        ('cifar', 'small', 'imagenet')
    """
    if image_size <= 40:
        return "cifar"
    return "small" if image_size <= 112 else "imagenet"


def build_backbone(
    name: str,
    width: int | None = None,
    image_size: int | None = None,
    stem: str | None = None,
    activation: str = "relu",
    **options: Any,
) -> nn.Module:
    """A new feature extractor, its weights drawn from torch's global generator.

    Args:
        name: A key of ``BACKBONES``.
        width: Channels of the first stage; None is the network's own.
        image_size: Side of the training images, which chooses the stem where none is given, and
            the inputs of an ``mlp``.
        stem: "imagenet", "small" or "cifar"; None chooses by ``image_size``, or the network's own
            without one. An ``mlp`` has none.
        activation: "relu", or "leaky" for LeakyReLU(0.01) in the place of every ReLU, as Achille
            et al. (2021) and Shon et al. (2022, Sec. 4.1) have it in networks that they linearise.
            Names of modules and initial weights are the same, so that weights fit both.
        **options: Passed on to the builder, such as ``last_relu``.

    Returns:
        A module with ``out_channels`` and ``levels``.

    Raises:
        FastcilError: If the name, the stem or the activation is unknown, or the network has no
            stem, or no such option, and one is given.

    Example:
        >>> build_backbone("resnet18", width=8, image_size=64).out_channels
        64
    """
    builder = _builder(name)
    if activation not in ACTIVATIONS:
        raise FastcilError(
            f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}."
        )
    if width is not None:
        options["width"] = width
    if stem is not None and not takes(name, "stem"):
        raise FastcilError(f"stem is {stem!r}, and {name!r} has none; leave it out.")
    for option in options:
        if not takes(name, option):
            raise FastcilError(
                f"{option} is {options[option]}, and {name!r} has none; leave it out."
            )
    if image_size is not None:
        stem = stem or default_stem(name, image_size)
        if takes(name, "image_size"):
            options["image_size"] = image_size
    if stem is not None:
        options["stem"] = stem
    backbone = builder(**options)
    return leaky(backbone) if activation == "leaky" else backbone


def default_width(name: str) -> int | None:
    """Channels of the first stage that a network has where none are asked for.

    Args:
        name: A key of ``BACKBONES``.

    Returns:
        The width; None for a network that has no such argument.

    Raises:
        FastcilError: If the name is unknown.

    Example:
        >>> default_width("resnet18"), default_width("resnet32")
        (64, 16)
    """
    width = inspect.signature(_builder(name)).parameters.get("width")
    return width.default if width is not None and isinstance(width.default, int) else None


def default_stem(name: str, image_size: int) -> Stem | None:
    """The stem that a network has where none is asked for.

    Args:
        name: A key of ``BACKBONES``.
        image_size: Side of the training images in pixels.

    Returns:
        That of `stem_for`; None for a network that has no such argument.

    Raises:
        FastcilError: If the name is unknown.

    Example:
        >>> default_stem("resnet18", 64), default_stem("mlp", 28)
        ('small', None)
    """
    return stem_for(image_size) if takes(name, "stem") else None


def takes(name: str, argument: str) -> bool:
    """Whether a network's builder has an argument.

    Args:
        name: A key of ``BACKBONES``.
        argument: Name of the argument.

    Raises:
        FastcilError: If the name is unknown.

    Example:
        >>> takes("resnet18", "last_relu"), takes("mlp", "last_relu")
        (True, False)
    """
    return argument in inspect.signature(_builder(name)).parameters


def _builder(name: str) -> Callable[..., nn.Module]:
    """What builds the network of that name."""
    if name not in BACKBONES:
        near = get_close_matches(name, BACKBONES, 1, 0.0)
        raise FastcilError(f"backbone is {name!r}; the nearest known one is {near[0]!r}.")
    return BACKBONES[name]
