"""What says how probable symbols are: the entropy model, and its prior of one latent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcil.compression.coder import SymbolDecoder, SymbolEncoder
from fastcil.compression.factorised import FactorisedDensity
from fastcil.compression.gaussian import SigmaTable
from fastcil.compression.tables import Tables


class Prior(Protocol):
    """What the entropy model says of one latent before it is known."""

    @property
    def mean(self) -> Tensor:
        """Symbols count from here: z = symbol + mean, [B, C, h, w]."""

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Natural logarithm of each symbol's probability, of z's shape."""

    def index(self) -> Tensor | None:
        """Row of the latent's tables that codes each symbol: uint8, of the mean's shape.

        None where no table does, but the prior itself codes: see `CodingPrior`.
        """


@runtime_checkable
class CodingPrior(Prior, Protocol):
    """A prior whose probabilities need the symbols before, so that it codes them in its order."""

    def encode(self, symbols: NDArray[np.int32], encoder: SymbolEncoder) -> None:
        """Appends the symbols of one image, int32 [N], row-major."""

    def decode(self, decoder: SymbolDecoder) -> NDArray[np.int32]:
        """The symbols of one image, int32 [N], row-major."""


class EntropyModel(nn.Module, ABC):
    """The part that says how probable symbols are: latent by latent, from those before it.

    A walk is ``state = start(...)``, then for each latent ``state, prior = ahead(i, state, e)``
    and, its values being known, ``feature, state = advance(i, state, z, e)``.
    """

    table: SigmaTable

    @abstractmethod
    def start(self, batch: int, height: int, width: int) -> Tensor:
        """The state before the first latent, for padded sides."""

    @abstractmethod
    def ahead(self, i: int, state: Tensor, embedding: Tensor | None) -> tuple[Tensor, Prior]:
        """The state that the encoder sees, and the prior of latent i."""

    @abstractmethod
    def advance(
        self, i: int, state: Tensor, z: Tensor, embedding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the decoder gets with latent i, and the next state."""

    @abstractmethod
    def tables(self, i: int) -> Tables:
        """Integer tables of latent i, whose rows the indices of its prior name.

        Raises:
            FastcilError: There are none: its prior codes by itself.
        """

    def table_digest(self, i: int) -> bytes:
        """SHA-256 of all integers by which latent i is coded."""
        return self.tables(i).digest

    def densities(self) -> list[FactorisedDensity]:
        """Parts whose tables are learned, and kept once they are made."""
        return [part for part in self.modules() if isinstance(part, FactorisedDensity)]
