from __future__ import annotations

import copy
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fastcil.errors import FastcilError
from fastcil.nn import (
    LinearHead,
    Network,
    TangentConv2d,
    leaky,
    linearize,
    resnet18,
    resnet20,
)


class Calls(nn.Module):
    """What networks call as functions and methods."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(7, 4, 3, padding=1)
        self.drop = nn.Dropout(inplace=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        y = functional.relu(self.first(functional.pad(x, (1, 1, 1, 1), value=0.7)))
        y = self.second(torch.cat([y, x], 1)) * 2 - 0.5
        y += functional.leaky_relu(self.first(x / 3 + x), 0.2).mean((2, 3), keepdim=True)
        y = functional.dropout(1 - y, training=self.training)
        y = functional.max_pool2d(y, 3, stride=2, padding=1)[:, :, ::2, 1:]
        a, b = self.drop(y).chunk(2, 1)
        y = torch.cat([a.relu(), functional.avg_pool2d(-b, 1), torch.relu(a) - b, 0.3 * b], dim=1)
        y = functional.adaptive_avg_pool2d(y, 1).view(x.size(0), y.shape[1])
        return self.last(torch.flatten(y, 1)).relu_()


class Forked(nn.Module):
    """A convolution that a batch norm and another layer read, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.fork, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.after = nn.Conv2d(3, 3, 3, padding="same"), nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.fork(x)
        y = self.relu(self.norm(y)) + y
        return self.after(self.twice(self.relu(self.twice(y))))


def strange_convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, (3, 2), (2, 1), padding=(2, 1), dilation=(2, 1), bias=False),
        nn.BatchNorm2d(8, affine=False),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Conv2d(8, 12, 3, padding=1, groups=4),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 12, (4, 3), padding="same", groups=12, bias=False),
        nn.ReLU(),
        nn.Conv2d(12, 4, 4, padding="same", padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(4, 4, (3, 5), padding=(2, 1), padding_mode="replicate", stride=2),
        nn.Conv2d(4, 4, 3, padding="valid", padding_mode="circular"),
    )


def pools_and_linear():
    return nn.Sequential(
        nn.ZeroPad2d(1),
        nn.Conv2d(3, 5, 3),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.ReLU(),
        nn.AvgPool2d(2, 1, 1),
        nn.Dropout2d(),
        nn.Conv2d(5, 6, 2),
        nn.MaxPool2d(2, 1, dilation=2),
        nn.AdaptiveAvgPool2d((2, 1)),
        nn.Flatten(),
        nn.Linear(12, 7, bias=False),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Identity(),
        nn.Linear(7, 4),
    )


def norms_alone():
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(5, affine=False),
        nn.Linear(5, 2),
    )


NETWORKS = {
    "resnet18": lambda: resnet18(width=2, stem="cifar"),
    "resnet18 with max-pool": lambda: resnet18(width=2, last_relu=False),
    "leaky resnet18": lambda: leaky(resnet18(width=2, stem="small"), 0.05),
    "resnet20": lambda: resnet20(width=2),
    "strange convolutions": strange_convolutions,
    "pools and linear": pools_and_linear,
    "norms alone": norms_alone,
    "calls": Calls,
    "forked": Forked,
}


def draw(shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return draw((2, 3, 13, 12))


def made(name):
    """A network in evaluation, in float64, of random weights and statistics."""
    torch.manual_seed(0)
    network = NETWORKS[name]().double().eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.3, 2)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return network


def displaced(network, deviation=0.1):
    linearized = linearize(network)
    with torch.no_grad():
        for parameter in linearized.parameters():
            parameter.normal_(std=deviation)
    return linearized


def folded(network):
    """The same network, each batch norm that is listed after a layer folded into it, by hand."""
    network = copy.deepcopy(network)
    for owner in [] if isinstance(network, Forked) else list(network.modules()):
        parts = list(owner.named_children())
        for (_, layer), (name, norm) in pairwise(parts):
            if not isinstance(layer, nn.Conv2d | nn.Linear) or "BatchNorm" not in repr(norm)[:9]:
                continue
            a = (norm.running_var + norm.eps) ** -0.5 * (norm.weight if norm.affine else 1)
            b = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
            layer.weight = nn.Parameter(torch.einsum("o,o...->o...", a, layer.weight).detach())
            layer.bias = nn.Parameter((a * b + (norm.bias if norm.affine else 0)).detach())
            setattr(owner, name, nn.Identity())
    return network


