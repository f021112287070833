"""Quadratic programmes with lower bounds, solved on the device in a fixed number of steps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcil.errors import FastcilError

# On thousands of degenerate and badly scaled problems all precision was there after 20.
_STEPS = 30
# Keeps a singular matrix factorable; it bends the path, not the point where it ends.
_SHIFT = 1e-12


@torch.no_grad()
def minimize_above(matrix: Tensor, linear: Tensor, lower: Tensor) -> Tensor:
    r"""The minimum of a convex quadratic function of variables that have lower bounds.

    .. math:: \min_v \tfrac12 v^\top A v + b^\top v \quad \text{subject to} \quad v \ge l

    by Mehrotra's predictor-corrector method (1992; Nocedal and Wright 2006, Alg. 16.4) on the
    variables scaled to a unit diagonal. With :math:`x = v - l` and the function's slope s, its
    optimum is where :math:`A x + c = s`, :math:`x, s \ge 0` and :math:`x_i s_i = 0`, with
    :math:`c = b + A l`. The number of steps is fixed, and nothing waits for the device. Computed
    in float64.

    A may be singular, and rows of it zero, as long as the minimum exists: as it does where A is
    :math:`G G^\top` and b a combination of its columns. Which of several minima it gives is then
    left open, save that a variable which matters to nothing lies at its bound.

    Args:
        matrix: A, symmetric and positive semidefinite.  # [n, n]
        linear: b.  # [n]
        lower: l.  # [n]

    Returns:
        v, float64. Rounding leaves s above about -1e-15 of the size of c, in the scaled variables,
        unless A is singular but for its own rounding.  # [n]

    Raises:
        FastcilError: The shapes do not fit.

    Example:
        >>> A, b = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([-2.0, 3.0])
        >>> minimize_above(A, b, torch.zeros(2)).round(decimals=6)
        tensor([1., 0.], dtype=torch.float64)
    """
    n = len(linear)
    if matrix.shape != (n, n) or lower.shape != (n,):
        raise FastcilError(
            f"matrix is {tuple(matrix.shape)}, linear {tuple(linear.shape)} and lower "
            f"{tuple(lower.shape)}; pass [n, n], [n] and [n]."
        )
    if not n:
        return linear.double()
    matrix, lower = matrix.double(), lower.double()
    slope = linear.double() + matrix @ lower
    diagonal = matrix.diagonal()
    unit = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()  # [n]
    slope = slope * unit
    size = slope.abs().amax()
    size = torch.where(size > 0, size, 1.0)
    scaled = matrix * unit[:, None] * unit  # [n, n]
    # Where all is zero the variable gets a curvature, and so a minimum, of its own.
    scaled.diagonal().fill_(1.0)
    return lower + size * unit * _complementary(scaled, slope / size)


def _complementary(matrix: Tensor, constant: Tensor) -> Tensor:
    """X >= 0 with A x + c >= 0 and x (A x + c) = 0, for A of a unit diagonal and c of size 1."""
    x, s = torch.ones_like(constant), torch.ones_like(constant)
    for _ in range(_STEPS):
        residual = matrix @ x + constant - s
        factor, failed = torch.linalg.cholesky_ex(matrix + (s / x + _SHIFT).diag_embed())

        # Newton's step to A x + c = s and x s = 0, then with what that step misses.
        dx, ds = _newton(factor, x, s, residual, x * s)
        reach = _reach(x, dx, s, ds).clamp(max=1.0)
        gap = torch.dot(x, s) / len(x)
        after = torch.dot(x + reach * dx, s + reach * ds) / len(x)
        centre = gap * (after / gap) ** 3
        dx, ds = _newton(factor, x, s, residual, x * s + dx * ds - centre)
        reach = (0.995 * _reach(x, dx, s, ds)).clamp(max=1.0)
        x = torch.where(failed == 0, x + reach * dx, x)
        s = torch.where(failed == 0, s + reach * ds, s)
    return x


def _newton(
    factor: Tensor, x: Tensor, s: Tensor, residual: Tensor, product: Tensor
) -> tuple[Tensor, Tensor]:
    """Steps with A dx - ds = -residual and s dx + x ds = -product."""
    dx = torch.cholesky_solve(-(residual + product / x)[:, None], factor)[:, 0]
    return dx, -(product + s * dx) / x


def _reach(x: Tensor, dx: Tensor, s: Tensor, ds: Tensor) -> Tensor:
    """How far both may go along their steps before one of their entries is 0."""
    value, step = torch.cat([x, s]), torch.cat([dx, ds])
    return torch.where(step < 0, -value / step, torch.inf).amin()
