"""Residual networks (He et al. 2016) as feature extractors.

ResNet-18 has four stages and projects its shortcuts where the size changes (option B); the CIFAR
networks ResNet-20 and ResNet-32 have three narrow ones, and shortcuts without weights (option A).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.nn.folding import conv_norm

Stem = Literal["imagenet", "small", "cifar"]
"""How a network begins: 7x7 stride 2 and max-pool (size / 4), 3x3 stride 2 (size / 2), or 3x3."""

STEMS: tuple[Stem, ...] = ("imagenet", "small", "cifar")


class PaddedShortcut(nn.Module):
    """Every stride-th pixel, and zeros for the additional channels, appended (option A)."""

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C + extra, h / stride, w / stride]."""
        kept = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(kept, (0, 0, 0, 0, 0, self.extra_channels))


class ConvNorm(nn.Sequential):
    """A convolution, its batch norm, and what follows, by `conv_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h', w']."""
        if len(self) < 2:  # a slice
            result: Tensor = super().forward(x)
            return result
        conv, norm, *rest = self
        x = conv_norm(conv, norm, x)
        for part in rest:
            x = part(x)
        return x


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return ConvNorm(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: y = relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)).

    Args:
        in_channels: Channels of x.
        out_channels: Channels of y.
        stride: Of the first convolution.
        projected: Whether a shortcut that changes the size has a 1x1 convolution (option B).
        last_relu: Whether the block ends with its ReLU.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, projected: bool, last_relu: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if projected and (stride != 1 or in_channels != out_channels):
            self.shortcut = _projection(in_channels, out_channels, stride)
        elif stride != 1 or in_channels != out_channels:
            self.shortcut = PaddedShortcut(out_channels - in_channels, stride)
        self.relu2: nn.Module = nn.ReLU(inplace=True) if last_relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h / stride, w / stride]."""
        y = self.relu1(conv_norm(self.conv1, self.bn1, x))
        y = conv_norm(self.conv2, self.bn2, y) + self.shortcut(x)
        result: Tensor = self.relu2(y)
        return result


def _stem(kind: str, width: int) -> ConvNorm:
    """First convolution, batch norm and ReLU, with a max-pool for "imagenet"."""
    if kind not in STEMS:
        raise FastcilError(f"stem is {kind!r}; it must be one of {', '.join(STEMS)}.")
    kernel, stride = {"imagenet": (7, 2), "small": (3, 2), "cifar": (3, 1)}[kind]
    stem = ConvNorm(
        nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )
    if kind == "imagenet":
        stem.append(nn.MaxPool2d(3, 2, 1))
    return stem


class ResNet(nn.Module):
    """Stem and stages of basic blocks, without pooling and classifier.

    Each stage but the first halves the resolution and doubles the channels. Convolutions start
    normal with variance 2 / fan-out (He et al. 2015), drawn from torch's global generator. Every
    activation is an ``nn.ReLU`` module of its own.

    Args:
        blocks: Blocks in each stage.
        width: Channels of the first stage.
        stem: "imagenet", "small" or "cifar".
        projected: Shortcuts with a 1x1 convolution where the size changes (option B) rather than
            zero padding (option A).
        last_relu: Whether the last block ends with its ReLU; LUCIR and PODNet leave it out.
        zero_init_residual: Whether the last batch norm of each block starts at zero.

    Attributes:
        out_channels: Channels C of the feature maps.

    Raises:
        FastcilError: If the width is below 1 or the stem unknown.

    Example:
        >>> import torch
        >>> network = ResNet((1, 1), width=8, stem="cifar")
        >>> [tuple(level.shape) for level in network.levels(torch.zeros(2, 3, 8, 8))]
        [(2, 8, 8, 8), (2, 16, 4, 4)]
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        stem: Stem,
        projected: bool = True,
        last_relu: bool = True,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        if width < 1:
            raise FastcilError(f"width is {width}; a network needs at least 1 channel.")
        self.stem = _stem(stem, width)
        self.stages = nn.ModuleList()
        channels = width
        for number, depth in enumerate(blocks):
            wanted = width * 2**number
            stage = nn.Sequential()
            for place in range(depth):
                ends = number == len(blocks) - 1 and place == depth - 1
                stride = 2 if number > 0 and place == 0 else 1
                stage.append(BasicBlock(channels, wanted, stride, projected, last_relu or not ends))
                channels = wanted
            self.stages.append(stage)
        self.out_channels = channels
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> feature maps [B, C, h, w]."""
        return self.levels(images)[-1]

    def levels(self, images: Tensor) -> list[Tensor]:
        """The map after each stage, the last one being what ``forward`` returns."""
        x = self.stem(images)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels

    @staticmethod
    def own_name(name: str) -> str:
        """What a parameter or buffer is called here that torchvision's ResNets name so.

        Args:
            name: Its name there; one that is none of theirs comes back as it is.

        Example:
            >>> ResNet.own_name("layer2.0.downsample.0.weight"), ResNet.own_name("bn1.bias")
            ('stages.1.0.shortcut.0.weight', 'stem.1.bias')
        """
        stage = re.fullmatch(r"layer(\d+)\.(\d+\..+)", name)
        if stage is not None:
            rest = stage[2].replace(".downsample.", ".shortcut.")
            return f"stages.{int(stage[1]) - 1}.{rest}"
        return re.sub(r"^bn1\.", "stem.1.", re.sub(r"^conv1\.", "stem.0.", name))


def resnet18(
    width: int = 64,
    stem: Stem = "imagenet",
    last_relu: bool = True,
    zero_init_residual: bool = False,
) -> ResNet:
    """ResNet-18 (He et al. 2016, Table 1): four stages of two blocks, 8 * width channels.

    Args:
        width: Channels of the first stage.
        stem: "imagenet" for 224 pixels; "cifar" (3x3, no pooling) for 32; "small" (3x3, stride 2,
            no pooling) for what lies between.
        last_relu: Whether the last block ends with its ReLU.
        zero_init_residual: Whether the last batch norm of each block starts at zero.

    Example:
        >>> network = resnet18(width=8, stem="cifar")
        >>> network.out_channels, sum(isinstance(m, nn.ReLU) for m in network.modules())
        (64, 17)
    """
    return ResNet((2, 2, 2, 2), width, stem, True, last_relu, zero_init_residual)


def resnet32(
    width: int = 16, stem: Stem = "cifar", last_relu: bool = True, zero_init_residual: bool = False
) -> ResNet:
    """ResNet-32 for CIFAR (He et al. 2016, Sec. 4.2): three stages of five blocks, 4 * width.

    Shortcuts are zero-padded (option A), as most class-incremental baselines have them.

    Args:
        width: Channels of the first stage.
        stem: "cifar" (3x3) for 32 pixels; "small" or "imagenet" for larger images.
        last_relu: Whether the last block ends with its ReLU.
        zero_init_residual: Whether the last batch norm of each block starts at zero.

    Example:
        >>> import torch
        >>> resnet32(width=4)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 16, 8, 8])
    """
    return ResNet((5, 5, 5), width, stem, False, last_relu, zero_init_residual)


def resnet20(
    width: int = 16, stem: Stem = "cifar", last_relu: bool = True, zero_init_residual: bool = False
) -> ResNet:
    """ResNet-20 for CIFAR (He et al. 2016, Sec. 4.2): ``resnet32`` with three blocks a stage.

    Args:
        width: Channels of the first stage.
        stem: As in ``resnet32``.
        last_relu: Whether the last block ends with its ReLU.
        zero_init_residual: Whether the last batch norm of each block starts at zero.

    Example:
        >>> resnet20(width=4).out_channels
        16
    """
    return ResNet((3, 3, 3), width, stem, False, last_relu, zero_init_residual)
