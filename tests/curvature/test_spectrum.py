"""The largest eigenvalue against that of the dense Fisher information, and where it goes."""

from __future__ import annotations

import math

import pytest
import torch
from fisher import build, draw, small_cnn
from torch import nn
from torch.nn import functional as F

from fastcil.curvature import largest_eigenvalue
from fastcil.errors import FastcilError
from fastcil.nn import LinearHead, Network, Pade, linearize
from fastcil.nn.mlp import MLP

LIKELIHOODS = ("categorical", "gaussian")


def normed():
    model = build(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 5)
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


def linearised():
    torch.manual_seed(2)
    model = Network([linearize(MLP(4, 6).eval())], LinearHead(6, 3)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def shared():
    twice = nn.Linear(5, 5)
    return build(twice, nn.Tanh(), twice, nn.Linear(5, 4))


def padded():
    return build(nn.Linear(5, 6), Pade(), nn.Linear(6, 1, bias=False))


MODELS = {
    "cnn": (small_cnn, (2, 6, 6)),
    "batch norm": (normed, (2, 4, 4)),
    "linearised": (linearised, (3, 4, 4)),
    "shared weights": (shared, (5,)),
    "Padé, one output": (padded, (5,)),
}


def dense(model, x, likelihood, names=None):
    """E[Jᵀ H J] over the parameters named, image by image."""
    model.eval()
    chosen = [
        p
        for name, p in model.named_parameters()
        if (p.requires_grad if names is None else name in names)
    ]
    total = 0.0
    for image in x:
        outputs = model(image[None])[0]
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(o, chosen, retain_graph=True)])
            for o in outputs
        ]
        jacobian = torch.stack(rows)
        hessian = torch.eye(len(outputs)).double()
        if likelihood == "categorical":
            hessian = torch.autograd.functional.hessian(
                lambda z: F.cross_entropy(z[None], torch.tensor([0])), outputs.detach()
            )
        total = total + jacobian.T @ hessian @ jacobian
    return total / len(x)


def largest(matrix):
    return float(torch.linalg.eigvalsh(matrix)[-1])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_that_of_the_dense_matrix(name, likelihood):
    make, shape = MODELS[name]
    model, x = make(), draw(9, *shape, seed=3)
    expected = largest(dense(model, x, likelihood))
    found = largest_eigenvalue(model, x, likelihood)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert expected > 0 or (name, likelihood) == ("Padé, one output", "categorical")
    other = largest_eigenvalue(model, x, likelihood, generator=torch.Generator().manual_seed(5))
    assert other == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert largest_eigenvalue(model, x, likelihood) == found


def test_in_single_precision():
    model, x = small_cnn(), draw(9, 2, 6, 6)
    expected = largest(dense(model, x, "categorical"))
    assert largest_eigenvalue(model.float(), x.float()) == pytest.approx(expected, rel=1e-4)


def test_parameters_may_be_chosen_and_frozen_ones_are_left_out():
    model, x = small_cnn(), draw(5, 2, 6, 6)
    head = largest(dense(model, x, "categorical", ("5.weight", "5.bias")))
    assert largest_eigenvalue(model, x, parameters=model[5].parameters()) == pytest.approx(head)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    assert largest_eigenvalue(model, x) == pytest.approx(head)
    body = largest(dense(small_cnn(), x, "categorical", ("0.weight", "0.bias")))
    found = largest_eigenvalue(model, x, parameters=[model[0].weight, model[0].bias])
    assert found == pytest.approx(body), "whether they are trained now is not asked"


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)


def test_what_the_outputs_don_t_depend_on_counts_for_nothing():
    torch.manual_seed(0)
    model, x = Partly(), torch.randn(4, 3)
    of_used = largest_eigenvalue(model.used, x)
    assert largest_eigenvalue(model, x) == pytest.approx(of_used)
    assert largest_eigenvalue(model, x, parameters=model.idle.parameters()) == 0
    model.used.requires_grad_(False)
    assert largest_eigenvalue(model, x) == 0


def test_nothing_is_changed():
    model = normed()
    model[4].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    with torch.no_grad():
        found = largest_eigenvalue(model, draw(6, 2, 4, 4))
    assert found > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, True, False, True]
    assert model[0].weight.grad.eq(1).all() and model[0].bias.grad is None


def test_more_products_come_closer_from_below():
    model, x = small_cnn(), draw(9, 2, 6, 6)
    exact = largest(dense(model, x, "gaussian"))
    found = [
        largest_eigenvalue(model, x, "gaussian", iterations=n, tolerance=1e-12) for n in (1, 3, 9)
    ]
    assert found[0] < found[1] < found[2] <= exact * (1 + 1e-12)
    every = largest_eigenvalue(model, x, "gaussian", iterations=1000, tolerance=1e-300)
    assert every == pytest.approx(exact, rel=1e-12)


def train(likelihood, steps=400):
    """A perfect fit of separable classes, and the eigenvalue on the way."""
    model = build(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    labels = torch.arange(24) % 3
    x = draw(24, 4) * 0.3 + 2 * F.one_hot(labels, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    trace = []
    for step in range(steps + 1):
        outputs = model(x)
        if likelihood == "categorical":
            loss = F.cross_entropy(outputs, labels)
        else:
            loss = 0.5 * (F.one_hot(labels, 3) - outputs).square().sum(1).mean()
        if step % 100 == 0:
            trace.append(largest_eigenvalue(model, x, likelihood))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (outputs.argmax(1) == labels).all()
    return trace


def test_with_softmax_it_vanishes_as_the_fit_becomes_perfect():
    """Shon et al. 2022, Sec. 3.1 and Fig. 3a; and Appendix A, where p is as good as certain."""
    trace = train("categorical")
    assert trace[0] > trace[1] > trace[2] > trace[3] > trace[4]
    assert trace[-1] < 0.02 * trace[0]
    model, x = small_cnn(), draw(9, 2, 6, 6)
    values = []
    for size in (10.0, 1e3, 1e5):
        with torch.no_grad():
            model[5].weight.mul_(size / model[5].weight.abs().max())
        values.append(largest_eigenvalue(model, x) / size**2)
    assert values[0] > values[1] > values[2] >= 0 and values[2] < 1e-9


def test_with_squared_error_it_stays():
    """Shon et al. 2022, Fig. 3b."""
    trace = train("gaussian")
    assert min(trace) > 0.5 * trace[0]


def test_outputs_that_are_not_finite():
    model, x = small_cnn(), draw(3, 2, 6, 6)
    with torch.no_grad():
        model[5].bias[0] = math.inf
    assert math.isnan(largest_eigenvalue(model, x))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"likelihood": "poisson"}, "likelihood is 'poisson'; it must be categorical or gaussian"),
        ({"iterations": 0}, "iterations is 0"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"inputs": torch.zeros(0, 2)}, "inputs is empty"),
        ({"parameters": [nn.Parameter(torch.zeros(1))]}, "has 1 that are not of the model"),
        ({"parameters": []}, "no parameter that requires gradients"),
        ({"model": nn.Conv1d(1, 2, 1), "inputs": torch.zeros(2, 1, 4)}, r"outputs is \[2, 2, 4\]"),
    ],
)
def test_bad_arguments(changes, words):
    arguments = {"model": nn.Linear(2, 3), "inputs": torch.zeros(4, 2), **changes}
    with pytest.raises(FastcilError, match=words):
        largest_eigenvalue(**arguments)
