"""Projected gradients against the quadratic programme they solve, and A-GEM's closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastcil.nn.projection as projection
from fastcil.errors import FastcilError
from fastcil.nn import flat_gradient, project_gradient, remove_opposing, with_gradient

qpsolvers = pytest.importorskip("qpsolvers")

KINDS = ("independent", "equal", "opposite", "zero", "dependent", "scaled")


def gradients(kind, n, size=40, seed=0):
    """A gradient that opposes others, and those."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    G, half = normal(n, size), n // 2
    if kind == "equal":
        G[half:] = G[: n - half].clone()
    if kind == "opposite":
        G[half:] = -2 * G[: n - half].clone()
    if kind == "zero":
        G[1::2] = 0
    if kind == "dependent":
        G = normal(n, max(1, n // 3)) @ normal(max(1, n // 3), size)
    if kind == "scaled":
        G = G * 10.0 ** torch.arange(-n, n, 2, dtype=torch.float64)[:, None]
    lengths = G.norm(dim=1, keepdim=True).clamp(min=1e-300)
    g = normal(size) - (G / lengths).sum(0)
    g -= 3 * G[0] / lengths[0] * (g @ G[0] / lengths[0]).clamp(min=0)
    assert (G @ g).min() < 0
    return g, G


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
def test_no_constraint_is_broken_and_none_nearer(kind, n):
    """Feasible, and g~ - g is a sum of constraint gradients that g~ is orthogonal to."""
    g, G = gradients(kind, n, seed=n)
    found = project_gradient(g, G)
    lengths = G.norm(dim=1) * g.norm()
    assert float(((G @ found) / lengths.clamp(min=1e-300)).min()) >= -1e-9
    # The nearest point z of a cone: <z - g, z> = 0, and <z - g, w> >= 0 for every w in it. The
    # second says that z - g is G^T v with v >= 0: quadprog finds the same z from the primal.
    assert abs(float((found - g) @ found)) <= 1e-9 * float(g @ g)
    unit = (G / G.norm(dim=1, keepdim=True).clamp(min=1e-300)).numpy()
    nearest = qpsolvers.solve_qp(np.eye(len(g)), -g.numpy(), -unit, np.zeros(n), solver="quadprog")
    np.testing.assert_allclose(found.numpy(), nearest, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_margin_and_ridge_as_the_released_code_has_them(kind):
    g, G = gradients(kind, 6)
    if kind == "scaled":
        G = G / 10
    found = project_gradient(g, G, margin=0.5, ridge=1e-3)
    P = (G @ G.T + 1e-3 * torch.eye(6)).numpy()
    v = qpsolvers.solve_qp(P, (G @ g).numpy(), -np.eye(6), -np.full(6, 0.5), solver="quadprog")
    np.testing.assert_allclose(found.numpy(), (G.T.numpy() @ v + g.numpy()), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_a_gradient_that_opposes_none_is_left_alone(margin):
    g, G = gradients("independent", 5)
    G = G * (G @ g).sign()[:, None]
    assert torch.equal(project_gradient(g, G, margin=margin, ridge=1e-3), g)
    assert torch.equal(remove_opposing(g, G[0]), g)
    assert project_gradient(g, G[:0]) is g


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_gem_is_gem_with_one_constraint(dtype, tolerance):
    for seed in range(10):
        g, G = gradients("independent", 1, seed=seed)
        g, G = g.to(dtype), G.to(dtype)
        one, other = project_gradient(g, G), remove_opposing(g, G[0])
        assert one.dtype == other.dtype == dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        assert not torch.equal(one, g)
        r = G[0]
        torch.testing.assert_close(other, g - (g @ r) / (r @ r) * r, rtol=1e-5, atol=1e-5)


def test_a_reference_of_zero_opposes_nothing():
    g = torch.randn(5)
    assert torch.equal(remove_opposing(g, torch.zeros(5)), g)
    assert torch.equal(project_gradient(g, torch.zeros(3, 5), margin=0.5), g)


def test_nothing_waits_for_the_device():
    """On the meta device there are no values to look at."""
    g, G = torch.empty(5, device="meta"), torch.empty(3, 5, device="meta")
    assert project_gradient(g, G, margin=0.5, ridge=1e-3).shape == (5,)
    assert remove_opposing(g, G[0]).shape == (5,)


def test_autocast_changes_nothing():
    g, G = (value.float() for value in gradients("independent", 4))
    expected = project_gradient(g, G, margin=0.5), remove_opposing(g, G[0])
    with torch.autocast("cpu", torch.bfloat16):
        found = project_gradient(g, G, margin=0.5), remove_opposing(g, G[0])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_block_by_block_is_the_same(monkeypatch):
    g, G = gradients("independent", 5)
    whole = project_gradient(g, G, margin=0.5)
    monkeypatch.setattr(projection, "_BLOCK", 7)
    torch.testing.assert_close(project_gradient(g, G, margin=0.5), whole, rtol=1e-12, atol=1e-12)


def test_a_function_with_a_given_gradient():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    net = net.to(memory_format=torch.channels_last)
    spare = torch.nn.Parameter(torch.ones(2, 3))
    parameters = [*net.parameters(), spare]
    loss = net(torch.randn(5, 3, 3, 3)).square().mean()
    flat = flat_gradient(loss, parameters)
    loss = net(torch.zeros(1, 3, 3, 3)).sum()  # another graph: the first is gone
    with_gradient(parameters, flat).backward()
    torch.manual_seed(0)
    copy = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    copy(torch.randn(5, 3, 3, 3)).square().mean().backward()
    assert len(flat) == sum(p.numel() for p in parameters)
    assert not spare.grad.any()
    for p, q in zip(net.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize(
    "call",
    [
        lambda: project_gradient(torch.zeros(3), torch.zeros(2, 4)),
        lambda: project_gradient(torch.zeros(3), torch.zeros(3)),
        lambda: remove_opposing(torch.zeros(3), torch.zeros(4)),
    ],
)
def test_odd_shapes_are_a_sentence(call):
    with pytest.raises(FastcilError, match=r"gradient is \(3,\) and"):
        call()
