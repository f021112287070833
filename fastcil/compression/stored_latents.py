"""Latents that bitstreams hold: what can be replayed where nothing but files is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastcil.compression.bitstream import Bitstream
from fastcil.compression.codec import ImageCodec
from fastcil.errors import FastcilError


@dataclass(frozen=True, eq=False)
class StoredLatents:
    """Latents of streams of any sizes, packed, of which windows are drawn.

    A window begins at a multiple of what the model downsamples by, so that the latents of all
    strides are cut at one place. They are held as float32, some 6.6 bytes per pixel of the
    published model's.

    Args:
        rows: Of each latent, float32 [sum of h*w, C]: stream after stream, row-major.
        sizes: Heights and widths of the padded images, int64 [N, 2].
        rates: λ of each stream, float32 [N].
        strides: Of each latent.
        multiple: What sizes and windows are multiples of.

    Example:
        >>> from fastcil.compression.zoo import build_codec
        >>> codec = ImageCodec(build_codec("hierarchical-tiny"))
        >>> photo = torch.zeros(70, 128, 3, dtype=torch.uint8)
        >>> stored = StoredLatents.decode(codec, codec.encode_streams([photo], 64.0))
        >>> latents, rates = stored.draw(2, 64, torch.Generator())
        >>> [list(z.shape) for z in latents], rates.tolist()
        ([[2, 16, 1, 1], [2, 16, 2, 2], [2, 16, 4, 4], [2, 8, 8, 8]], [64.0, 64.0])
    """

    rows: tuple[Tensor, ...]
    sizes: Tensor
    rates: Tensor
    strides: tuple[int, ...]
    multiple: int

    @classmethod
    def decode(cls, codec: ImageCodec, streams: Sequence[Bitstream]) -> StoredLatents:
        """The latents of streams; no pixels are made.

        Args:
            codec: With the entropy model that they were coded with.
            streams: The streams.

        Raises:
            BitstreamError: As `ImageCodec.decode_streams`.
            FastcilError: No stream.
        """
        if not streams:
            raise FastcilError("streams is empty; give one at least.")
        model = codec.model
        sizes = torch.tensor([model.padded(s.height, s.width) for s in streams])
        found = cls((), sizes, torch.empty(0), model.latent_strides, model.multiple)
        starts = [found.starts(stride).tolist() for stride in found.strides]
        rows = tuple(
            torch.empty(int((sizes // stride).prod(1).sum()), channels)
            for channels, stride in zip(model.latent_channels, found.strides, strict=True)
        )
        for places, latents in codec.latents_of_streams(streams):
            for buffer, begin, z in zip(rows, starts, latents, strict=True):
                values = z.permute(0, 2, 3, 1).flatten(1, 2)  # [B, h*w, C]
                for place, value in zip(places, values, strict=True):
                    buffer[begin[place] : begin[place] + len(value)] = value
        rates = torch.tensor([stream.head.lmbda for stream in streams])
        return cls(rows, sizes, rates, found.strides, found.multiple)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of the latents."""
        return sum(rows.nbytes for rows in self.rows)

    @cached_property
    def least(self) -> int:
        """The shortest side of all padded images: windows can't be larger."""
        return int(self.sizes.min())

    def starts(self, stride: int) -> Tensor:
        """First row of each stream's latent at a stride, int64 [N]."""
        counts = (self.sizes // stride).prod(1)
        return counts.cumsum(0) - counts

    def draw(
        self, count: int, side: int, generator: torch.Generator
    ) -> tuple[list[Tensor], Tensor]:
        """Windows of streams drawn independently, each place of a stream equally likely.

        Args:
            count: B.
            side: S of the windows in pixels, a multiple of ``multiple``, at most ``least``.
            generator: A CPU generator.

        Returns:
            z of each latent, channels_last, [B, C, S / stride, S / stride] each; and λ [B].

        Raises:
            FastcilError: A side that isn't one.
        """
        if side % self.multiple or not 0 < side <= self.least:
            raise FastcilError(
                f"side is {side}; it must be a multiple of {self.multiple} up to {self.least}, the "
                f"shortest side of the stored images."
            )
        which = torch.randint(len(self), (count,), generator=generator)
        places = (self.sizes[which] - side) // self.multiple + 1  # [B, 2]
        luck = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        corner = (luck * places).long() * self.multiple
        latents = []
        for rows, stride in zip(self.rows, self.strides, strict=True):
            steps = torch.arange(side // stride)
            y, x = ((corner // stride)[:, :, None] + steps).unbind(1)  # [B, S / stride]
            width = self.sizes[which, 1] // stride
            first = self.starts(stride)[which]
            at = (first[:, None] + y * width[:, None])[:, :, None] + x[:, None]
            latents.append(rows[at].permute(0, 3, 1, 2))
        return latents, self.rates[which]
