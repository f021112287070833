"""From options and data to the things a run is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcil.data import Augmentation, ImageStore
from fastcil.engine.groups import AugmentOptions, NetworkOptions
from fastcil.errors import FastcilError
from fastcil.nn import build_backbone
from fastcil.nn.backbones import default_stem, default_width, takes

_SMALL = 64
_CIFAR = 40
_FLAGS = {"last_relu": True, "zero_init_residual": False}


def pick_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is CUDA where there is one.

    Raises:
        FastcilError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FastcilError(
            f"device is '{name}', which is not to be had here; use 'auto' or 'cpu'."
        ) from error
    return device


def natural_look(images: ImageStore, options: AugmentOptions) -> tuple[int, str]:
    """Side and way of cropping that suit the images, where the options leave them open."""
    sizes = images.sizes.cpu()
    alike = bool((sizes == sizes[0]).all()) and int(sizes[0, 0]) == int(sizes[0, 1])
    side = int(sizes[0, 0])
    small = alike and side <= _SMALL
    size = options.size if options.size is not None else (side if small else 224)
    crop = options.crop or ("padded" if small and size == side else "resized")
    check_crop(images, size, crop)
    return size, crop


def check_crop(images: ImageStore, size: int, crop: str) -> None:
    """Refuses images that the way of cropping does not suit.

    Raises:
        FastcilError: ``crop`` is ``padded`` and an image is of another size than the network sees:
            it would train on parts and test on images squeezed whole.
    """
    odd = (images.sizes != size).any(1).nonzero().flatten().tolist() if crop == "padded" else []
    if odd:
        height, width = images.sizes[odd[0]].tolist()
        raise FastcilError(
            f"augment.crop is 'padded', which needs all images to be {size} x {size}, and image "
            f"{odd[0]} is {height} x {width}; 'resized' takes all sizes."
        )


def make_augmentation(
    options: AugmentOptions, size: int, crop: str, published_policy: bool
) -> Augmentation:
    """The augmentation of a run; ``published_policy`` is whether the method's recipe has one.

    Raises:
        FastcilError: An option out of its range.
    """
    cifar = size <= _CIFAR
    policy = options.policy
    if policy == "auto":
        policy = ("cifar" if cifar else "imagenet") if published_policy else "none"
    cutout = options.cutout
    if cutout is None:
        cutout = 16 if published_policy and cifar and policy != "none" else 0
    make = Augmentation.cifar if cifar else Augmentation.photos
    plain = {} if options.standardise else {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    try:
        return make(
            size=size,
            crop=crop,
            resize=options.resize,
            min_scale=options.min_scale,
            padding=options.padding,
            flip=options.flip,
            brightness=options.brightness,
            contrast=options.contrast,
            saturation=options.saturation,
            policy=policy,
            cutout=cutout,
            antialias=options.antialias,
            **plain,
        )
    except ValueError as error:
        raise FastcilError(f"augment.{error}") from error


def settle(
    options: NetworkOptions, size: int, published: Mapping[str, bool] | None = None
) -> NetworkOptions:
    """The network that the options name for images of this side, with nothing left open.

    Args:
        options: As they were given.
        size: Side of the images.
        published: `Method.published_network`.

    Raises:
        FastcilError: No network of that name.

    Example:
        >>> settled = settle(NetworkOptions(), 32)
        >>> settled.name, settled.width, settled.stem
        ('resnet32', 16, 'cifar')
    """
    name = options.name
    if name == "auto":
        name = "resnet32" if size <= _CIFAR else "resnet18"
    width = default_width(name) if options.width is None else options.width
    stem = options.stem or default_stem(name, size)
    flags: dict[str, Any] = {
        flag: default if getattr(options, flag) is None else getattr(options, flag)
        for flag, default in {**_FLAGS, **(published or {})}.items()
    }
    return dataclasses.replace(options, name=name, width=width, stem=stem, **flags)


def make_backbone_builder(
    options: NetworkOptions, size: int, published: Mapping[str, bool] | None = None
) -> Callable[[], nn.Module]:
    """Builds the network that the options name, for images of this side, with random weights.

    Args:
        options: As they were given.
        size: Side of the images.
        published: `Method.published_network`; not asked of a network that has none of it.
    """

    def build() -> nn.Module:
        network = settle(options, size, published)
        flags = {
            flag: getattr(network, flag)
            for flag in _FLAGS
            if getattr(options, flag) is not None or takes(network.name, flag)
        }
        return build_backbone(
            network.name, network.width, size, network.stem, activation=network.activation, **flags
        )

    return build


def as_images(images: Any) -> ImageStore:
    """A store of one image, of a batch, or of a sequence of images of any sizes.

    Raises:
        FastcilError: Not uint8 RGB images.
    """
    if isinstance(images, ImageStore):
        return images
    if isinstance(images, (np.ndarray, Tensor)):
        if images.ndim == 3:
            return ImageStore.from_images([images])
        return ImageStore.from_batch(images)
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        return ImageStore.from_images(images)
    raise FastcilError(
        f"images is a {type(images).__name__}; pass uint8 arrays [H, W, 3] or [B, H, W, 3]."
    )
