from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import jvp
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.nn.tangent import (
    FrozenAffine,
    TangentConv2d,
    TangentLinear,
    activation_tangent,
    pooled_tangent,
)


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("layer", "kind", "shape"),
    [
        (nn.Conv2d(4, 6, 3, 2, 1, 2, groups=2), TangentConv2d, (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, (2, 3), padding="same", bias=False), TangentConv2d, (2, 4, 5, 5)),
        (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), TangentConv2d, (2, 2, 5, 5)),
        (nn.Conv2d(2, 3, 4, padding="same", padding_mode="reflect"), TangentConv2d, (2, 2, 5, 7)),
        (nn.Linear(3, 5), TangentLinear, (4, 3)),
        (nn.Linear(3, 5, bias=False), TangentLinear, (4, 2, 3)),
    ],
)
def test_layers_are_derivatives(layer, kind, shape):
    torch.manual_seed(0)
    layer = layer.double()
    tangent = kind(layer)
    assert not tangent(draw(*shape)).tangent.any()
    for parameter in tangent.parameters():
        nn.init.normal_(parameter)
    x, dx = draw(*shape), draw(*shape)
    names = [name for name, _ in layer.named_parameters()]
    base = {name: layer.get_parameter(name).detach() for name in names}
    psi = {name: tangent.get_parameter(name).detach() for name in names}

    def call(weights, x):
        return torch.func.functional_call(layer, weights, (x,))

    for given, direction in ((dx, dx), (None, torch.zeros_like(x))):
        y, dy = tangent(x, given)
        expected, derivative = jvp(call, (base, x), (psi, direction))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(dy, derivative)
    assert not y.requires_grad and dy.requires_grad
    assert repr(tangent).startswith(kind.__name__)
    # The layer it was made of goes its own way.
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(tangent(x).primal, y)


def test_layer_attributes():
    conv = nn.Conv2d(4, 6, (3, 1), 2, (1, 0), 3, groups=2, bias=False, padding_mode="circular")
    layer = TangentConv2d(conv)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    for name in (*names, "groups", "padding_mode"):
        assert getattr(layer, name) == getattr(conv, name)
    assert layer.bias is None and layer.base_bias is None and layer.weight.shape == (6, 2, 3, 1)
    linear = TangentLinear(nn.Linear(3, 2))
    assert (linear.in_features, linear.out_features) == (3, 2)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2), (3, 4, 2, 5)])
def test_frozen_affine_is_the_batch_norm_in_evaluation(affine, shape):
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(4, affine=affine).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    layer, x, dx = FrozenAffine(norm), draw(*shape), draw(*shape)
    y, dy = jvp(norm.eval(), (x,), (dx,))
    torch.testing.assert_close(layer(x, dx), (y.detach(), dy.detach()))
    assert layer(x).tangent is None and not list(layer.parameters())


def test_frozen_affine_needs_statistics():
    with pytest.raises(FastcilError, match="track_running_stats=True would do"):
        FrozenAffine(nn.BatchNorm2d(3, track_running_stats=False))


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
def test_activation_tangent(slope):
    x = torch.cat([draw(50), torch.zeros(3)]).double()
    dx = draw(53).requires_grad_()
    y = functional.leaky_relu(x, slope)
    expected = torch.where(x > 0, dx, slope * dx)
    assert torch.equal(activation_tangent(y, dx, slope), expected)
    assert torch.autograd.gradcheck(lambda dx: activation_tangent(y, dx, slope), dx)
    assert torch.autograd.gradgradcheck(lambda dx: activation_tangent(y, dx, slope), dx)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 1, 0)])
def test_pooled_tangent(window, layout):
    x, dx = (draw(2, 3, 7, 6).contiguous(memory_format=layout) for _ in range(2))
    y, places = functional.max_pool2d_with_indices(x, *window)
    expected = jvp(lambda x: functional.max_pool2d(x, *window), (x,), (dx,))[1]
    dy = pooled_tangent(dx, places)
    assert torch.equal(dy, expected) and dy.is_contiguous(memory_format=layout)
    assert pooled_tangent(dx[:0], places[:0]).shape == (0, *y.shape[1:])
    assert torch.autograd.gradgradcheck(
        lambda dx: pooled_tangent(dx, places), dx.requires_grad_(), fast_mode=True
    )
