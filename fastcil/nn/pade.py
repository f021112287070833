"""Learnable activations, and a second branch of a network that differs in nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from fastcil import ops
from fastcil.errors import FastcilError
from fastcil.nn.rational import fit_rational

# fit_rational(torch.relu, (5, 4), "A", (-3, 3)), so that a network of many activations is built at
# once; tests/nn/test_pade.py fits them again.
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


@lru_cache
def _relu_coefficients(
    degrees: tuple[int, int], version: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if degrees == (5, 4) and version == "A":
        return _RELU_5_4_A
    fit = fit_rational(torch.relu, degrees, version)
    return tuple(fit.numerator.tolist()), tuple(fit.denominator.tolist())


class Pade(nn.Module):
    r"""A Padé activation unit: a rational function whose coefficients are learned.

    .. math:: f(x) = \frac{a_0 + a_1 x + \dots + a_m x^m}{Q(x)}, \qquad
        Q(x) = 1 + \sum_{k=1}^n |b_k x^k|

    (Molina et al. 2020, Eq. 1; Q as in the code of Luo et al. 2023, version A of
    ``fastcil.ops.pade``.) It starts as the least-squares fit to a function on [-3, 3]: at degrees
    (5, 4) and version A it is within 0.030 of ReLU there (the maximum, at 0; 0.0051 root mean
    square). Beyond, it is a straight line in the limit, of slope a_5 / abs(b_4) = 0.72 on both
    sides.

    Args:
        degrees: m of the numerator, n of the denominator.
        version: Form of the denominator, "A", "B", "C" or "nonsafe".
        init: "relu", or any function to start as, float64 [points] -> [points].

    Attributes:
        numerator: a_0 ... a_m.  # [m + 1]
        denominator: b_1 ... b_n.  # [n]

    Raises:
        FastcilError: If ``init``, ``degrees`` or ``version`` is none of these.

    Example:
        >>> activation = Pade()
        >>> x = torch.linspace(-3, 3, 601)
        >>> bool((activation(x) - x.relu()).abs().max() < 0.0301)
        True
    """

    def __init__(
        self,
        degrees: tuple[int, int] = (5, 4),
        version: str = "A",
        init: str | Callable[[Tensor], Tensor] = "relu",
    ) -> None:
        super().__init__()
        numerator: tuple[float, ...]
        denominator: tuple[float, ...]
        if callable(init):
            fit = fit_rational(init, degrees, version)
            numerator, denominator = tuple(fit.numerator.tolist()), tuple(fit.denominator.tolist())
        elif init == "relu":
            numerator, denominator = _relu_coefficients(tuple(degrees), version)
        else:
            raise FastcilError(f"init is {init!r}; it must be 'relu' or a function.")
        self.version = version
        self.numerator = nn.Parameter(torch.tensor(numerator))
        self.denominator = nn.Parameter(torch.tensor(denominator))

    @property
    def degrees(self) -> tuple[int, int]:
        """The degrees m and n of numerator and denominator."""
        return len(self.numerator) - 1, len(self.denominator)

    def forward(self, x: Tensor) -> Tensor:
        """Applies f to every element."""
        return ops.pade(x, self.numerator, self.denominator, self.version)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"degrees={self.degrees}, version={self.version}"


def share_with_pade(
    module: nn.Module,
    activation: type[nn.Module] | tuple[type[nn.Module], ...] = nn.ReLU,
    degrees: tuple[int, int] = (5, 4),
    version: str = "A",
) -> nn.Module:
    """A second branch: the same weights, other activations (Luo et al. 2023, Fig. 3).

    The copy has the structure of ``module`` and shares with it every Parameter and buffer, the
    very objects, so that training the one changes the other; every activation module is replaced
    by a new ``Pade`` on its device, trainable and starting as ReLU. Its parameters keep their
    names, so that ``torch.func.functional_call`` takes the same dictionary for both.

    The objects stay shared as long as they stay what they are: make the branch after the network
    has moved to its device and after its head has grown.

    Args:
        module: A network or a part of one.
        activation: Class (or classes) of the modules to replace.
        degrees: Degrees of the new activations.
        version: Form of their denominator.

    Returns:
        The branch, in the same training or evaluation mode in every part.

    Raises:
        FastcilError: If ``module`` has no such module, for example because it calls
            ``torch.relu``.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> branch = share_with_pade(network)
        >>> branch[0].weight is network[0].weight, type(branch[1]).__name__
        (True, 'Pade')
    """
    places = [part for part in module.modules() if isinstance(part, activation)]
    if not places:
        kinds = activation if isinstance(activation, tuple) else (activation,)
        names = " or ".join(kind.__name__ for kind in kinds)
        raise FastcilError(
            f"module {type(module).__name__} has no {names} module to replace; give each of its "
            "activations a module of its own instead of calling a function."
        )
    # What the memo of a deep copy already holds is used as it is.
    shared = (*module.parameters(), *module.buffers())
    memo: dict[int, object] = {id(tensor): tensor for tensor in shared}
    device = shared[0].device if shared else None
    for place in places:
        memo[id(place)] = Pade(degrees, version).to(device).train(place.training)
    return copy.deepcopy(module, memo)
