"""The small backbone of the tests whose subject is something else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class ConvNet(nn.Module):
    """A 3 x 3 convolution of stride 2, batch norm and a ReLU module for each of ``widths``."""

    def __init__(self, widths: Sequence[int] = (4, 6)) -> None:
        super().__init__()
        self.out_channels = widths[-1]
        self.layers = nn.Sequential()
        for inputs, outputs in pairwise((3, *widths)):
            self.layers.append(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False))
            self.layers.append(nn.BatchNorm2d(outputs))
            self.layers.append(nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.layers(images)
        return maps

    def levels(self, images: Tensor) -> list[Tensor]:
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]

    @property
    def stem(self) -> nn.Module:
        return nn.Identity()

    @property
    def stages(self) -> nn.ModuleList:
        starts = range(0, len(self.layers), 3)
        return nn.ModuleList(self.layers[start : start + 3] for start in starts)
