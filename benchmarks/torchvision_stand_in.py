"""What PyCIL and Mammoth use of torchvision, where torchvision itself can't be imported.

The transforms do to a PIL image what torchvision's of that name are documented to do, by Pillow's
and NumPy's own functions, as torchvision does; data sets are not read here. See `pycil` and
`mammoth`.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class RandomCrop:
    """A square of this side anywhere in the image, which has a black margin."""

    pad_if_needed, fill, padding_mode = False, 0, "constant"

    def __init__(self, size: int, padding: int = 0) -> None:
        self.size, self.padding = (size, size), padding

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.padding:
            image = ImageOps.expand(image, self.padding)
        height, width = self.size
        x = int(torch.randint(0, image.width - width + 1, (1,)))
        y = int(torch.randint(0, image.height - height + 1, (1,)))
        return image.crop((x, y, x + width, y + height))


class RandomResizedCrop:
    """A part of 8 to 100 % of the area, of sides between 3:4 and 4:3, resized to a square."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        box = self._box(image.width, image.height)
        size = (self.size, self.size)
        return image.crop(box).resize(size, Image.Resampling.BILINEAR)

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * random.uniform(0.08, 1.0)
            ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                x, y = random.randint(0, width - w), random.randint(0, height - h)
                return x, y, x + w, y + h
        side = min(width, height)
        x, y = (width - side) // 2, (height - side) // 2
        return x, y, x + side, y + side


class Resize:
    """The shorter side as long as this."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        factor = self.size / min(image.size)
        size = round(image.width * factor), round(image.height * factor)
        return image.resize(size, Image.Resampling.BILINEAR)


class CenterCrop:
    """The square of this side in the middle."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        x, y = (image.width - self.size) // 2, (image.height - self.size) // 2
        return image.crop((x, y, x + self.size, y + self.size))


class RandomHorizontalFlip:
    """Mirrors with this probability."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.mirror(image) if float(torch.rand(1)) < self.p else image


class ColorJitter:
    """Brightness times a number within this of 1."""

    def __init__(self, brightness: float = 0.0) -> None:
        self.brightness = brightness

    def __call__(self, image: Image.Image) -> Image.Image:
        factor = float(torch.empty(1).uniform_(1 - self.brightness, 1 + self.brightness))
        return ImageEnhance.Brightness(image).enhance(factor)


class ToTensor:
    """float32 [3, H, W] from 0 to 1."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image, copy=True))
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class Normalize:
    """Less the mean, over the deviation, channel by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.clone().sub_(self._mean).div_(self._std)


_TRANSFORMS = (
    *(Compose, RandomCrop, RandomResizedCrop, Resize, CenterCrop),
    *(RandomHorizontalFlip, ColorJitter, ToTensor, Normalize),
)


def absent(name: str) -> type:
    """A class that nothing is of, for names that are imported and not used here."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def install_if_missing() -> None:
    """Puts itself in torchvision's place in this process if torchvision can't be imported."""
    try:
        importlib.import_module("torchvision.transforms")
        return
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    package, transforms, functional = map(ModuleType, names)
    datasets = ModuleType("torchvision.datasets")
    for transform in _TRANSFORMS:
        setattr(transforms, transform.__name__, transform)
    vars(package).update(transforms=transforms, datasets=datasets, __path__=[])
    vars(transforms).update(functional=functional, __path__=[])
    for module in (package, transforms, functional, datasets):
        module.__getattr__ = absent  # type: ignore[method-assign]
        sys.modules[module.__name__] = module
