"""Feature extractors by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import nn

from fastcil.errors import FastcilError
from fastcil.nn.resnet import Stem, resnet18, resnet20, resnet32

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet32": resnet32,
}
"""Builders by name, called with ``width`` and ``stem`` where those are given."""


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
    **options: Any,
) -> nn.Module:
    """A new feature extractor, its weights drawn from torch's global generator.

    Args:
        name: A key of ``BACKBONES``.
        width: Channels of the first stage; None is the network's own.
        image_size: Side of the training images, which chooses the stem where none is given.
        stem: "imagenet", "small" or "cifar"; None chooses by ``image_size``, or the network's own
            without one.
        **options: Passed on to the builder, such as ``last_relu``.

    Returns:
        A module with ``out_channels`` and ``levels``.

    Raises:
        FastcilError: If the name or the stem is unknown.

    Example:
        >>> build_backbone("resnet18", width=8, image_size=64).out_channels
        64
    """
    if name not in BACKBONES:
        near = get_close_matches(name, BACKBONES, 1, 0.0)
        raise FastcilError(f"backbone is {name!r}; the nearest known one is {near[0]!r}.")
    if width is not None:
        options["width"] = width
    if stem is None and image_size is not None:
        stem = stem_for(image_size)
    if stem is not None:
        options["stem"] = stem
    return BACKBONES[name](**options)