def expansion(network, psi, x):
    """g and D_psi g psi of a network, by torch's own forward differentiation."""
    base = {name: network.get_parameter(name).detach() for name in psi}
    return jvp(lambda weights: functional_call(network, weights, (x,)), (base,), (psi,))


def psi_of(linearized):
    return {name: parameter.detach() for name, parameter in linearized.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_is_the_first_order_expansion(name, x):
    network = made(name)
    linearized = displaced(network)
    primal, tangent = linearized.tangent(x)
    by_hand = folded(network)
    expected, derivative = expansion(by_hand, psi_of(linearized), x)
    tolerance = {"rtol": 0, "atol": 1e-10 * float(derivative.detach().abs().max())}
    torch.testing.assert_close(primal, expected, **tolerance)
    torch.testing.assert_close(primal, network(x), **tolerance)
    torch.testing.assert_close(tangent, derivative, **tolerance)
    assert (
        torch.equal(linearized(x), primal + tangent) and tangent.abs().min() < tangent.abs().max()
    )
    parametric = {n: p for n, p in by_hand.named_modules() if isinstance(p, nn.Conv2d | nn.Linear)}
    assert set(psi_of(linearized)) == {
        f"{path}.{name}" for path, part in parametric.items() for name, _ in part.named_parameters()
    }


def test_in_float32():
    network = made("resnet18").float()
    linearized = displaced(network)
    x = torch.randn(2, 3, 16, 16)
    exact = sum(expansion(folded(network).double(), psi_of(linearized.double()), x.double()))
    error = torch.linalg.vector_norm(linearized.float()(x) - exact)
    assert error < 1e-5 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("name", ["resnet18", "norms alone", "calls"])
def test_starts_as_the_network_whatever_the_mode(name, x):
    network = made(name)
    before = copy.deepcopy(network.state_dict())
    linearized = linearize(network.train())
    outputs = [linearized.train(mode)(x) for mode in (True, False)]
    assert torch.equal(*outputs)
    assert network.training and all(
        torch.equal(value, before[key]) for key, value in network.state_dict().items()
    )
    torch.testing.assert_close(outputs[0], network.eval()(x))
    assert all(p.requires_grad and not p.any() for p in linearized.parameters())
    assert not any(buffer.requires_grad for buffer in linearized.buffers())


def test_is_linear_in_the_displacement(x):
    linearized = linearize(made("leaky resnet18"))
    one, two = ({k: draw(p.shape) for k, p in linearized.named_parameters()} for _ in range(2))

    def of(a, b):
        return functional_call(linearized, {k: a * one[k] + b * two[k] for k in one}, (x,))

    torch.testing.assert_close(
        of(0.3, -1.7) - of(0, 0),
        0.3 * (of(1, 0) - of(0, 0)) - 1.7 * (of(0, 1) - of(0, 0)),
        rtol=0,
        atol=1e-11 * float(of(1, 1).detach().abs().max()),
    )
    # And so the squared error is quadratic: its third differences vanish.
    target = torch.randn_like(of(0, 0))
    losses = torch.stack([(of(t, 1 - t) - target).square().mean() for t in range(4)])
    assert abs(losses.diff(n=3).item()) < 1e-12 * losses.max() < losses.diff(n=2).abs().min()


@pytest.mark.parametrize("name", ["resnet18 with max-pool", "resnet20", "calls", "forked"])
def test_gradient_is_that_of_the_network_at_its_weights(name, x):
    network = made(name)
    linearized, by_hand = displaced(network), folded(network)
    output = linearized(x)
    v = torch.randn_like(output)
    got = torch.autograd.grad(output, list(linearized.parameters()), v)
    weights = [by_hand.get_parameter(n) for n, _ in linearized.named_parameters()]
    expected = torch.autograd.grad(by_hand(x), weights, v)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_gradient_to_the_images(x):
    network = made("resnet20")
    linearized, by_hand = displaced(network), folded(network)
    x.requires_grad_()
    got = torch.autograd.grad(linearized(x).square().sum(), x)[0]
    total = sum(expansion(by_hand, psi_of(linearized), x)).square().sum()
    torch.testing.assert_close(got, torch.autograd.grad(total, x)[0], rtol=1e-9, atol=1e-9)


def test_double_backward_gives_products_with_the_hessian(x):
    linearized = displaced(made("pools and linear"))
    psi = list(linearized.parameters())
    v = [torch.randn_like(p) for p in psi]
    first = torch.autograd.grad(linearized(x).square().sum() / 2, psi, create_graph=True)
    product = torch.autograd.grad(sum((g * w).sum() for g, w in zip(first, v, strict=True)), psi)
    names = [name for name, _ in linearized.named_parameters()]
    _, jv = jvp(
        lambda p: functional_call(linearized, p, (x,)),
        (psi_of(linearized),),
        (dict(zip(names, v, strict=True)),),
    )
    expected = torch.autograd.grad(linearized(x), psi, jv)
    for one, other in zip(product, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


class Convolutions(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def test_costs_three_convolutions_and_two_in_the_backward(x):
    linearized = linearize(made("resnet18"))
    layers = sum(isinstance(part, TangentConv2d) for part in linearized.modules())
    with Convolutions() as counter:
        output = linearized(x)
    # The first layer has no tangent to pass on.
    assert counter.calls[torch.ops.aten.convolution.default] == 3 * layers - 1
    with Convolutions() as counter:
        output.sum().backward()
    assert counter.calls[torch.ops.aten.convolution_backward.default] == 2 * layers - 1


@pytest.mark.parametrize("name", ["resnet18 with max-pool", "pools and linear"])
def test_layouts_copies_and_states(name, x):
    linearized = displaced(made(name))
    output = linearized(x)
    strided = torch.stack([x, x], -1)[..., 0]
    for images in (strided, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(linearized(images), output)
    assert torch.equal(copy.deepcopy(linearized)(x), output)
    other = linearize(NETWORKS[name]().double())
    other.load_state_dict(linearized.state_dict())
    assert torch.equal(other(x), output)
    assert linearized(x[:0]).shape == (0, *output.shape[1:])
    assert torch.equal(torch.compile(linearized, fullgraph=True, backend="eager")(x), output)


def test_channels_last_stays(x):
    linearized = linearize(made("resnet18 with max-pool"))
    images = x.repeat(1, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    primal, tangent = linearized.tangent(images)
    assert primal.is_contiguous(memory_format=torch.channels_last)
    assert tangent.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["leaky resnet18", "pools and linear"])
def test_autocast(name):
    linearized = displaced(made(name).float(), 0.01)
    x = torch.randn(2, 3, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        output = linearized(x)
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in linearized.parameters())
    exact = linearized(x)
    error = torch.linalg.vector_norm(output - exact)
    assert error < 0.05 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("name", ["resnet18 with max-pool", "leaky resnet18"])
def test_gradients_of_each_image(name, x):
    linearized = displaced(made(name))

    def loss(psi, images):
        return functional_call(linearized, psi, (images,)).square().sum()

    psi = psi_of(linearized)
    each = vmap(grad(lambda psi, image: loss(psi, image[None])), (None, 0))(psi, x)
    expected = grad(loss)(psi, x[1:])
    for key in psi:
        torch.testing.assert_close(each[key][1], expected[key], rtol=1e-9, atol=1e-9)


def test_an_extractor_whose_layers_can_be_hooked(x):
    network = Network([linearize(made("resnet18"))], LinearHead(16, classes=4).double())
    assert network.extractors[0].out_channels == 16 and network(x).shape == (2, 4)
    layers = [part for part in network.modules() if isinstance(part, TangentConv2d)]
    layer, seen = layers[3], {}
    layer.register_forward_hook(lambda _, given, result: seen.update(a=given[0], g=result.tangent))
    logits = network(x)
    seen["g"].retain_grad()
    logits.square().sum().backward()
    patches = functional.unfold(seen["a"], layer.kernel_size, layer.dilation, layer.padding, 1)
    assert layer.stride == (1, 1) and layer.groups == 1
    gradient = torch.einsum("nol,nil->oi", seen["g"].grad.flatten(2), patches)
    torch.testing.assert_close(layer.weight.grad.flatten(1), gradient)
    network.freeze(0)
    assert not any(p.requires_grad for p in network.extractors.parameters())


def test_leaky():
    network = leaky(resnet18(width=2), 0.2)
    slopes = [p.negative_slope for p in network.modules() if isinstance(p, nn.LeakyReLU)]
    assert slopes == [0.2] * 17 and not any(isinstance(p, nn.ReLU) for p in network.modules())
    shared = nn.ReLU()
    twice = leaky(nn.Sequential(shared, nn.Sequential(shared)).eval())
    assert twice[0] is twice[1][0] and twice[0].negative_slope == 0.01 and not twice[0].training
    assert isinstance(leaky(nn.ReLU()), nn.LeakyReLU)
    with pytest.raises(FastcilError, match="slope is 0; it must be above 0"):
        leaky(network, 0)
    with pytest.raises(FastcilError, match=r"Calls has no nn\.ReLU module"):
        leaky(Calls())
