"""The entropy model of a Gaussian mixture with a context model, and how it codes in waves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcil.compression.coder import SymbolDecoder, SymbolEncoder
from fastcil.compression.conditioning import ConditionedSequence, with_affine
from fastcil.compression.entropy_model import EntropyModel, Prior
from fastcil.compression.factorised import Factorised, FactorisedDensity
from fastcil.compression.gaussian import SigmaTable, bounded_log_sigma, log_likelihood
from fastcil.compression.mixture_coding import (
    HIGH,
    LEVELS,
    LOW,
    MEAN_STEPS,
    WEIGHT_BITS,
    IntegerMixture,
    coding_digest,
    decode_mixture,
    encode_mixture,
)
from fastcil.compression.tables import Tables
from fastcil.errors import FastcilError

# Where a 5×5 convolution that sees only what precedes a position looks: rows, columns.
_BEFORE = [(k // 5 - 2, k % 5 - 2) for k in range(12)]
_LARGEST_MEAN = 1 << 18


class MaskedConv2d(nn.Conv2d):
    """A 5×5 convolution that sees only what precedes a position in raster order.

    (Van den Oord et al. 2016, mask A.)

    Example:
        >>> convolution = MaskedConv2d(1, 1)
        >>> x = torch.zeros(1, 1, 5, 5)
        >>> before = convolution(x)
        >>> x[0, 0, 2, 2] = 1
        >>> changed = (convolution(x) != before)[0, 0]
        >>> bool(changed[:2].any() | changed[2, :3].any())
        False
    """

    mask: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 5, padding=2)
        mask = torch.ones(25)
        mask[12:] = 0
        self.register_buffer("mask", mask.view(5, 5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """What the symbols before say [B, out, h, w]."""
        return self._conv_forward(x, self.weight * self.mask, self.bias)

    def at(self, framed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The same at some positions of one map that has two zeros more on each side.

        Args:
            framed: # [C, h + 4, w + 4]
            rows: Of the positions, int64 [P].
            columns: Of the positions, int64 [P].

        Returns:
            # [out, P]
        """
        seen = [framed[:, rows + 2 + dy, columns + 2 + dx] for dy, dx in _BEFORE]
        taps = self.weight.flatten(2)[..., : len(_BEFORE)]  # [out, C, 12]
        said = taps.flatten(1) @ torch.stack(seen, dim=1).flatten(0, 1)
        return said if self.bias is None else said + self.bias[:, None]


@dataclass(frozen=True)
class Mixture:
    """The prior of y: a mixture for each symbol, by the symbols before it.

    Real coding goes over the map in waves (Lu et al. 2019's idea for 3 × 3): position (r, c) needs
    rows above up to column c + 2, and so belongs to wave 3 r + c, which depends on earlier waves
    alone. Encoder and decoder compute the same waves with the same shapes, and round what the
    network says to a grid of integers; see `IntegerMixture`.

    Args:
        entropy: Computes the mixtures' parameters.
        state: What the hyper latent says.
        embedding: Of λ, or None.
        mean: Zeros: symbols are the integers themselves.
    """

    entropy: MixtureEntropy
    state: Tensor
    embedding: Tensor | None
    mean: Tensor

    def log_likelihood(self, z: Tensor) -> Tensor:
        r"""ln Σ_k w_k p(z; μ_k, σ_k) (Cheng et al. 2020)."""
        weights, means, raw = self.entropy.parameters_of(z, self.state, self.embedding)
        parts = log_likelihood(z[:, None], means, bounded_log_sigma(raw))  # [B, K, C, h, w]
        return torch.logsumexp(weights.log_softmax(1) + parts, dim=1)

    def index(self) -> None:
        """No table holds a mixture: this prior codes by itself."""
        return None

    def encode(self, symbols: NDArray[np.int32], encoder: SymbolEncoder) -> None:
        """Appends y of one image, int32 [C*h*w], wave after wave."""
        y = torch.from_numpy(symbols).view(self.mean.shape[1:])
        framed = self._framed()
        for rows, columns in _waves(*y.shape[1:]):
            values = y[:, rows, columns]
            encode_mixture(encoder, values.flatten().numpy(), self._mixture(framed, rows, columns))
            framed[:, rows + 2, columns + 2] = values.to(framed)

    def decode(self, decoder: SymbolDecoder) -> NDArray[np.int32]:
        """y of one image, int32 [C*h*w].

        Raises:
            BitstreamError: Bytes that no encoder wrote with these mixtures.
        """
        y = torch.empty(self.mean.shape[1:], dtype=torch.int32)
        framed = self._framed()
        for rows, columns in _waves(*y.shape[1:]):
            found = decode_mixture(decoder, self._mixture(framed, rows, columns))
            values = torch.from_numpy(found).view(len(y), len(rows))
            y[:, rows, columns] = values
            framed[:, rows + 2, columns + 2] = values.to(framed)
        return y.flatten().numpy()

    def _framed(self) -> Tensor:
        """Room for y with two zeros more on each side [C, h + 4, w + 4]."""
        _, channels, height, width = self.mean.shape
        return self.mean.new_zeros(channels, height + 4, width + 4)

    def _mixture(self, framed: Tensor, rows: Tensor, columns: Tensor) -> IntegerMixture:
        """The mixtures of all channels at some positions, in integers."""
        context = self.entropy.context.at(framed, rows, columns)  # [2C, P]
        both = torch.cat([context, self.state[0, :, rows, columns]])[None, :, None]
        stats = self.entropy.mixture_of(both, self.embedding, len(framed))
        weights, means, raw = (part[0].flatten(1) for part in stats)  # [K, C*P]
        shares = (weights.softmax(0) * 2**WEIGHT_BITS).round().long()
        heaviest = shares.argmax(0, keepdim=True)
        shares.scatter_add_(0, heaviest, (2**WEIGHT_BITS - shares.sum(0, keepdim=True)))
        steps = (means.clamp(-_LARGEST_MEAN, _LARGEST_MEAN) * MEAN_STEPS).round().long()
        levels = self.entropy.table.index(bounded_log_sigma(raw)).long()
        return IntegerMixture(shares.numpy(), steps.numpy(), levels.numpy())


