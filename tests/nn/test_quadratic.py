"""Quadratic programmes with lower bounds, against brute force and an active-set solver."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from fastcil.errors import FastcilError
from fastcil.nn import minimize_above

qpsolvers = pytest.importorskip("qpsolvers")


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rows(kind, n, p):
    """Rows [n, P] of which A = G G^T is made."""
    G, half = normal(n, p), n // 2
    if kind == "equal":
        G[half:] = G[: n - half].clone() * (torch.rand(n - half, 1) + 0.5)
    if kind == "opposite":
        G[half:] = -G[: n - half].clone()
    if kind == "zero":
        G[::2] = 0
    if kind == "dependent":
        low = max(1, n // 3)
        G = normal(n, low) @ normal(low, p)
    if kind == "scaled":
        G = G * 10 ** (16 * torch.rand(n, 1) - 8)
    if kind == "tiny":
        G = G * 1e-12
    return G


KINDS = ("independent", "equal", "opposite", "zero", "dependent", "scaled", "tiny")


def problem(kind, n, ridge=0.0, seed=0):
    """A and b as GEM has them, some entries of b being negative."""
    torch.manual_seed(seed)
    G = rows(kind, n, n + 7)
    lengths = G.norm(dim=1, keepdim=True).clamp(min=1e-300)
    g = normal(n + 7) - 2 * (G / lengths).sum(0)
    return G @ G.T + ridge * torch.eye(n, dtype=torch.float64), G @ g


def brute_force(A, b, lower):
    """The least value over all choices of which variables are at their bounds."""
    n, best = len(b), np.inf
    for at_bound in product([False, True], repeat=n):
        v = lower.copy()
        free = ~np.array(at_bound)
        if free.any():
            right = -(b + A @ np.where(free, 0.0, lower))[free]
            v[free] = np.linalg.lstsq(A[np.ix_(free, free)], right, rcond=1e-12)[0]
        if (v >= lower - 1e-9).all():
            best = min(best, 0.5 * v @ A @ v + b @ v)
    return best


def assert_optimal(A, b, lower, v, tolerance=1e-12):
    """The conditions of Karush, Kuhn and Tucker, in variables scaled to a unit diagonal of A."""
    unit = torch.where(A.diagonal() > 0, A.diagonal(), 1.0).rsqrt()
    x, slope = (v - lower) / unit, unit * (A @ v + b)
    size = (unit * (b + A @ lower)).abs().max().clamp(min=1e-300)
    assert bool((v >= lower).all())
    assert float(slope.min() / size) >= -tolerance
    assert float((x / size * slope / size).abs().max()) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lower, ridge", [(0.0, 0.0), (0.5, 0.0), (0.5, 1e-3)])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 20, 100])
def test_optimal_whatever_the_matrix(kind, lower, ridge, n):
    A, b = problem(kind, n, ridge, seed=n)
    bound = torch.full((n,), lower, dtype=torch.float64)
    # Bounds on variables that cancel but for rounding magnify it.
    loose = kind in ("opposite", "dependent")
    assert_optimal(A, b, bound, minimize_above(A, b, bound), 1e-8 if loose else 1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tiny"])
@pytest.mark.parametrize("n", range(1, 7))
def test_the_least_value_there_is(kind, n):
    for seed in range(3):
        A, b = problem(kind, n, seed=seed)
        lower = 0.3 * torch.rand(n, dtype=torch.float64)
        v = minimize_above(A, b, lower)
        value = float(0.5 * v @ A @ v + b @ v)
        # Scaled to a unit diagonal: brute force has none of its own.
        unit = torch.where(A.diagonal() > 0, A.diagonal(), 1.0).rsqrt()
        scaled = (A * unit[:, None] * unit).numpy(), (b * unit).numpy(), (lower / unit).numpy()
        assert value == pytest.approx(brute_force(*scaled), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("scaled", "tiny")])
@pytest.mark.parametrize("n", range(1, 21))
def test_as_a_solver_by_active_sets_has_it(kind, n):
    A, b = problem(kind, n, ridge=1e-3, seed=100 + n)
    lower = torch.full((n,), 0.5, dtype=torch.float64)
    expected = qpsolvers.solve_qp(
        A.numpy(), b.numpy(), -np.eye(n), -lower.numpy(), solver="quadprog"
    )
    v = minimize_above(A, b, lower)
    torch.testing.assert_close(v, torch.from_numpy(expected), rtol=1e-8, atol=1e-8)


def test_what_matters_to_nothing_stays_at_its_bound():
    A = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([-2.0, 0.0], dtype=torch.float64)
    v = minimize_above(A, b, torch.tensor([0.0, 0.25]))
    torch.testing.assert_close(v, torch.tensor([0.5, 0.25], dtype=torch.float64))


def test_nothing_to_do():
    A, lower = torch.eye(3), torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(minimize_above(A, -A @ lower, lower), lower.double())
    assert minimize_above(torch.zeros(0, 0), torch.zeros(0), torch.zeros(0)).shape == (0,)


def test_what_is_no_number_is_no_number_afterwards():
    A, b = problem("independent", 3)
    b[1] = torch.nan
    assert minimize_above(A, b, torch.zeros(3)).isnan().any()


def test_odd_shapes_are_a_sentence():
    with pytest.raises(FastcilError, match=r"matrix is \(2, 3\)"):
        minimize_above(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2))
