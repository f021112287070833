"""The Gaussian on integers: its likelihood, and the scales that real coding uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcil.compression.gaussian_tables import gaussian_tables
from fastcil.compression.tables import Tables

LOG_SIGMA_FLOOR = -2.3
SMALL_LIKELIHOOD = 1e-6
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class SigmaTable:
    r"""Scales at equal steps of their logarithm: a symbol is coded with the nearest one.

    .. math:: \log \sigma_k = \log \sigma_\min
        + k \, \frac{\log \sigma_\max - \log \sigma_\min}{K - 1}

    Scales instead of indices would have to agree to the last bit on both sides of a bitstream; an
    index only has to fall into the same bucket.

    Args:
        low: Smallest scale.
        high: Largest scale; larger ones are coded with it.
        levels: K, at most 256: an index is a uint8.

    Example:
        >>> table = SigmaTable()
        >>> sigmas = table.sigmas()
        >>> sigmas[[0, 63]]
        tensor([ 0.1100, 20.0000], dtype=torch.float64)
        >>> table.index(sigmas.log()).tolist() == list(range(64))
        True
    """

    low: float = 0.11
    high: float = 20.0
    levels: int = 64

    def sigmas(self) -> Tensor:
        """The scales, float64 [levels], ascending."""
        return self._grid(torch.arange(self.levels, dtype=torch.float64)).exp()

    def thresholds(self) -> Tensor:
        """Logarithms between which an index lies, halfway between the table's: [levels - 1]."""
        return self._grid(torch.arange(self.levels - 1, dtype=torch.float64) + 0.5)

    def index(self, log_sigma: Tensor) -> Tensor:
        """Index of the table's scale that is nearest in logarithm.

        Args:
            log_sigma: Any shape, floating.

        Returns:
            uint8 of the same shape.
        """
        bounds = self.thresholds().to(log_sigma)
        return torch.bucketize(log_sigma.contiguous(), bounds, out_int32=True).to(torch.uint8)

    def tables(self) -> Tables:
        """The integer tables of the scales, a row each."""
        return gaussian_tables(self.low, self.high, self.levels)

    def _grid(self, steps: Tensor) -> Tensor:
        """Logarithms at positions of the grid."""
        low, high = math.log(self.low), math.log(self.high)
        return low + steps * ((high - low) / (self.levels - 1))


SIGMAS = SigmaTable()
"""The table of the hierarchical models: 64 scales from 0.11 to 20."""


def bounded_log_sigma(raw: Tensor) -> Tensor:
    r"""Log scale of a network's output, with :math:`\sigma` above 0.1.

    .. math:: \log \sigma = \mathrm{softplus}(a + 2.3) - 2.3

    Near the identity for large a; a scale much below 0.1 would put the whole mass on one integer
    and leave no gradient.

    Example:
        >>> bounded_log_sigma(torch.tensor([-100.0, 4.0]))
        tensor([-2.3000,  4.0018])
    """
    return F.softplus(raw - LOG_SIGMA_FLOOR) + LOG_SIGMA_FLOOR


def log_likelihood(z: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    r"""Log mass of the unit interval around z under a Gaussian.

    .. math:: \log p(z) = \log\Big[\Phi\Big(\frac{z - \mu + 1/2}{\sigma}\Big)
        - \Phi\Big(\frac{z - \mu - 1/2}{\sigma}\Big)\Big]

    (Ballé et al. 2018; with a mean, Minnen et al. 2018). Where the mass is below 1e-6 the
    log density at z stands for it: finite everywhere, with a gradient that points back to the mean.

    Args:
        z: Values of a latent.
        mean: μ, of the same shape or one that broadcasts to it.
        log_sigma: log σ, likewise.

    Returns:
        Natural logarithms.

    Example:
        >>> zero = torch.zeros(())
        >>> log_likelihood(zero, zero, zero).exp()
        tensor(0.3829)
    """
    sigma = torch.exp(log_sigma)
    # Both ends on the lower tail, where differences of Φ keep their digits.
    away = -(z - mean).abs()
    mass = normal_cdf((away + 0.5) / sigma) - normal_cdf((away - 0.5) / sigma)
    density = -0.5 * (away / sigma) ** 2 - log_sigma - _HALF_LOG_TWO_PI
    # The clamp keeps the branch that is not taken from sending NaN back.
    return torch.where(mass < SMALL_LIKELIHOOD, density, mass.clamp_min(SMALL_LIKELIHOOD).log())


def normal_cdf(x: Tensor) -> Tensor:
    """Φ(x), accurate in the lower tail.

    Example:
        >>> normal_cdf(torch.zeros(()))
        tensor(0.5000)
    """
    return 0.5 * torch.erfc(x * -(2**-0.5))


@dataclass(frozen=True)
class Gaussian:
    """The prior of one latent: a Gaussian for each symbol.

    Args:
        mean: μ.  # [B, C, h, w]
        log_sigma: log σ, of the same shape.
        table: The scales that real coding uses.
    """

    mean: Tensor
    log_sigma: Tensor
    table: SigmaTable = SIGMAS

    def log_likelihood(self, z: Tensor) -> Tensor:
        """See :func:`log_likelihood`."""
        return log_likelihood(z, self.mean, self.log_sigma)

    def index(self) -> Tensor:
        """Row of the table that codes each symbol: uint8, of the mean's shape."""
        return self.table.index(self.log_sigma)
