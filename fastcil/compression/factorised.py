"""A learned density per channel, for latents of which nothing else is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcil.compression.gdn import floor
from fastcil.compression.tables import Tables
from fastcil.errors import FastcilError

_LEAST_LIKELIHOOD = 1e-9
_TAIL_MASS = 1e-9
_WIDEST = 1 << 13
_START_SCALE = 10.0
_PREFIX = "table_"
_BUFFERS = ("low", "slots", "frequencies")


class FactorisedDensity(nn.Module):
    r"""A cumulative distribution per channel, of any shape.

    .. math:: c = \sigma \circ f_K \circ \dots \circ f_1, \qquad
        f_k(x) = g_k\big(\mathrm{softplus}(H_k) x + b_k\big), \qquad
        g_k(x) = x + \tanh(a_k) \odot \tanh(x)

    (Ballé et al. 2018, *Variational image compression with a scale hyperprior*, appendix 6.1)
    with no g after the last. Symbols are rounded to integers, not to a learned median, so there
    are no quantiles to train beside it.

    Real coding takes integer tables. The densities are floating, and processors that round
    otherwise would make other tables of them, so that these are made once (`make_tables`) and from
    then on are buffers of the module, saved and loaded with its weights.

    Args:
        channels: C, at most 256: the index of a symbol's table is its channel, a uint8.
        widths: Hidden sizes of f_1 ... f_{K-1}.

    Raises:
        FastcilError: More than 256 channels.

    Example:
        >>> density = FactorisedDensity(4)
        >>> density.log_likelihood(torch.zeros(2, 4, 3, 3)).shape
        torch.Size([2, 4, 3, 3])
    """

    def __init__(self, channels: int, widths: tuple[int, ...] = (3, 3, 3)) -> None:
        super().__init__()
        if channels > 256:
            raise FastcilError(f"channels is {channels}; a hyper latent may have at most 256.")
        sizes = (1, *widths, 1)
        # So that the densities start about ten integers wide.
        scale = _START_SCALE ** (1 / len(sizes[1:]))
        self.matrices, self.biases, self.gates = (nn.ParameterList() for _ in range(3))
        for inner, outer in pairwise(sizes):
            start = math.log(math.expm1(1 / scale / outer))
            self.matrices.append(nn.Parameter(torch.full((channels, outer, inner), start)))
            self.biases.append(nn.Parameter(torch.rand(channels, outer, 1) - 0.5))
        for size in widths:
            self.gates.append(nn.Parameter(torch.zeros(channels, size, 1)))
        for name in _BUFFERS:
            self.register_buffer(_PREFIX + name, torch.zeros(0, dtype=torch.int32))

    def logits(self, x: Tensor) -> Tensor:
        """Logit of the cumulative distribution.

        Args:
            x: # [C, N]

        Returns:
            # [C, N]
        """
        y = x[:, None]  # [C, 1, N]
        for k, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            y = F.softplus(matrix) @ y + bias
            if k < len(self.gates):
                y = y + torch.tanh(self.gates[k]) * torch.tanh(y)
        return y[:, 0]

    def log_likelihood(self, z: Tensor) -> Tensor:
        """Log mass of the unit interval around z, at least ln 1e-9.

        Args:
            z: # [B, C, h, w]
        """
        x = z.transpose(0, 1).flatten(1)  # [C, B*h*w]
        upper, lower = self.logits(x + 0.5), self.logits(x - 0.5)
        # Both on the lower tail, where differences of the sigmoid keep their digits.
        sign = -torch.sign(upper + lower).detach()
        mass = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
        shape = (z.shape[1], z.shape[0], *z.shape[2:])
        return floor(mass, _LEAST_LIKELIHOOD).log().view(shape).transpose(0, 1)

    @property
    def has_tables(self) -> bool:
        """Whether the tables have been made."""
        return bool(self.get_buffer(_PREFIX + "slots").numel())

    def tables(self) -> Tables:
        """The tables that were made, one per channel.

        Raises:
            FastcilError: None were, or what is kept is none.
        """
        if not self.has_tables:
            raise FastcilError("the codec has no tables yet; make them by its update().")
        kept = {name: self.get_buffer(_PREFIX + name).cpu().numpy() for name in _BUFFERS}
        return Tables.from_state(kept)

    def make_tables(self) -> bool:
        """Makes tables of the densities as they are, and keeps them.

        Returns:
            Whether they are others than those kept before.
        """
        made = self.computed_tables()
        if self.has_tables and self.tables() == made:
            return False
        self._keep(made.state())
        return True

    def forget_tables(self) -> None:
        """Lets tables go, as those of other densities than are about to be learned."""
        self._keep({name: torch.zeros(0, dtype=torch.int32) for name in _BUFFERS})

    @torch.no_grad()
    def computed_tables(self) -> Tables:
        """Tables of the densities as they are: the integers that hold 1 - 1e-9 of each's mass."""
        reach = 32
        while True:
            symbols = torch.arange(-reach, reach + 1, device=self.biases[0].device)
            edges = torch.cat([symbols - 0.5, symbols[-1:] + 0.5]).to(self.biases[0])
            logits = self.logits(edges.expand(len(self.biases[0]), -1).contiguous())
            below = torch.sigmoid(logits).cummax(dim=1).values  # [C, S + 1]
            above = torch.sigmoid(-logits)
            held = (below[:, 0] <= _TAIL_MASS / 2) & (above[:, -1] <= _TAIL_MASS / 2)
            if bool(held.all()) or reach >= _WIDEST:
                break
            reach *= 2
        # Without the symbols that lie wholly in a tail; one at least stays.
        first = ((below <= _TAIL_MASS / 2).sum(1) - 1).clamp(0, 2 * reach).tolist()
        last = (2 * reach + 1 - (above <= _TAIL_MASS / 2).sum(1) + 1).clamp(1, 2 * reach + 1)
        ends = [max(a + 1, b) for a, b in zip(first, last.tolist(), strict=True)]
        cdf = below.double().cpu().numpy()
        rows = [row[a : b + 1] for row, a, b in zip(cdf, first, ends, strict=True)]
        return Tables.from_cdf([a - reach for a in first], rows)

    def _keep(self, arrays: Mapping[str, Any]) -> None:
        """Puts arrays into the buffers, whatever their sizes."""
        for name, array in arrays.items():
            device = self.biases[0].device
            kept = torch.as_tensor(array, dtype=torch.int32).to(device, copy=True)
            setattr(self, _PREFIX + name, kept)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """As in torch, but tables may have any size."""
        for name in _BUFFERS:
            given = state_dict.get(f"{prefix}{_PREFIX}{name}")
            if isinstance(given, Tensor) and given.ndim == 1:
                self._keep({name: torch.zeros_like(given, device="cpu")})
        super()._load_from_state_dict(state_dict, prefix, *rest)


def is_table(name: str) -> bool:
    """Whether a name in a ``state_dict`` is one of tables, whose size is not the structure's.

    Example:
        >>> is_table("entropy.bottleneck.table_low"), is_table("entropy.bottleneck.biases.0")
        (True, False)
    """
    return name.rpartition(".")[2].startswith(_PREFIX)


@dataclass(frozen=True)
class Factorised:
    """The prior of a latent whose symbols are independent of everything but their channel.

    Args:
        density: The channels' densities.
        mean: Zeros: symbols are the integers themselves.  # [B, C, h, w]
    """

    density: FactorisedDensity
    mean: Tensor

    def log_likelihood(self, z: Tensor) -> Tensor:
        """See `FactorisedDensity.log_likelihood`."""
        return self.density.log_likelihood(z)

    def index(self) -> Tensor:
        """The channel of each symbol: uint8."""
        channels = torch.arange(self.mean.shape[1], dtype=torch.uint8, device=self.mean.device)
        return channels[None, :, None, None].expand(self.mean.shape).contiguous()
