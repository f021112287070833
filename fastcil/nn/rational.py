"""Least-squares fits of rational functions, for the coefficients that a Padé activation starts at.

Matrix products and solvers of the BLAS round differently with where their operands lie in memory;
sums of products do not, so that a fit gives the same bits each time it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastcil.errors import FastcilError

_POINTS = 601
_STEPS = 200


class RationalFit(NamedTuple):
    """Coefficients of a fitted rational function, and how far it is from its target."""

    numerator: Tensor  # float64 [m + 1]
    denominator: Tensor  # float64 [n]
    max_error: float
    rms_error: float


class _Problem:
    """Residuals and their Jacobian on a grid of points, in float64."""

    def __init__(self, x: Tensor, y: Tensor, degrees: tuple[int, int], version: str) -> None:
        self.y, self.version = y, version
        powers = x[:, None] ** torch.arange(max(degrees) + 1, dtype=x.dtype)
        self.numerator = powers[:, : degrees[0] + 1]  # [points, m + 1]
        below = powers[:, 1 : degrees[1] + 1]
        self.denominator = below.abs() if version == "A" else below  # [points, n]

    def quotient(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """Q [points] and its derivative by each b_k [points, n]."""
        if self.version == "A":
            return 1 + _product(self.denominator, b.abs()), self.denominator * b.sign()
        total = _product(self.denominator, b)
        if self.version == "nonsafe":
            return 1 + total, self.denominator
        constant = 1.0 if self.version == "B" else 0.1
        return constant + total.abs(), self.denominator * total.sign()[:, None]

    def residual(self, a: Tensor, b: Tensor) -> Tensor:
        """P/Q minus the target."""
        return _product(self.numerator, a) / self.quotient(b)[0] - self.y

    def jacobian(self, a: Tensor, b: Tensor) -> Tensor:
        """Derivatives of the residual by a, then by b."""
        q, by_b = self.quotient(b)
        value = _product(self.numerator, a) / q
        return torch.cat([self.numerator, -value[:, None] * by_b], 1) / q[:, None]

    def best_numerator(self, b: Tensor) -> Tensor:
        """The a that fits best for this b: a linear problem."""
        q = self.quotient(b)[0]
        return _least_squares(self.numerator / q[:, None], self.y)

    def starts(self) -> Iterator[Tensor]:
        """Denominators to start from."""
        n = self.denominator.shape[1]
        b = self.y.new_zeros(n)
        yield b + 1
        yield b + 0.1
        for _ in range(20):
            q = 1 + _product(self.denominator, b)
            linear = torch.cat([self.numerator, -self.y[:, None] * self.denominator], 1)
            next_b = _least_squares(linear / q[:, None], self.y / q)[-n:]
            # The iteration may diverge; what it found until then is still a start.
            if not bool((1 + _product(self.denominator, next_b)).abs().ge(1e-3).all()):
                break
            b = next_b
        yield b


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix * vector).sum(1)


def _least_squares(matrix: Tensor, target: Tensor, damping: float = 1e-14) -> Tensor:
    """Minimises the residual's square plus ``damping``, relative to each column's square."""
    rows = torch.cat([matrix, target[:, None]], 1)
    system = (matrix[:, :, None] * rows[:, None, :]).sum(0)  # [n, n + 1]
    size = system.diagonal()
    size += damping * (size + 1e-12)
    # Gauss-Jordan elimination; the matrix is positive definite and needs no pivots.
    for i in range(len(system)):
        row = system[i] / system[i, i]
        factors = system[:, i].clone()
        factors[i] = 0
        system -= factors[:, None] * row
        system[i] = row
    return system[:, -1]


def _levenberg_marquardt(problem: _Problem, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """Minimises the sum of squared residuals from (a, b) on."""
    residual = problem.residual(a, b)
    cost = float(residual.square().sum())
    damping = 1e-3
    for _ in range(_STEPS):
        step = _least_squares(problem.jacobian(a, b), -residual, damping)
        next_a, next_b = a + step[: len(a)], b + step[len(a) :]
        next_residual = problem.residual(next_a, next_b)
        next_cost = float(next_residual.square().sum())
        if next_cost < cost:
            converged = cost - next_cost < 1e-12 * cost
            a, b, residual, cost = next_a, next_b, next_residual, next_cost
            damping = max(damping / 5, 1e-12)
            if converged:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return a, b, cost


def fit_rational(
    function: Callable[[Tensor], Tensor],
    degrees: tuple[int, int] = (5, 4),
    version: str = "A",
    interval: tuple[float, float] = (-3.0, 3.0),
) -> RationalFit:
    r"""Coefficients of the rational function that is nearest to ``function`` on an interval.

    .. math:: \min_{a, b} \sum_i \bigl(P_a(x_i) / Q_b(x_i) - f(x_i)\bigr)^2

    over 601 equidistant points, in float64, by damped Gauss-Newton steps (Levenberg 1944,
    Marquardt 1963) from several starting points, one of them the linearised iteration of Sanathanan
    and Koerner (1963). Takes about a tenth of a second; the same input gives the same bits.

    Args:
        function: What to approximate, float64 [points] -> [points].
        degrees: m of the numerator and n of the denominator.
        version: Form of the denominator, as in ``fastcil.ops.pade``.
        interval: Where to approximate.

    Returns:
        numerator [m + 1] and denominator [n] in float64; max_error and rms_error on the points.

    Raises:
        FastcilError: If the degrees, version or interval make no sense, the function is not finite
            on it, or every fit has a pole there (version "nonsafe" only).

    Example:
        >>> fit = fit_rational(torch.nn.functional.softsign, degrees=(1, 1))  # x / (1 + |x|)
        >>> fit.numerator.round(decimals=6).abs().tolist(), fit.denominator.tolist()
        ([0.0, 1.0], [1.0])
    """
    m, n = degrees
    if m < 0 or n < 1:
        raise FastcilError(f"degrees is {degrees}; it must be (m, n) with m >= 0 and n >= 1.")
    if version not in ("A", "B", "C", "nonsafe"):
        raise FastcilError(f"version is {version!r}; it must be one of A, B, C, nonsafe.")
    low, high = interval
    if not low < high:
        raise FastcilError(f"interval is {interval}; it must be (low, high) with low < high.")
    x = torch.linspace(low, high, _POINTS, dtype=torch.float64)
    y = function(x)
    if not bool(y.isfinite().all()):
        raise FastcilError(f"function is not finite on the interval {interval}; choose another.")
    problem = _Problem(x, y, degrees, version)
    best, least = None, float("inf")
    for start in problem.starts():
        a, b, cost = _levenberg_marquardt(problem, problem.best_numerator(start), start)
        if cost < least and bool((problem.quotient(b)[0] > 0).all()):
            # Version A sees absolute values only.
            best, least = (a, b.abs() if version == "A" else b), cost
    if best is None:
        raise FastcilError(
            f"every fit of degrees {degrees} in version {version!r} has a pole in {interval}; use "
            "version A, B or C."
        )
    error = problem.residual(*best).abs()
    return RationalFit(*best, float(error.max()), float(error.square().mean().sqrt()))
