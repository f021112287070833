"""A convolutional autoencoder of whole images, and its decoder as a row of numbers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcil.errors import FastcilError
from fastcil.nn.shares import in_shares


class ImageAutoencoder(nn.Module):
    """The autoencoder of EEC (Ayub and Wagner 2021; channels and kernels of their released code).

    Convolutions 3 x 3 to ``width`` channels (stride 2), ``width / 2`` (stride 2) and ``width / 4``,
    each with batch norm and ReLU, give the code; the decoder mirrors them by transposed
    convolutions, of which the last has a batch norm but no ReLU. At width 64 an image of 32 x 32
    pixels has a code of 16 x 8 x 8 = 1,024 numbers.

    Args:
        width: Channels of the widest maps, a multiple of 4.

    Raises:
        FastcilError: Another width.

    Example:
        >>> autoencoder = ImageAutoencoder(width=8)
        >>> images = torch.zeros(2, 3, 30, 30)
        >>> autoencoder.encode(images).shape, autoencoder(images).shape
        (torch.Size([2, 128]), torch.Size([2, 3, 30, 30]))
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        wide, middle, narrow = _channels(width)
        self.width = width
        self.encoder = nn.Sequential()
        for (inputs, outputs), stride in zip(
            pairwise((3, wide, middle, narrow)), (2, 2, 1), strict=True
        ):
            self.encoder.append(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))
            self.encoder.append(nn.BatchNorm2d(outputs))
            self.encoder.append(nn.ReLU(inplace=True))
        self.decoder = nn.Sequential()
        for inputs, outputs, stride in _layers(width):
            self.decoder.append(
                nn.ConvTranspose2d(inputs, outputs, 3, stride, 1, stride - 1, bias=False)
            )
            self.decoder.append(nn.BatchNorm2d(outputs))
            if outputs != 3:
                self.decoder.append(nn.ReLU(inplace=True))

    def encode(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> codes [B, D], D being ``code_length``."""
        return torch.flatten(in_shares(self.encoder, self.encoder, images), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> their reconstructions, of the same shape."""
        restored: Tensor = in_shares(self, self._restore, images)
        # Halving rounds up: what comes back may be larger by up to three rows and columns.
        return restored[:, :, : images.shape[2], : images.shape[3]]

    def _restore(self, images: Tensor) -> Tensor:
        restored: Tensor = self.decoder(self.encoder(images))
        return restored

    @torch.no_grad()
    def folded_decoder(self) -> Tensor:
        """The decoder as `decode` takes it, batch norms folded in, float [P].

        With W a layer's weights and mu, v, g, b the statistics, scale and shift of its norm, in
        evaluation mode g (W x - mu) / sqrt(v + eps) + b = (g W / sqrt(v + eps)) x + b - g mu /
        sqrt(v + eps).
        """
        parts = []
        modules = list(self.decoder)
        for layer, norm in pairwise(modules):
            if isinstance(norm, nn.BatchNorm2d):
                mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
                scale = norm.weight / (var + norm.eps).sqrt()  # [outputs]
                weight: Any = layer.weight
                parts.append((weight * scale[None, :, None, None]).reshape(-1))
                parts.append(norm.bias - scale * mean)
        return torch.cat(parts)


def decode(decoder: Tensor, codes: Tensor, width: int, size: int) -> Tensor:
    """Images of codes, by a decoder that `ImageAutoencoder.folded_decoder` gave.

    Args:
        decoder: Float [P], P being `decoder_length`.
        codes: Of the same dtype and device, [B, D].
        width: The autoencoder's.
        size: Side S of the images.

    Returns:
        Normalised images [B, 3, S, S].

    Example:
        >>> autoencoder = ImageAutoencoder(width=4).eval()
        >>> images = torch.rand(2, 3, 12, 12)
        >>> again = decode(autoencoder.folded_decoder(), autoencoder.encode(images), 4, 12)
        >>> torch.allclose(again, autoencoder(images), atol=1e-5)
        True
    """
    side = _code_side(size)
    maps = codes.reshape(len(codes), width // 4, side, side)
    start = 0
    for inputs, outputs, stride in _layers(width):
        end = start + inputs * outputs * 9
        weight = decoder[start:end].view(inputs, outputs, 3, 3)
        start = end + outputs
        maps = F.conv_transpose2d(maps, weight, decoder[end:start], stride, 1, stride - 1)
        if outputs != 3:
            maps = maps.relu()
    return maps[:, :, :size, :size]


def code_length(width: int, size: int) -> int:
    """Numbers in the code of an image of side ``size``.

    Example:
        >>> code_length(64, 32), code_length(64, 84)
        (1024, 7056)
    """
    return _channels(width)[2] * _code_side(size) ** 2


def decoder_length(width: int) -> int:
    """Numbers in a folded decoder.

    Example:
        >>> decoder_length(64)
        24867
    """
    return sum(inputs * outputs * 9 + outputs for inputs, outputs, _ in _layers(width))


def _channels(width: int) -> tuple[int, int, int]:
    """Channels after each convolution of the encoder."""
    if width < 4 or width % 4:
        raise FastcilError(f"width is {width}; it must be a multiple of 4, at least 4.")
    return width, width // 2, width // 4


def _layers(width: int) -> tuple[tuple[int, int, int], ...]:
    """Inputs, outputs and stride of the decoder's transposed convolutions."""
    wide, middle, narrow = _channels(width)
    return (narrow, middle, 2), (middle, wide, 2), (wide, 3, 1)


def _code_side(size: int) -> int:
    """Side of the code's maps: halved twice, rounded up."""
    return -(-size // 4)
