from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastcil import ops
from fastcil.nn import LinearHead, Network, Pade, fit_rational, resnet18, resnet20, share_with_pade

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize("version", ["A", "B", "C", "nonsafe"])
def test_other_forms_start_as_relu_too(version):
    value = Pade((3, 2), version).double()(GRID)
    assert (value - GRID.relu()).abs().max() < 0.2


def test_starts_as_any_function():
    activation = Pade((3, 3), "B", init=torch.tanh)
    x = GRID.float()
    torch.testing.assert_close(activation(x), x.tanh(), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((5, 4), "A", "gelu"), "init is 'gelu'"),
        (((5, 0),), "degrees is"),
        (((5, 4), "E"), "version is 'E'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pade(*arguments)


def network():
    return Network([resnet20(width=2), resnet20(width=2)], LinearHead(16, 3))


def test_the_branch_shares_everything_but_its_activations():
    net = network()
    branch = share_with_pade(net)
    assert isinstance(branch, Network) and branch is not net
    ours, theirs = dict(branch.named_parameters()), dict(net.named_parameters())
    assert all(ours[name] is value for name, value in theirs.items())
    added = set(ours) - set(theirs)
    assert len(added) == 2 * 19 * 2
    assert all(ours[name].requires_grad for name in added)
    own = dict(net.named_buffers())
    assert own and all(value is own[name] for name, value in branch.named_buffers())
    assert not any(isinstance(part, nn.ReLU) for part in branch.modules())
    places = [name for name, part in net.named_modules() if isinstance(part, nn.ReLU)]
    assert [name for name, part in branch.named_modules() if isinstance(part, Pade)] == places
    assert len({id(part.numerator) for part in branch.modules() if isinstance(part, Pade)}) == 38
    assert sum(isinstance(part, nn.ReLU) for part in net.modules()) == 38


def test_training_the_one_changes_the_other():
    net = network()
    branch = share_with_pade(net)
    net.eval()
    branch.eval()
    before = branch(IMAGES).detach()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    net.train()
    net(IMAGES).square().sum().backward()
    optimiser.step()
    assert not torch.allclose(branch(IMAGES), before)
    mean = net.extractors[0].stem[1].running_mean
    assert mean.any() and branch.extractors[0].stem[1].running_mean is mean
    branch.train()
    old = mean.clone()
    branch(IMAGES)
    assert not torch.equal(mean, old)


def test_the_branch_equals_the_network_where_pade_equals_relu():
    net = network().eval()
    branch = share_with_pade(net).eval()
    for part in branch.modules():
        if isinstance(part, Pade):
            part.forward = torch.relu
    torch.testing.assert_close(branch(IMAGES), net(IMAGES))


def test_frozen_extractors_stay_frozen_in_the_branch():
    net = network()
    net.freeze(0)
    branch = share_with_pade(net)
    branch.train()
    assert branch.frozen == (0,)
    assert not any(part.training for part in branch.extractors[0].modules())
    assert all(part.training for part in branch.extractors[1].modules())


def test_names_are_those_of_functional_call():
    net = network().eval()
    branch = share_with_pade(net).eval()
    stepped = {name: 1.01 * value for name, value in net.named_parameters()}
    found = torch.func.functional_call(branch, stepped, (IMAGES,))
    moved = copy.deepcopy(branch)
    with torch.no_grad():
        for name, value in moved.named_parameters():
            if name in stepped:
                value *= 1.01
    torch.testing.assert_close(found, moved(IMAGES))


def test_a_bilevel_step_reaches_the_activations():
    net = Network([resnet18(width=2, stem="cifar")], LinearHead(16, 3)).eval()
    branch = share_with_pade(net).eval()
    labels = torch.tensor([0, 1, 2, 1])
    images = torch.randn(4, 3, 24, 24)
    masks = ops.cam(branch.maps(images), branch.cam_weights(labels).detach())
    composed = ops.soft_compose(images, masks)
    theta = dict(net.named_parameters())
    loss = nn.functional.cross_entropy(net(composed), labels)
    grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    stepped = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    outer = nn.functional.cross_entropy(torch.func.functional_call(net, stepped, (images,)), labels)
    activations = [part for part in branch.modules() if isinstance(part, Pade)]
    hyper = torch.autograd.grad(outer, [a.numerator for a in activations])
    assert len(activations) == 17
    assert all(bool(h.isfinite().all()) and bool(h.any()) for h in hyper)


class Reused(nn.Module):
    """One activation in two places, as many users' networks have it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(2, 2), nn.Linear(2, 2), nn.GELU()

    def forward(self, x):
        return self.act(self.b(self.act(self.a(x))))


def test_other_activations_and_one_that_is_reused():
    module = Reused().double().eval()
    branch = share_with_pade(module, (nn.GELU, nn.SiLU), degrees=(3, 2), version="B")
    assert isinstance(branch.act, Pade) and branch.act.degrees == (3, 2)
    assert branch.act.version == "B" and not branch.act.training
    assert branch(torch.randn(3, 2).double()).dtype == torch.float64


def test_an_activation_by_itself():
    assert isinstance(share_with_pade(nn.ReLU()), Pade)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), Reused()])
def test_a_module_without_activation_modules(module):
    with pytest.raises(ValueError, match="has no ReLU module to replace; give each"):
        share_with_pade(module)
