from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastcil import ops
from fastcil.nn import (
    LinearHead,
    Network,
    Pade,
    replace_activations,
    resnet18,
    resnet20,
    share_with_pade,
)

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


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


@pytest.mark.parametrize("share", [False, True])
def test_other_activations_and_one_that_is_reused(share):
    model = Reused().double().eval()
    kinds = (nn.GELU, nn.SiLU)
    result, names = replace_activations(model, kinds, (3, 2), "B", groups=2, share=share)
    assert (result is model) != share and names == ("act",)
    assert isinstance(result.act, Pade) and not result.act.training
    assert (result.act.degrees, result.act.version, result.act.groups) == ((3, 2), "B", 2)
    assert result(torch.randn(3, 2).double()).dtype == torch.float64


def test_replaces_in_place_and_says_where():
    model = resnet20(width=2)
    before = dict(model.named_parameters())
    places = [name for name, part in model.named_modules() if isinstance(part, nn.ReLU)]
    result, names = replace_activations(model)
    assert result is model and list(names) == places and len(places) == 19
    assert [name for name, part in model.named_modules() if isinstance(part, Pade)] == places
    assert not any(isinstance(part, nn.ReLU) for part in model.modules())
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in before.items())
    assert len(after) == len(before) + 2 * 19
    model(IMAGES).sum().backward()
    assert all(value.grad is not None for value in after.values())


def test_a_copied_branch_has_weights_of_its_own():
    net = network()
    branch = replace_activations(copy.deepcopy(net)).model
    assert branch.head.weight is not net.head.weight
    assert torch.equal(branch.head.weight, net.head.weight)


def test_a_module_of_two_names_stays_one():
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    shared = nn.ReLU()
    model = nn.ModuleDict({"a": block, "b": block, "c": shared, "d": shared})
    model, names = replace_activations(model)
    assert sorted(names) == ["a.1", "b.1", "c", "d"]
    assert model["a"][1] is model["b"][1] and model["c"] is model["d"]
    assert model["a"][1] is not model["c"]


@pytest.mark.parametrize(
    "part",
    [
        nn.ReLU(),
        nn.LeakyReLU(),
        nn.LeakyReLU(0.3, inplace=True),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.Tanh(),
        nn.Softplus(),
        nn.PReLU(),
    ],
    ids=str,
)
def test_each_starts_as_what_it_replaces(part):
    model = nn.Sequential(nn.Linear(2, 2), part, copy.deepcopy(part))
    replace_activations(model, type(part), (6, 5))
    x = torch.linspace(-3, 3, 601)
    for place in (1, 2):
        torch.testing.assert_close(model[place](x), part(x.clone()), rtol=0, atol=0.03)
    assert model[1] is not model[2] and model[1].numerator is not model[2].numerator


def test_starts_as_it_is_told():
    model = nn.Sequential(nn.ReLU(), nn.Tanh())
    x = torch.linspace(-3, 3, 601)
    for init in ("silu", nn.functional.silu):
        replaced, names = replace_activations(copy.deepcopy(model), (nn.ReLU, nn.Tanh), init=init)
        assert names == ("0", "1")
        for part in replaced:
            torch.testing.assert_close(part(x), nn.functional.silu(x), rtol=0, atol=1e-3)


def test_an_activation_by_itself():
    assert isinstance(share_with_pade(nn.ReLU()), Pade)
    result, names = replace_activations(nn.ReLU().eval())
    assert isinstance(result, Pade) and not result.training and names == ("",)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), Reused()])
def test_a_module_without_activation_modules(module):
    with pytest.raises(ValueError, match="has no ReLU module to replace; give each"):
        share_with_pade(module)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.Unflatten(0, (1, -1)), "changes the shape of its input"),
        (nn.PReLU(4), "no function of one number"),
    ],
)
def test_what_is_no_function_of_one_number(part, message):
    with pytest.raises(ValueError, match=message):
        replace_activations(nn.Sequential(part), type(part))
    assert isinstance(
        replace_activations(nn.Sequential(part), type(part), init="relu").model[0], Pade
    )


@pytest.mark.parametrize("share", [False, True])
def test_torchs_encoder_has_no_way_around_them(share):
    """In evaluation it computes in one operation what its activation was when it was made."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = layer(x)
        replaced, names = replace_activations(layer, init=torch.sin, share=share)
        assert names == ("activation",)
        assert not torch.allclose(replaced(x), before, atol=1e-2)
        assert not share or torch.equal(layer(x), before)
