"""The walk of real coding: latent by latent, with the entropy model computed in one fixed mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcil.compression.coder import SymbolDecoder, SymbolEncoder
from fastcil.compression.entropy_model import CodingPrior, Prior
from fastcil.compression.fixed import fixed_mode, laid_out
from fastcil.compression.tables import Tables
from fastcil.errors import FastcilError

if TYPE_CHECKING:
    from fastcil.compression.model import CodecModel


class Phases:
    """One coding of images of one size, by both sides of a bitstream.

    For each latent in turn, ``mean, index = prior(i)``; the encoder asks ``quantise(i, features)``
    for the symbols and ``write``s them, the decoder ``read``s them, with the row ``index`` of
    ``tables(i)``; both ``feed(i, symbols)``. After the last, ``image()`` reconstructs.

    The entropy model is a copy on the CPU in the model's ``entropy_dtype``, and sees one image at a
    time on one thread (`fixed_mode`): means and indices depend on nothing but the symbols, λ, the
    weights, the machine and the versions. The copy is made once for weights as they are
    (`CodecModel.fixed_entropy`). The encoder's and the decoder's parts run as a batch where the
    model lies; they choose symbols and pixels, never probabilities.

    What decides probabilities is integers: tables, which are stored, and an index of each symbol's
    table, which is where a floating log scale falls among thresholds. In float64 a processor that
    rounds otherwise moves it by some 5e-15 (measured: PyTorch's AVX2 against its plain kernels),
    and thresholds are 0.03 to 0.12 apart, so that of 10^12 symbols about one would get another
    table there. A stream's check notices that, and the stream is refused. In float32 it moves by
    some 3e-6, which one symbol in 10^4 notices: such streams are for one kind of machine.

    Args:
        model: In evaluation or training mode, which makes no difference.
        height, width: Sides of the images.
        lmbda: One λ, or one per image.  # [B]
        batch: Number of images.

    Raises:
        FastcilError: Sides or batch below 1, or a λ that isn't positive.

    Example:
        >>> from fastcil.compression.zoo import build_codec
        >>> model = build_codec("hierarchical-tiny")
        >>> features = model.features(torch.rand(1, 3, 64, 64), 100.0)
        >>> phases = Phases(model, 64, 64, lmbda=100.0)
        >>> for i in range(phases.count):
        ...     mean, index = phases.prior(i)
        ...     phases.feed(i, phases.quantise(i, features))
        >>> phases.image().shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(
        self, model: CodecModel, height: int, width: int, lmbda: float | Tensor, batch: int = 1
    ) -> None:
        if height < 1 or width < 1 or batch < 1:
            raise FastcilError(
                f"height, width and batch are {height}, {width} and {batch}; each must be at least "
                f"1."
            )
        self.count = len(model.latent_names)
        self.shapes = model.latent_shapes(height, width)
        self._model, self._size = model, (height, width)
        self._lmbda = model.rates(lmbda, batch, "cpu")
        self._dtype = model.entropy_dtype
        self._device = next(model.decoder.parameters()).device
        self._next = 0
        self._tables: dict[int, Tables] = {}
        self._latents: list[Tensor] = []
        self._read: list[Tensor] = []
        self._prior: tuple[Tensor, Tensor | None] | None = None
        self._priors: list[Prior] = []
        with fixed_mode():
            fixed = model.fixed_entropy()
            self._entropy, self._digest = fixed.entropy, fixed.digest
            embedding: list[Tensor | None] = [None] * batch
            if fixed.embedding is not None:
                # The λ of a bitstream is a float32; its embedding is of the fixed dtype.
                embedding = [fixed.embedding(rate.to(self._dtype)[None]) for rate in self._lmbda]
            self._embedding = embedding
            padded = model.padded(height, width)
            self._states = [self._entropy.start(1, *padded) for _ in range(batch)]

    @property
    def latents(self) -> tuple[Tensor, ...]:
        """z of the latents fed so far, in the fixed dtype on the CPU, [B, C, h, w] each."""
        return tuple(self._latents)

    @property
    def digests(self) -> tuple[bytes, ...]:
        """SHA-256 of the entropy model, and of the tables of each latent."""
        tables = (self._entropy.table_digest(i) for i in range(self.count))
        return (bytes.fromhex(self._digest), *tables)

    def tables(self, i: int) -> Tables:
        """Integer tables of latent i: symbol s at index t is coded with row t."""
        if i not in self._tables:
            self._tables[i] = self._entropy.tables(i)
        return self._tables[i]

    def prior(self, i: int) -> tuple[Tensor, Tensor | None]:
        """What is known of latent i from the latents before it.

        Returns:
            mean, of the fixed dtype, and index uint8, on the CPU; no index where symbols have no
            tables but one probability after the other.  # [B, C, h, w] each
        """
        self._expect("prior", i)
        if self._prior is None:
            with fixed_mode():
                pairs = [
                    self._entropy.ahead(i, state, embedding)
                    for state, embedding in zip(self._states, self._embedding, strict=True)
                ]
                self._states = [state for state, _ in pairs]
                self._priors = [prior for _, prior in pairs]
                mean = torch.cat([laid_out(prior.mean, self._dtype) for prior in self._priors])
                rows = [row for prior in self._priors if (row := prior.index()) is not None]
                self._prior = mean, torch.cat(rows) if rows else None
        return self._prior

    def write(self, i: int, b: int, symbols: NDArray[np.int32], encoder: SymbolEncoder) -> None:
        """Appends the symbols of one image's latent.

        Args:
            i: The latent, after its ``prior`` and before it is fed.
            b: The image.
            symbols: int32 [N], row-major.
            encoder: Of that image.
        """
        row = self._row(i, b)
        if row is None:
            with fixed_mode():
                self._coding(b).encode(symbols, encoder)
        else:
            encoder.encode(symbols, row, self.tables(i))

    def read(self, i: int, b: int, decoder: SymbolDecoder) -> NDArray[np.int32]:
        """The symbols of one image's latent that `write` appended, int32 [N].

        Raises:
            BitstreamError: Bytes that no encoder wrote with these probabilities.
        """
        row = self._row(i, b)
        if row is None:
            with fixed_mode():
                return self._coding(b).decode(decoder)
        return decoder.decode(row, self.tables(i))

    @torch.no_grad()
    def quantise(self, i: int, features: Sequence[Tensor]) -> Tensor:
        """Symbols of latent i: round(q - mean).

        Args:
            i: The latent, after its ``prior``.
            features: What ``model.features`` gave of the images.

        Returns:
            int32 on the CPU.  # [B, C, h, w]
        """
        mean, _ = self.prior(i)
        device, dtype = features[i].device, features[i].dtype
        state = torch.cat(self._states).to(device, dtype)
        embedding = self._model.embed("encoder", self._lmbda.to(device))
        q = self._model.posterior(i, features, state, embedding)
        # Beyond the range of an int32 the cast would be undefined; no table gets near it.
        symbols = (q.to("cpu", self._dtype) - mean).round().clamp(-(2.0**30), 2.0**30)
        return symbols.to(torch.int32)

    def feed(self, i: int, symbols: Tensor) -> None:
        """Takes latent i's symbols: z = symbols + mean.

        Args:
            i: The latent, after its ``prior``.
            symbols: Integers.  # [B, C, h, w]

        Raises:
            FastcilError: Symbols of another shape or dtype, or out of turn.
        """
        mean, _ = self.prior(i)
        if symbols.shape != mean.shape or symbols.is_floating_point():
            raise FastcilError(
                f"symbols is {symbols.dtype} of shape {list(symbols.shape)}; latent {i} takes "
                f"integers of shape {list(mean.shape)}."
            )
        with fixed_mode():
            z = laid_out(symbols, self._dtype) + mean
            pairs = [
                self._entropy.advance(i, state, laid_out(z[b : b + 1], self._dtype), embedding)
                for b, (state, embedding) in enumerate(
                    zip(self._states, self._embedding, strict=True)
                )
            ]
        self._latents.append(z)
        self._read.append(torch.cat([feature for feature, _ in pairs]))
        self._states = [state for _, state in pairs]
        self._prior = None
        self._next += 1

    @torch.no_grad()
    def image(self) -> Tensor:
        """The images, in 0..1, where the model lies [B, 3, H, W].

        Raises:
            FastcilError: Not every latent has been fed.
        """
        if self._next < self.count:
            raise FastcilError(f"image needs all {self.count} latents; {self._next} are fed.")
        latents = [z.to(self._device, torch.float32) for z in self._latents]
        read = [feature.to(self._device, torch.float32) for feature in self._read]
        # The same pixels whatever precision the caller computes in.
        with torch.autocast(self._device.type, enabled=False):
            padded = self._model.decode(latents, read, self._lmbda.to(self._device))
        height, width = self._size
        return padded[..., :height, :width].clamp(0, 1)

    def _row(self, i: int, b: int) -> NDArray[np.uint8] | None:
        """The tables of one image's symbols [N], or None where there are none."""
        index = self.prior(i)[1]
        return None if index is None else index[b].flatten().numpy()

    def _coding(self, b: int) -> CodingPrior:
        """The prior that codes one image's symbols by itself."""
        prior = self._priors[b]
        assert isinstance(prior, CodingPrior)
        return prior

    def _expect(self, name: str, i: int) -> None:
        """Raises unless it is latent i's turn."""
        if i != self._next:
            raise FastcilError(f"{name} is asked for latent {i}; the next one is {self._next}.")
