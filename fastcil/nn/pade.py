"""A learnable activation: a rational function that starts as a usual one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcil import ops
from fastcil.errors import FastcilError
from fastcil.nn.rational import fit_rational
from fastcil.ops.pade import MOST, VERSIONS

Coefficients = tuple[tuple[float, ...], tuple[float, ...]]

INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "identity": torch.clone,
}

# fit_rational(torch.relu, (5, 4), "A", (-3, 3)), kept so that all runs start from the same bits;
# tests/nn/test_pade.py fits them again.
_RELU_5_4_A = (
    (
        0.029967597722,
        0.616990704888,
        2.372987286658,
        3.058671231210,
        1.518767211718,
        0.251436265829,
    ),
    (1.190752408889, 4.397182939786, 0.907627365034, 0.346941462048),
)


def _fit(
    function: Callable[[Tensor], Tensor], degrees: tuple[int, int], version: str
) -> Coefficients:
    # Noise has no part in the fit.
    fit = fit_rational(function, degrees, "B" if version == "D" else version)
    return tuple(fit.numerator.tolist()), tuple(fit.denominator.tolist())


@lru_cache
def _fit_named(init: str, degrees: tuple[int, int], version: str) -> Coefficients:
    if (init, degrees, version) == ("relu", (5, 4), "A"):
        return _RELU_5_4_A
    return _fit(INITS[init], degrees, version)


class Pade(nn.Module):
    r"""A Padé activation unit: a rational function whose coefficients are learned.

    .. math:: f(x) = \frac{a_0 + a_1 x + \dots + a_m x^m}{Q(x)}, \qquad
        Q(x) = 1 + \sum_{k=1}^n |b_k x^k|

    (Molina et al. 2020, Eq. 1; Q as in the code of Luo et al. 2023, version A of
    ``fastcil.ops.pade``, which lists the others.) It starts as the least-squares fit to a function
    on [-3, 3]: at degrees (5, 4) and version A it is within 0.030 of ReLU there (the maximum, at 0;
    0.0051 root mean square). Beyond, it is a straight line in the limit, of slope a_5 / abs(b_4) =
    0.72 on both sides.

    Args:
        degrees: m of the numerator and n of the denominator, up to (8, 8).
        version: Form of the denominator: "A", "B", "C", "D" or "nonsafe". The noise of "D" is for
            training: in evaluation it is "B".
        init: What to start as: "relu", "leaky_relu" (of slope 0.01), "gelu", "silu", "tanh",
            "identity", or any function, float64 [points] -> [points].
        groups: Number G of groups of channels with coefficients of their own; channel c of C
            belongs to group c // (C / G).

    Attributes:
        numerator: a_0 ... a_m.  # [m + 1], or [G, m + 1] if G > 1
        denominator: b_1 ... b_n.  # [n], or [G, n] if G > 1

    Raises:
        FastcilError: If ``init``, ``degrees``, ``version`` or ``groups`` is none of these.

    Example:
        >>> activation = Pade()
        >>> x = torch.linspace(-3, 3, 601)
        >>> bool((activation(x) - x.relu()).abs().max() < 0.0301)
        True
        >>> Pade((3, 2), "B", init="silu", groups=4).numerator.shape
        torch.Size([4, 4])
    """

    def __init__(
        self,
        degrees: tuple[int, int] = (5, 4),
        version: str = "A",
        init: str | Callable[[Tensor], Tensor] = "relu",
        groups: int = 1,
    ) -> None:
        super().__init__()
        m, n = degrees
        if not (0 <= m <= MOST and 1 <= n <= MOST):
            raise FastcilError(f"degrees is {degrees}; it must be from (0, 1) to ({MOST}, {MOST}).")
        if version not in VERSIONS:
            raise FastcilError(f"version is {version!r}; it must be one of {', '.join(VERSIONS)}.")
        if groups < 1:
            raise FastcilError(f"groups is {groups}; there must be at least 1.")
        if callable(init):
            numerator, denominator = _fit(init, (m, n), version)
        elif init in INITS:
            numerator, denominator = _fit_named(init, (m, n), version)
        else:
            names = ", ".join(INITS)
            raise FastcilError(f"init is {init!r}; it must be one of {names}, or a function.")
        self.version = version
        rows = (1,) if groups == 1 else (groups, 1)
        self.numerator = nn.Parameter(torch.tensor(numerator).repeat(rows))
        self.denominator = nn.Parameter(torch.tensor(denominator).repeat(rows))

    @property
    def degrees(self) -> tuple[int, int]:
        """The degrees m and n of numerator and denominator."""
        return self.numerator.shape[-1] - 1, self.denominator.shape[-1]

    @property
    def groups(self) -> int:
        """The number of groups of channels."""
        return len(self.numerator) if self.numerator.dim() == 2 else 1

    def forward(self, x: Tensor) -> Tensor:
        """Applies f to every element of x: any shape, [B, C, ...] with groups."""
        version = "B" if self.version == "D" and not self.training else self.version
        return ops.pade(x, self.numerator, self.denominator, version)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"degrees={self.degrees}, version={self.version}{groups}"
