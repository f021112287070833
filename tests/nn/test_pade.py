from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastcil import ops
from fastcil.nn import Pade, fit_rational

GRID = torch.linspace(-3, 3, 6001, dtype=torch.float64)


def test_starts_as_the_best_fit_to_relu():
    activation = Pade().double()
    fit = fit_rational(torch.relu, (5, 4), "A")
    value = activation(GRID).detach()
    fresh = ops.pade(GRID, fit.numerator, fit.denominator)
    torch.testing.assert_close(value, fresh, rtol=0, atol=1e-3)
    error = (value - GRID.relu()).abs()
    assert 0.0299 < error.max() < 0.0301
    assert abs(fit.max_error - error.max()) < 1e-4
    stored = torch.cat([*activation.parameters()]).detach()
    torch.testing.assert_close(stored, torch.cat([*fit[:2]]), rtol=1e-5, atol=1e-6)
    assert 0.0050 < error.square().mean().sqrt() < 0.0052
    assert activation.degrees == (5, 4)
    assert [p.shape for p in activation.parameters()] == [(6,), (4,)]
    assert list(activation.state_dict()) == ["numerator", "denominator"]


@pytest.mark.parametrize("version", ["A", "B", "C", "D", "nonsafe"])
def test_other_forms_start_as_relu_too(version):
    value = Pade((3, 2), version).double().eval()(GRID)
    assert (value - GRID.relu()).abs().max() < 0.2


@pytest.mark.parametrize(
    ("init", "function", "errors"),
    [
        ("relu", torch.relu, (0.031, 0.017)),
        ("leaky_relu", functional.leaky_relu, (0.030, 0.017)),
        ("gelu", functional.gelu, (4e-3, 3e-5)),
        ("silu", functional.silu, (1e-5, 1e-3)),
        ("tanh", torch.tanh, (1e-5, 3e-3)),
        ("identity", torch.clone, (1e-5, 1e-5)),
        (torch.sin, torch.sin, (1e-4, 1e-4)),
    ],
)
def test_starts_as_a_named_or_any_function(init, function, errors):
    """The fit is to a local optimum, and at the higher degrees not always a better one."""
    for degrees, error in zip([(5, 4), (8, 8)], errors, strict=True):
        activation = Pade(degrees, init=init)
        assert activation.degrees == degrees
        assert (activation(GRID) - function(GRID)).abs().max() < error
        # A coefficient at 0 has no gradient where it stands in an absolute value.
        assert bool((activation.denominator != 0).any())


def test_named_fits_are_made_once(monkeypatch):
    first = Pade((4, 3), "B", "tanh")

    def refuse(*arguments):
        raise AssertionError

    monkeypatch.setattr("fastcil.nn.pade.fit_rational", refuse)
    second = Pade((4, 3), "B", "tanh")
    assert torch.equal(first.numerator, second.numerator)
    assert first.numerator is not second.numerator


def test_groups_have_coefficients_of_their_own():
    activation = Pade((3, 2), "B", groups=2)
    assert [p.shape for p in activation.parameters()] == [(2, 4), (2, 2)]
    assert (activation.groups, activation.degrees) == (2, (3, 2))
    with torch.no_grad():
        activation.numerator[1] *= 2
    x = torch.randn(2, 6, 3)
    y, single = activation(x), Pade((3, 2), "B")(x)
    torch.testing.assert_close(y, torch.cat([single[:, :3], 2 * single[:, 3:]], 1))
    assert "groups=2" in repr(activation) and "groups" not in repr(Pade())


def test_the_noise_of_version_d_is_for_training():
    activation, x = Pade(version="D"), GRID.float()
    assert not torch.equal(activation(x), activation(x))
    activation.eval()
    assert torch.equal(activation(x), ops.pade(x, *activation.parameters(), "B"))


def model(version="A", groups=1):
    return nn.Sequential(nn.Linear(3, 4), Pade(version=version, groups=groups), nn.Linear(4, 2))


def test_a_step_inside_functional_call_is_differentiated_through():
    net, x = model(groups=2), torch.randn(5, 3)
    parameters = dict(net.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    grads = torch.autograd.grad(loss(parameters), list(parameters.values()), create_graph=True)
    stepped = {
        name: value - 0.1 * grad
        for (name, value), grad in zip(parameters.items(), grads, strict=True)
    }
    hyper = torch.autograd.grad(loss(stepped), net[1].numerator)[0]
    assert bool(hyper.isfinite().all()) and bool((hyper != 0).all())


@pytest.mark.parametrize("version", ["A", "D"])
def test_compiles_in_one_graph(version):
    net, x = model(version, 2), torch.randn(5, 3)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    results = []
    for function in (net, compiled):
        torch.manual_seed(0)
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))))
    torch.testing.assert_close(*results)


def test_trains_under_autocast():
    net, x = model(), torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert net[1].numerator.grad.dtype == torch.float32 and bool(net[1].numerator.grad.any())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((5, 4), "A", "swish"), "init is 'swish'"),
        (((5, 0),), "degrees is"),
        (((9, 4),), "degrees is .* to \\(8, 8\\)"),
        (((5, 4), "E"), "version is 'E'"),
        (((5, 4), "A", "relu", 0), "groups is 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pade(*arguments)
