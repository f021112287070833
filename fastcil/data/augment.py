"""Augmentation: where each training image is cropped, and what happens to its pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastcil import ops
from fastcil.data import autoaugment, crops
from fastcil.ops.pixel_ops import pixel_rows

Crop = Literal["resized", "padded", "window", "none"]
Policy = Literal["none", "cifar", "imagenet"]


def _real(value: object) -> bool:
    """Whether this is a finite number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    """Whether this is an int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _checked(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Checks sizes [B, 2] and gives heights and widths, float64 [B] each."""
    if not isinstance(sizes, Tensor) or sizes.ndim != 2 or sizes.shape[1] != 2:
        got = list(sizes.shape) if isinstance(sizes, Tensor) else type(sizes).__name__
        raise ValueError(f"sizes is {got}; pass a tensor [B, 2] of heights and widths.")
    height, width = sizes.double().unbind(1)
    return height, width


@dataclass(frozen=True)
class Augmentation:
    """How training and test images are cut out of the stored ones and changed.

    The geometry (`draw`, `centre`, `whole`) and the `program` of what happens to the pixels are for
    `fastcil.ops.read_batch`, which does it all as it gathers a batch, and normalises it. On a batch
    of bytes `pixels` and `normalise` do the same to the last bit. Every random number comes from
    the CPU generator passed in: the same seed gives the same bits.

    Attributes:
        size: Side of the training and test image in pixels.
        crop: "resized": a random part of the image, resized (RandomResizedCrop, Szegedy et al.
            2015); "padded": a square of side `size` at the image's own resolution, out of the
            image with `padding` black pixels on each side; "window": the same inside the image, one
            with a shorter side being enlarged to fit, or inside what `resize` makes of the image;
            "none": the whole image.
        min_scale: Smallest share of the image's area that "resized" takes; the largest is 1.
        padding: Black pixels on each side for "padded".
        flip: Whether half the images are mirrored.
        brightness: b of a brightness factor drawn from [1 - b, 1 + b]; 0 leaves it out.
        contrast: The same for the contrast, which is changed next.
        saturation: The same for the saturation, which is changed last.
        policy: AutoAugment's policy (Cubuk et al. 2019), or "none".
        cutout: Side of Cutout's black square (DeVries & Taylor 2017), or 0.
        mean: Each channel's mean, of values from 0 to 1.
        std: Each channel's standard deviation, likewise.
        antialias: Whether `read` filters when it shrinks.
        test_ratio: With "resized", the test image is the middle of the image resized to a short
            side of size * test_ratio; "window" tests on the window in the middle, the other crops
            on the whole image.
        resize: With "window", side of the square that the whole image is resized to before the
            window is cut out; None leaves it as it is.

    Raises:
        ValueError: If a value is out of its range; the sentence names it.

    Example:
        >>> augmentation = Augmentation.cifar(policy="cifar", cutout=16)
        >>> generator = torch.Generator().manual_seed(0)
        >>> crops, flips = augmentation.draw(torch.full((2, 2), 32), generator)
        >>> crops.shape, flips.shape
        (torch.Size([2, 4]), torch.Size([2]))
        >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        >>> augmentation.normalise(augmentation.pixels(images, generator)).dtype
        torch.float32
    """

    size: int
    crop: Crop = "resized"
    min_scale: float = 0.08
    padding: int = 4
    flip: bool = True
    brightness: float = 63 / 255
    contrast: float = 0.0
    saturation: float = 0.0
    policy: Policy = "none"
    cutout: int = 0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    antialias: bool = True
    test_ratio: float = 256 / 224
    resize: int | None = None

    def __post_init__(self) -> None:
        """Checks every value; raises ValueError in one sentence."""
        if not _whole(self.size) or self.size < 1:
            raise ValueError(f"size is {self.size!r}; pass a side in pixels, at least 1.")
        if self.crop not in get_args(Crop):
            raise ValueError(f"crop is {self.crop!r}; use one of {', '.join(get_args(Crop))}.")
        if not _real(self.min_scale) or not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale is {self.min_scale!r}; pass a share above 0, at most 1.")
        if self.policy not in get_args(Policy):
            raise ValueError(
                f"policy is {self.policy!r}; use one of {', '.join(get_args(Policy))}."
            )
        for name in ("brightness", "contrast", "saturation"):
            if not _real(getattr(self, name)) or not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; pass a number from 0 to 1.")
        if not _real(self.test_ratio) or self.test_ratio < 1:
            raise ValueError(f"test_ratio is {self.test_ratio!r}; pass a number of at least 1.")
        if self.resize is not None and (not _whole(self.resize) or self.resize < self.size):
            raise ValueError(
                f"resize is {self.resize!r}; pass a side in pixels of at least size, {self.size}, "
                f"or None."
            )
        if self.resize is not None and self.crop != "window":
            raise ValueError(
                f"resize is {self.resize}, and crop '{self.crop}' has no use for it; set crop to "
                f"'window', or resize to None."
            )
        for name in ("padding", "cutout"):
            value = getattr(self, name)
            if not _whole(value) or value < 0:
                raise ValueError(f"{name} is {value!r}; pass a number of pixels, at least 0.")
        for name in ("flip", "antialias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; pass True or False.")
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            if (
                not isinstance(values, tuple)
                or len(values) != 3
                or not all(_real(value) and value > least for value in values)
            ):
                raise ValueError(
                    f"{name} is {values!r}; pass a tuple of three numbers, one per channel"
                    f"{', each above 0' if name == 'std' else ''}."
                )

    @property
    def constant(self) -> bool:
        """Whether nothing is drawn, so that an image is read alike every time.

        Example:
            >>> Augmentation(8, crop="none", flip=False, brightness=0.0).constant
            True
        """
        changes = (self.flip, self.brightness, self.contrast, self.saturation, self.cutout)
        return self.crop == "none" and self.policy == "none" and not any(changes)

    @classmethod
    def cifar(cls, size: int = 32, **changes: Any) -> Augmentation:
        """CIFAR's usual transform: padded crop, flip, brightness 63/255, CIFAR-100's statistics.

        Args:
            size: Side of the images.
            **changes: Any other field of `Augmentation`, to replace the preset's.

        Returns:
            The augmentation.

        Raises:
            ValueError: If a value is out of its range.

        Example:
            >>> Augmentation.cifar(flip=False).crop
            'padded'
        """
        preset: dict[str, Any] = {
            "crop": "padded",
            "mean": (0.5071, 0.4867, 0.4408),
            "std": (0.2675, 0.2565, 0.2761),
        }
        return cls(size, **{**preset, **changes})

    @classmethod
    def photos(cls, size: int, **changes: Any) -> Augmentation:
        """ImageNet's usual transform: resized crop, flip, brightness 63/255, its statistics.

        Args:
            size: Side of the images.
            **changes: Any other field of `Augmentation`, to replace the preset's.

        Returns:
            The augmentation.

        Raises:
            ValueError: If a value is out of its range.

        Example:
            >>> Augmentation.photos(96).crop
            'resized'
        """
        return cls(size, **changes)

    def draw(self, sizes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws the crops and flips of a training batch.

        "resized" (Szegedy et al. 2015, as torchvision documents it): a share s of the area,
        uniform in [min_scale, 1], and an aspect ratio r, log-uniform in [3/4, 4/3], give a box of
        width round(sqrt(s H W r)) and height round(sqrt(s H W / r)); of ten such draws the first
        that fits the image is put at a uniform whole position. If none fits, it is the largest
        box about the middle with the nearest allowed ratio.

        "padded": y0 is uniform over -padding ... H + padding - size, and x0 likewise; an image
        smaller than that even with its padding is put in the middle.

        "window": the square's side is `size`, or the image's shorter one if that is less; its y0 is
        uniform over 0 ... H - side, and x0 likewise. With `resize` r the square is one of side
        `size` in the image as resized to r x r, y0 uniform over 0 ... r - size; the crop is what it
        shows, from y0 H / r to (y0 + size) H / r, so that one resampling does both. Its border
        alone may differ from that of two steps: `read` blends in no pixels from beyond a crop.

        Args:
            sizes: Heights and widths of the images, whole numbers, [B, 2]; on any device.
            generator: A CPU generator.

        Returns:
            crops float32 [B, 4] as (y0, x0, y1, x1) in pixels of the image, and flips bool [B], on
            the device of sizes.

        Raises:
            ValueError: If sizes is not [B, 2].

        Example:
            >>> augmentation = Augmentation(2, crop="padded", padding=0, flip=False)
            >>> augmentation.draw(torch.tensor([[2, 2]]), torch.Generator())
            (tensor([[0., 0., 2., 2.]]), tensor([False]))
        """
        height, width = _checked(sizes)
        # The number of draws never depends on what was drawn: a batch moves the generator by B.
        shape = (len(sizes), 3 + 2 * crops.TRIES)
        numbers = torch.rand(shape, generator=generator, dtype=torch.float64)
        numbers = numbers.to(sizes.device, non_blocking=True)
        (luck, down, across), tries = numbers[:, :3].unbind(1), numbers[:, 3:]
        flips = luck < (0.5 if self.flip else 0.0)
        if self.crop == "none":
            return self.whole(sizes), flips
        if self.crop == "padded":
            boxes = crops.padded(height, width, self.size, self.padding, down, across)
        elif self.crop == "window":
            boxes = crops.window(height, width, self.size, self.resize, down, across)
        else:
            boxes = crops.resized(height, width, self.min_scale, down, across, tries)
        return boxes, flips

    def centre(self, sizes: Tensor) -> Tensor:
        """The crops of a test batch.

        With "resized": the middle square of side min(H, W) / test_ratio, which is what is left of
        resizing the short side to size * test_ratio and cutting size x size out of the middle.
        With "window": the window in the middle, of the resized image where there is a `resize`.
        With "padded" and "none": the whole image.

        Args:
            sizes: Heights and widths of the images, [B, 2]; on any device.

        Returns:
            float32 [B, 4] as (y0, x0, y1, x1) in pixels of the image, on the device of sizes.

        Raises:
            ValueError: If sizes is not [B, 2].

        Example:
            >>> Augmentation(224).centre(torch.tensor([[256, 512]]))
            tensor([[ 16., 144., 240., 368.]])
        """
        if self.crop in ("padded", "none"):
            return self.whole(sizes)
        height, width = _checked(sizes)
        if self.crop == "window":
            half = torch.full_like(height, 0.5)
            return crops.window(height, width, self.size, self.resize, half, half)
        side = torch.minimum(height, width) / self.test_ratio
        return crops.box((height - side) / 2, (width - side) / 2, side, side)

    def whole(self, sizes: Tensor) -> Tensor:
        """The crops that squeeze whole images to the square, as class activation maps need them.

        Args:
            sizes: Heights and widths of the images, [B, 2]; on any device.

        Returns:
            float32 [B, 4]: (0, 0, H, W), on the device of sizes.

        Raises:
            ValueError: If sizes is not [B, 2].

        Example:
            >>> Augmentation(224).whole(torch.tensor([[30, 40]]))
            tensor([[ 0.,  0., 30., 40.]])
        """
        height, width = _checked(sizes)
        zero = torch.zeros_like(height)
        return crops.box(zero, zero, height, width)

    def pixels(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Changes a training batch's pixels: jitter, AutoAugment, then Cutout.

        Args:
            images: uint8 [B, 3, h, w]; not written to.
            generator: A CPU generator.

        Returns:
            uint8 [B, 3, h, w], channels_last.

        Raises:
            ValueError: If images are not uint8 [B, 3, h, w].

        Example:
            >>> images = torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)
            >>> plain = Augmentation(4, brightness=0.0)
            >>> torch.equal(plain.pixels(images, torch.Generator()), images)
            True
        """
        images = pixel_rows(images).permute(0, 3, 1, 2)
        count, _, height, width = images.shape
        return self._program(count, height, width, generator).run(images)

    def program(self, count: int, generator: torch.Generator) -> ops.PixelProgram:
        """Draws what `pixels` does to a batch, for `fastcil.ops.read_batch` to do as it reads.

        Args:
            count: Number of images, B, of side `size`.
            generator: A CPU generator.

        Returns:
            The program, on the CPU.

        Example:
            >>> Augmentation.cifar(cutout=16).program(2, torch.Generator()).operations
            tensor([[ 7, 11],
                    [ 7, 11]], dtype=torch.int8)
        """
        return self._program(count, self.size, self.size, generator)

    def _program(
        self, count: int, height: int, width: int, generator: torch.Generator
    ) -> ops.PixelProgram:
        """Brightness, contrast and saturation, then AutoAugment, as FOSTER has it; then Cutout."""
        program = ops.PixelProgram.empty(count)
        jitter = {"brightness": self.brightness, "contrast": self.contrast}
        for name, most in (jitter | {"colour": self.saturation}).items():
            if most > 0:
                luck = torch.rand(count, generator=generator, dtype=torch.float64)
                program = program.then(ops.PixelProgram.of(name, 1 + most * (2 * luck - 1)))
        if self.policy != "none":
            plan = autoaugment.draw(count, self.policy, generator)
            program = program.then(plan.program(height, width))
        if self.cutout > 0:
            y = torch.randint(height, (count,), generator=generator)
            x = torch.randint(width, (count,), generator=generator)
            side = torch.full_like(y, self.cutout)
            program = program.then(ops.PixelProgram.of("cutout", y, x, side))
        return program

    def normalise(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Makes bytes the network's input: (v / 255 - mean) / std; see `fastcil.ops.normalise`.

        Args:
            images: uint8 [B, 3, h, w].
            dtype: float32, bfloat16 or float16.

        Returns:
            dtype [B, 3, h, w], channels_last.

        Raises:
            ValueError: If images are not uint8 [B, 3, h, w], or dtype is another.

        Example:
            >>> augmentation = Augmentation(1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
            >>> augmentation.normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten()
            tensor([-1., -1., -1.])
        """
        return ops.normalise(images, self.mean, self.std, dtype)
