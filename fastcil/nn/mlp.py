"""A multilayer perceptron as a feature extractor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcil.errors import FastcilError


class MLP(nn.Module):
    """Fully connected layers with ReLUs on an image's pixels; its maps are of one position.

    Layers start as ``nn.Linear`` does, drawn from torch's global generator: without batch norm a
    start by He et al. (2015) is too sharply curved for the learning rates of residual networks.
    Every activation is an ``nn.ReLU`` module of its own.

    Args:
        image_size: Side S of the images, the only ones that it reads.
        width: Units of each hidden layer.
        depth: Hidden layers.

    Attributes:
        out_channels: Channels C of the maps, ``width``.

    Raises:
        FastcilError: If one of them is below 1.

    Example:
        >>> network = MLP(image_size=28, width=16)
        >>> [tuple(level.shape) for level in network.levels(torch.zeros(2, 3, 28, 28))]
        [(2, 16, 1, 1), (2, 16, 1, 1)]
    """

    def __init__(self, image_size: int, width: int, depth: int = 2) -> None:
        super().__init__()
        for name, value in (("image_size", image_size), ("width", width), ("depth", depth)):
            if value < 1:
                raise FastcilError(f"{name} is {value}; it must be at least 1.")
        self.layers = nn.ModuleList()
        inputs = 3 * image_size * image_size
        for _ in range(depth):
            self.layers.append(nn.Sequential(nn.Linear(inputs, width), nn.ReLU(inplace=True)))
            inputs = width
        self.out_channels = width

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> feature maps [B, C, 1, 1]."""
        return self.levels(images)[-1]

    def levels(self, images: Tensor) -> list[Tensor]:
        """What each hidden layer gives, the last one being what ``forward`` returns."""
        x = torch.flatten(images, 1)
        levels = []
        for layer in self.layers:
            x = layer(x)
            levels.append(x[:, :, None, None])
        return levels


def mlp(width: int = 256, image_size: int | None = None, depth: int = 2) -> MLP:
    """A multilayer perceptron, such as Shon et al. (2022, Fig. 3) train on MNIST.

    They don't tell its size; this one's is ours.

    Args:
        width: Units of each hidden layer.
        image_size: Side of the images.
        depth: Hidden layers.

    Raises:
        FastcilError: If ``image_size`` is None, or a number is below 1.

    Example:
        >>> mlp(image_size=28).out_channels
        256
    """
    if image_size is None:
        raise FastcilError("image_size is None; an mlp reads images of one size: pass their side.")
    return MLP(image_size, width, depth)
