"""Images to bytes and back: a model, the range coder and the container together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcil.compression.bitstream import (
    HASH_NBYTES,
    MAX_PIXELS,
    Bitstream,
    Head,
    check_size,
    symbol_check,
)
from fastcil.compression.coder import SymbolDecoder, SymbolEncoder
from fastcil.compression.errors import BitstreamError
from fastcil.compression.model import CodecModel
from fastcil.compression.phases import Phases
from fastcil.errors import FastcilError

# Padded pixels that go through the networks at once: 32 images of 256 x 256.
_BATCH_PIXELS = 1 << 21


class ImageCodec:
    """A learned codec that really codes: 8-bit RGB images to bytes and back.

    A stream can be decoded as long as the model's entropy model and its tables are those that it
    was coded with, whatever became of encoder and decoder; the stream names them by a hash, and
    others are refused. Probabilities are computed on the CPU in one fixed mode (`Phases`), and
    every stream carries a check of its symbols, because that is no promise for another machine or
    another version of PyTorch: there, a stream decodes to its symbols or is refused.

    Args:
        model: The model, on any device.
        max_pixels: Larger images are refused, in coding and in decoding, as time and memory are
            proportional to the size. A stream that claims a larger image than its bytes can hold is
            refused at the latent where they end, which is mostly the first and smallest; but an
            image of one colour may have few bytes, whatever its size.

    Example:
        >>> from fastcil.compression.zoo import build_codec
        >>> codec = ImageCodec(build_codec("hierarchical-tiny"))
        >>> data = codec.encode(torch.zeros(48, 70, 3, dtype=torch.uint8), lmbda=64.0)
        >>> codec.verify(data)
        >>> codec.decode(data).shape
        torch.Size([48, 70, 3])
    """

    def __init__(self, model: CodecModel, max_pixels: int = MAX_PIXELS) -> None:
        self.model = model
        self.max_pixels = max_pixels

    @property
    def entropy_hash(self) -> bytes:
        """What streams name: 8 bytes of the SHA-256 of entropy model and tables as they are now."""
        # Of any size and rate: tables are the same for all.
        return _hash(self.model.begin(1, 1, 1.0))

    def encode(self, image: Tensor | NDArray[np.uint8], lmbda: float) -> bytes:
        """The file of an image.

        Args:
            image: uint8 [H, W, 3], RGB.
            lmbda: Trade-off; larger means more bits and less distortion.

        Raises:
            TypeError: An image that is not uint8.
            FastcilError: An image of another shape or too large, or a lambda not positive.
        """
        return self.encode_streams([image], lmbda)[0].pack()

    def decode(self, data: bytes) -> Tensor:
        """The image in a file.

        Args:
            data: The file's bytes, from anywhere.

        Returns:
            uint8 [H, W, 3], RGB, on the CPU.

        Raises:
            BitstreamError: As in `Bitstream.parse`; a stream of another entropy model; or one whose
                symbols are not those that were coded.
        """
        return self.decode_streams([Bitstream.parse(data, self.max_pixels)])[0]

    def verify(self, data: bytes) -> None:
        """Decode a file's symbols and compare them with the encoder's, without making pixels of it.

        To be called before the raw image is given up, and on old files after an update.

        Raises:
            BitstreamError: As in `decode`.
        """
        self.verify_streams([Bitstream.parse(data, self.max_pixels)])

    @torch.no_grad()
    def encode_streams(
        self, images: Sequence[Tensor | NDArray[np.uint8]], lmbda: float
    ) -> list[Bitstream]:
        """Streams of some images; those of one size go through the networks together.

        Args:
            images: uint8 [H, W, 3] each, RGB.
            lmbda: Trade-off of all.

        Raises:
            TypeError: As in `encode`.
            FastcilError: As in `encode`.
        """
        pictures = [self._picture(image) for image in images]
        sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
        rate = Head(bytes(HASH_NBYTES), lmbda).lmbda
        streams: dict[int, Bitstream] = {}
        for (height, width), chosen in self._batches(sizes):
            phases = self.model.begin(height, width, rate, len(chosen))
            head = Head(_hash(phases), rate)
            device = next(self.model.parameters()).device
            batch = torch.stack([pictures[k] for k in chosen]).to(device)  # [B, H, W, 3]
            features = self.model.features(batch.permute(0, 3, 1, 2).float() / 255, rate)
            encoders = [SymbolEncoder() for _ in chosen]
            latents: list[NDArray[np.int32]] = []
            for i in range(phases.count):
                symbols = phases.quantise(i, features)
                latents.append(symbols.flatten(1).numpy())  # [B, N]
                for b, encoder in enumerate(encoders):
                    phases.write(i, b, latents[-1][b], encoder)
                phases.feed(i, symbols)
            for b, k in enumerate(chosen):
                check = symbol_check(head, height, width, [latent[b] for latent in latents])
                streams[k] = Bitstream(head, height, width, check, encoders[b].finish())
        return [streams[k] for k in range(len(pictures))]

    def decode_streams(self, streams: Sequence[Bitstream]) -> list[Tensor]:
        """Images of some streams; those of one size go through the networks together.

        Args:
            streams: The streams.

        Returns:
            uint8 [H, W, 3] each, RGB, on the CPU.

        Raises:
            BitstreamError: As in `decode`, for any of them, naming its place.
        """
        images: dict[int, Tensor] = {}
        for chosen, phases in self._decoded(streams):
            pixels = (phases.image() * 255).round().to("cpu", torch.uint8)  # [B, 3, H, W]
            for k, image in zip(chosen, pixels.permute(0, 2, 3, 1), strict=True):
                images[k] = image.contiguous()
        return [images[k] for k in range(len(streams))]

    def verify_streams(self, streams: Sequence[Bitstream]) -> None:
        """`verify` for some streams.

        Raises:
            BitstreamError: As in `decode_streams`.
        """
        for _ in self._decoded(streams):
            pass

    def latents_of_streams(
        self, streams: Sequence[Bitstream]
    ) -> Iterator[tuple[list[int], tuple[Tensor, ...]]]:
        """Latents of some streams, without making pixels of them.

        Yields:
            Places of streams of one size, and their z of each latent: float32 on the CPU,
            [B, C, h, w] each.

        Raises:
            BitstreamError: As in `decode_streams`.
        """
        for chosen, phases in self._decoded(streams):
            yield chosen, tuple(z.float() for z in phases.latents)

    def _decoded(self, streams: Sequence[Bitstream]) -> Iterator[tuple[list[int], Phases]]:
        """Places of streams, and the phases that have been fed their symbols."""
        for (height, width), chosen in self._batches([(s.height, s.width) for s in streams]):
            batch = [streams[k] for k in chosen]
            rates = torch.tensor([stream.head.lmbda for stream in batch])
            phases = self.model.begin(height, width, rates, len(batch))
            known = _hash(phases)
            for k in chosen:
                try:
                    streams[k].check_hash(known)
                except BitstreamError as error:
                    raise _at(k, len(streams), str(error)) from error
            decoders = [SymbolDecoder(stream.payload) for stream in batch]
            latents: list[NDArray[np.int32]] = []
            for i in range(phases.count):
                shape = phases.shapes[i]
                symbols = np.empty((len(batch), math.prod(shape)), np.int32)
                for b, decoder in enumerate(decoders):
                    try:
                        symbols[b] = phases.read(i, b, decoder)
                    except BitstreamError as error:
                        raise _at(chosen[b], len(streams), str(error)) from error
                phases.feed(i, torch.from_numpy(symbols).view(len(batch), *shape))
                latents.append(symbols)
            for b, (k, stream) in enumerate(zip(chosen, batch, strict=True)):
                rows = [latent[b] for latent in latents]
                if symbol_check(stream.head, height, width, rows) != stream.check:
                    raise _at(k, len(streams), _DRIFTED)
            yield chosen, phases

    def _batches(
        self, sizes: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, int], list[int]]]:
        """Positions of images of one size, as many as go through the networks at once."""
        groups: dict[tuple[int, int], list[int]] = {}
        for k, (height, width) in enumerate(sizes):
            if height * width > self.max_pixels:
                raise FastcilError(
                    f"The image has {height} x {width} pixels; the codec takes up to "
                    f"{self.max_pixels} (max_pixels)."
                )
            groups.setdefault((height, width), []).append(k)
        for size, members in groups.items():
            high, wide = self.model.padded(*size)
            count = max(_BATCH_PIXELS // (high * wide), 1)
            for start in range(0, len(members), count):
                yield size, members[start : start + count]

    def _picture(self, image: Any) -> Tensor:
        """An image as a tensor."""
        picture = torch.as_tensor(image)
        if picture.dtype != torch.uint8:
            raise TypeError(f"image is {picture.dtype}; it must be uint8.")
        if picture.ndim != 3 or picture.shape[2] != 3:
            raise FastcilError(f"image has shape {list(picture.shape)}; it must be [H, W, 3], RGB.")
        check_size(*picture.shape[:2])
        return picture


_DRIFTED = (
    "The decoded symbols are not those that were coded: the payload is damaged, or this machine "
    "or version of PyTorch rounds otherwise than that of the encoder."
)


def _hash(phases: Phases) -> bytes:
    """The hash of an entropy model and its tables."""
    return hashlib.sha256(b"".join(phases.digests)).digest()[:HASH_NBYTES]


def _at(position: int, count: int, sentence: str) -> BitstreamError:
    """The error of one stream, which says its place where there are several."""
    place = f"streams[{position}]: " if count > 1 else ""
    return BitstreamError(place + sentence)
