"""Differentiable masks over the channels of a residual network, by which it learns how wide to be.

The masks of DER (Yan et al. 2021, Sec. 3.3), adapted there from hard attention to the task (HAT,
Serra et al. 2018). What is masked out in the end, `fastcil.nn.pruning` removes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastcil.errors import FastcilError
from fastcil.nn.resnet import BasicBlock, ResNet

_START = 1.0
_COLOURS = 3


class ChannelMask(nn.Module):
    r"""Multiplies each channel of a map by a number between 0 and 1.

    .. math:: f' = f \odot m, \qquad m = \sigma(s\, e)

    (Yan et al. 2021, Eqs. 5, 6), with a parameter e per channel and a scale s that sharpens all
    masks alike. The derivative of m is taken as :math:`\sigma'(e)`, without s: the paper's
    compensated gradient (Eq. 8), :math:`g'_e = g_e \, \sigma'(e) / (s\, \sigma'(s e))`, which is
    what is left of the chain rule when its vanishing factor is divided out.

    Args:
        channels: C.
        scale: s to begin with.

    Attributes:
        logits: e, a parameter that starts at 1: every channel on.  # [C]
        scale: s, a buffer.  # []

    Example:
        >>> mask = ChannelMask(2, scale=100.0)
        >>> mask(torch.full((1, 2, 1, 1), 3.0)).flatten()
        tensor([3., 3.], grad_fn=<ViewBackward0>)
    """

    scale: Tensor

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((channels,), _START))
        self.register_buffer("scale", torch.tensor(float(scale)))

    def values(self) -> Tensor:
        """The mask m, [C]."""
        slope = self.logits.sigmoid()
        return (self.scale * self.logits).sigmoid().detach() + (slope - slope.detach())

    def kept(self) -> Tensor:
        """The channels that are on, int64 [n], ascending; the one nearest to it if none is."""
        on = self.logits > 0
        on[self.logits.argmax()] = True
        return on.nonzero().flatten()

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        return maps * self.values().to(maps.dtype)[:, None, None]


class Layer(NamedTuple):
    """A convolution with its batch norm, and the maps that it stands between.

    Maps are numbered in the order of `MaskedResNet.masks`; -1 is the image.
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    reads: int
    writes: int


def blocks(body: ResNet) -> Iterator[BasicBlock]:
    """The blocks of a residual network, from the input on."""
    for stage in body.stages:
        yield from cast("nn.Sequential", stage)  # type: ignore[misc]


def layers(body: ResNet) -> list[Layer]:
    """The convolutions of a residual network, masked or not, with the maps they read and write.

    The maps are the stem's output, and for each block the one between its convolutions and its
    output. A block's second convolution and its shortcut write the same one.
    """
    stem = cast("tuple[nn.Conv2d, nn.BatchNorm2d]", tuple(body.stem)[:2])
    found = [Layer(*stem, reads=-1, writes=0)]
    for place, block in enumerate(blocks(body)):
        before, between, after = 2 * place, 2 * place + 1, 2 * place + 2
        found.append(Layer(block.conv1, block.bn1, before, between))
        found.append(Layer(block.conv2, block.bn2, between, after))
        if isinstance(block.shortcut, nn.Sequential):
            projection = cast("tuple[nn.Conv2d, nn.BatchNorm2d]", tuple(block.shortcut))
            found.append(Layer(*projection, before, after))
    return found


class MaskedResNet(nn.Module):
    """A residual network with a mask after its stem, within and after each block.

    A map is masked for all that read it, shortcuts included, so that a channel that is off is
    neither computed by the convolution before nor read by those behind.

    Args:
        body: The network, as it is before masking; it is changed in place.
        scale: The scale s that all masks begin with.

    Raises:
        FastcilError: ``body`` is no ResNet of fastcil's.

    Example:
        >>> from fastcil.nn import resnet20
        >>> network = MaskedResNet(resnet20(width=4), scale=400.0)
        >>> network(torch.zeros(2, 3, 8, 8)).shape, len(network.masks)
        (torch.Size([2, 16, 2, 2]), 19)
        >>> network.used()
        tensor(1., grad_fn=<DivBackward0>)
    """

    kind = "masked"

    def __init__(self, body: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.body = as_resnet(body)
        self._add(self.body.stem, layers(self.body)[0].conv.out_channels, scale)
        for block in blocks(self.body):
            for name, conv in (("relu1", block.conv1), ("relu2", block.conv2)):
                setattr(block, name, nn.Sequential(getattr(block, name)))
                self._add(getattr(block, name), conv.out_channels, scale)

    def _add(self, sequence: nn.Sequential, channels: int, scale: float) -> None:
        like = next(self.body.parameters())
        sequence.append(ChannelMask(channels, scale).to(like.device, like.dtype))

    @property
    def masks(self) -> list[ChannelMask]:
        """All masks, from the input on."""
        return [part for part in self.body.modules() if isinstance(part, ChannelMask)]

    @property
    def out_channels(self) -> int:
        """Channels of the feature maps."""
        return self.body.out_channels

    def set_scale(self, scale: Tensor) -> None:
        """Gives every mask the scale s, a tensor [] beside the masks."""
        with torch.no_grad():
            for mask in self.masks:
                mask.scale.copy_(scale)

    def used(self) -> Tensor:
        r"""The share of the convolutions' weights that the masks leave in use.

        .. math:: L_S = \frac{\sum_l K_l \, \|m_{l-1}\|_1 \|m_l\|_1}{\sum_l K_l \, c_{l-1} c_l}

        (Yan et al. 2021, Eq. 9), over the convolutions l, with K the positions of a kernel, c
        numbers of channels, :math:`m_{l-1}` the mask of the map that l reads, all ones for the
        image, and :math:`m_l` of the one it writes.
        """
        sizes = [mask.values().sum() for mask in self.masks]
        used, everything = [], 0
        for conv, _, reads, writes in layers(self.body):
            area = conv.kernel_size[0] * conv.kernel_size[1]
            inputs = float(_COLOURS) if reads < 0 else sizes[reads]
            used.append(area * inputs * sizes[writes])
            everything += conv.weight.numel()
        return torch.stack(used).sum() / everything

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> feature maps [B, C, h, w]."""
        maps: Tensor = self.body(images)
        return maps

    def levels(self, images: Tensor) -> list[Tensor]:
        """The map after each stage."""
        return self.body.levels(images)

    def structure(self) -> dict[str, Any]:
        """What ``build`` needs beside a backbone; JSON-able."""
        return {"kind": self.kind}

    @classmethod
    def build(
        cls, structure: Mapping[str, Any], make_backbone: Callable[[], nn.Module]
    ) -> MaskedResNet:
        """A masked network of a backbone, with arbitrary values, to be loaded."""
        return cls(make_backbone())


def without_masks(body: ResNet) -> ResNet:
    """Takes the masks out of the body of a `MaskedResNet`, in place."""
    del body.stem[-1]
    for block in blocks(body):
        block.relu1 = cast("nn.Sequential", block.relu1)[0]  # type: ignore[assignment]
        block.relu2 = cast("nn.Sequential", block.relu2)[0]
    return body


def as_resnet(backbone: nn.Module) -> ResNet:
    """The backbone, if its channels can be masked and pruned.

    Raises:
        FastcilError: It is no ResNet of fastcil's.
    """
    if not isinstance(backbone, ResNet):
        raise FastcilError(
            f"backbone is a {type(backbone).__name__}, whose channels can't be masked and pruned; "
            f"use resnet18, resnet20 or resnet32, or leave masks out."
        )
    return backbone
