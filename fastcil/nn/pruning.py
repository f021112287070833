"""Residual networks whose channels were removed for good, and that are as small as they look."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcil.nn.channel_masks import MaskedResNet, as_resnet, blocks, layers, without_masks
from fastcil.nn.resnet import ResNet


class Rewired(nn.Module):
    """A shortcut without weights between two maps of which some channels are gone.

    Args:
        index: For each channel of the result the one it is copied from; one past the last of the
            input's for a channel of zeros.  # int64 [C']
        inputs: Channels C of the input.
        stride: Of the pixels taken.
    """

    index: Tensor

    def __init__(self, index: Tensor, stride: int) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h / stride, w / stride]."""
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, self.index)


class PrunedResNet(nn.Module):
    """A residual network reduced to some channels of each of its maps.

    Its convolutions, batch norms and projections have the shapes that are left, so that its
    parameters take that much memory and time. It computes what the network computed with the other
    channels of these maps set to zero (Yan et al. 2021, Sec. 3.3).

    Args:
        body: A whole network; it is changed in place.
        kept: For each map, in the order of `MaskedResNet.masks`, the channels that stay,
            ascending.  # int64 [n]

    Raises:
        FastcilError: ``body`` is no ResNet of fastcil's.

    Example:
        >>> from fastcil.nn import resnet20
        >>> whole = MaskedResNet(resnet20(width=4), scale=400.0)
        >>> half = [torch.arange(len(mask.logits) // 2) for mask in whole.masks]
        >>> small = PrunedResNet(resnet20(width=4), half)
        >>> small(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 8, 2, 2])
        >>> sum(p.numel() for p in small.body.stages[0][0].conv1.parameters())  # of 4 * 4 * 9
        36
    """

    kind = "pruned"

    def __init__(self, body: nn.Module, kept: Sequence[Tensor]) -> None:
        super().__init__()
        self.body = as_resnet(body)
        self.places = len(kept)
        device = next(self.body.parameters()).device
        for number, channels in enumerate(kept):
            self.register_buffer(f"kept{number}", channels.to(device))
        _shrink(self.body, self.kept)
        self.body.out_channels = len(kept[-1])

    @property
    def kept(self) -> list[Tensor]:
        """The channels left of each map, as the whole network counts them, int64 [n] each."""
        return [getattr(self, f"kept{number}") for number in range(self.places)]

    @property
    def out_channels(self) -> int:
        """Channels of the feature maps."""
        return self.body.out_channels

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> feature maps [B, C, h, w]."""
        maps: Tensor = self.body(images)
        return maps

    def levels(self, images: Tensor) -> list[Tensor]:
        """The map after each stage."""
        return self.body.levels(images)

    def unpruned(self, whole: nn.Module) -> ResNet:
        """A network of the whole shape that starts from this one.

        Args:
            whole: A fresh network of the shape before pruning; what is left of the old one is
                written into it, and the channels that were removed keep its values.

        Returns:
            ``whole``.
        """
        body, kept = as_resnet(whole), self.kept
        with torch.no_grad():
            for own, fresh in zip(layers(self.body), layers(body), strict=True):
                outputs = kept[own.writes]
                inputs = torch.arange(own.conv.in_channels, device=outputs.device)
                inputs = inputs if own.reads < 0 else kept[own.reads]
                fresh.conv.weight[outputs[:, None], inputs] = own.conv.weight
                state = own.norm.state_dict()
                for name, value in fresh.norm.state_dict().items():
                    if value.ndim:
                        value[outputs] = state[name]
        return body

    def structure(self) -> dict[str, Any]:
        """What ``build`` needs beside a backbone; JSON-able."""
        return {"kind": self.kind, "channels": [len(channels) for channels in self.kept]}

    @classmethod
    def build(
        cls, structure: Mapping[str, Any], make_backbone: Callable[[], nn.Module]
    ) -> PrunedResNet:
        """A network of that structure with arbitrary values, to be loaded."""
        return cls(make_backbone(), [torch.arange(count) for count in structure["channels"]])


def prune(masked: MaskedResNet) -> PrunedResNet:
    """Removes the channels whose masks are off; those that are on count as 1.

    Args:
        masked: The network; it stays as it is.

    Example:
        >>> from fastcil.nn import resnet20
        >>> masked = MaskedResNet(resnet20(width=4), scale=400.0)
        >>> _ = masked.masks[-1].logits.data[3:].fill_(-1.0)
        >>> prune(masked).out_channels
        3
    """
    kept = [mask.kept() for mask in masked.masks]
    return PrunedResNet(without_masks(copy.deepcopy(masked.body)), kept)


def _shrink(body: ResNet, kept: Sequence[Tensor]) -> None:
    """Reduces every layer to the channels that it reads and writes."""
    for place, block in enumerate(blocks(body)):
        if not isinstance(block.shortcut, nn.Sequential):
            stride = getattr(block.shortcut, "stride", 1)
            index = _sources(kept[2 * place], kept[2 * place + 2], block.conv2.out_channels)
            block.shortcut = Rewired(index, stride)
    for conv, norm, reads, writes in layers(body):
        outputs = kept[writes]
        weight = conv.weight.detach()[outputs]
        if reads >= 0:
            weight = weight[:, kept[reads]]
        if conv.weight.is_contiguous(memory_format=torch.channels_last):
            weight = weight.contiguous(memory_format=torch.channels_last)
        conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        conv.out_channels, conv.in_channels = weight.shape[:2]
        for name in ("weight", "bias"):
            value = getattr(norm, name)
            smaller = nn.Parameter(value.detach()[outputs], requires_grad=value.requires_grad)
            setattr(norm, name, smaller)
        for name in ("running_mean", "running_var"):
            setattr(norm, name, getattr(norm, name)[outputs])
        norm.num_features = len(outputs)


def _sources(inputs: Tensor, outputs: Tensor, channels: int) -> Tensor:
    """Where among ``inputs`` each of ``outputs`` lies; ``len(inputs)`` where it does not."""
    place = torch.full((channels,), len(inputs), device=inputs.device)
    place[inputs] = torch.arange(len(inputs), device=inputs.device)
    return place[outputs]