class MixtureEntropy(EntropyModel):
    """A factorised prior of z; of y, a mixture by the hyper-synthesis and a masked convolution.

    Args:
        channels: N, those of z and of y.
        components: K, Gaussians of a symbol's mixture.
        width: Of the 1×1 convolutions that compute the mixtures.
        embedding: Size of the embeddings of λ; 0: none.
        synthesis: z to 2 N maps of y's size.
    """

    def __init__(
        self, channels: int, components: int, width: int, embedding: int, synthesis: nn.Module
    ) -> None:
        super().__init__()
        n = channels
        self.table = SigmaTable(LOW, HIGH, LEVELS)
        self.components = components
        self.bottleneck = FactorisedDensity(n)
        self.synthesis = synthesis
        self.context = MaskedConv2d(n, 2 * n)
        self.mixture = ConditionedSequence(
            [
                nn.Conv2d(4 * n, width, 1),
                *with_affine(nn.LeakyReLU(), width, embedding),
                nn.Conv2d(width, width, 1),
                *with_affine(nn.LeakyReLU(), width, embedding),
                nn.Conv2d(width, 3 * components * n, 1),
            ]
        )

    def start(self, batch: int, height: int, width: int) -> Tensor:
        """Zeros of z's shape."""
        n = self.context.in_channels
        return self.context.weight.new_zeros(batch, n, height // 64, width // 64)

    def ahead(self, i: int, state: Tensor, embedding: Tensor | None) -> tuple[Tensor, Prior]:
        """z by channel, then y by what z and the symbols before say."""
        if i == 0:
            return state, Factorised(self.bottleneck, state)
        mean = state.new_zeros(len(state), state.shape[1] // 2, *state.shape[2:])
        return state, Mixture(self, state, embedding, mean)

    def advance(
        self, i: int, state: Tensor, z: Tensor, embedding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """z through the hyper-synthesis."""
        return z, self.synthesis(z, embedding) if i == 0 else state

    def parameters_of(
        self, z: Tensor, state: Tensor, embedding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights before their softmax, means and raw log scales, [B, K, C, h, w] each."""
        both = torch.cat([self.context(z), state], dim=1)
        return self.mixture_of(both, embedding, z.shape[1])

    def mixture_of(
        self, both: Tensor, embedding: Tensor | None, channels: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `parameters_of`, from what context model and hyper-synthesis say [B, 4C, h, w]."""
        stats = self.mixture(both, embedding).unflatten(1, (3, self.components, channels))
        weights, means, raw = stats.unbind(1)
        return weights, means, raw

    def tables(self, i: int) -> Tables:
        """A table per channel for z; y has none, as its prior codes by itself."""
        if i:
            raise FastcilError("y has no tables; its prior codes each symbol by a mixture.")
        return self.bottleneck.tables()

    def table_digest(self, i: int) -> bytes:
        """Of z's tables, or of what mixtures are coded by."""
        return coding_digest() if i else super().table_digest(i)


def _waves(height: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of positions whose mixtures need earlier waves alone.

    Example:
        >>> [list(zip(rows.tolist(), columns.tolist())) for rows, columns in _waves(2, 4)][2:5]
        [[(0, 2)], [(0, 3), (1, 0)], [(1, 1)]]
    """
    for wave in range(width + 3 * (height - 1)):
        rows = torch.arange(max(0, -(-(wave - width + 1) // 3)), min(height - 1, wave // 3) + 1)
        yield rows, wave - 3 * rows
