"""The multilayer perceptron as a backbone: its maps, its options, what is made of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcil.curvature import KroneckerFactors
from fastcil.engine.groups import NetworkOptions
from fastcil.engine.resolve import make_backbone_builder, settle
from fastcil.errors import FastcilError
from fastcil.nn import LinearHead, Network, build_backbone, linearize, mlp, share_with_pade
from fastcil.nn.backbones import default_width


def naive(network, images):
    x = images.flatten(1)
    for layer in network.layers:
        x = (x @ layer[0].weight.T + layer[0].bias).clamp(min=0)
    return x[:, :, None, None]


@pytest.mark.parametrize(("size", "width", "depth"), [(28, 5, 2), (7, 3, 1), (8, 4, 3)])
def test_it_is_layers_on_pixels(size, width, depth):
    network = mlp(width, size, depth).double()
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    maps = network(images)
    assert maps.shape == (4, width, 1, 1) and network.out_channels == width
    assert torch.allclose(maps, naive(network, images))
    assert torch.equal(network(images.to(memory_format=torch.channels_last)), maps)
    levels = network.levels(images)
    assert len(levels) == depth and torch.equal(levels[-1], maps)
    assert sum(isinstance(m, nn.ReLU) for m in network.modules()) == depth


def test_the_seed_settles_the_weights_and_they_stay_within_fan_in():
    torch.manual_seed(0)
    network = mlp(64, 16, 3)
    torch.manual_seed(0)
    again = mlp(64, 16, 3)
    for parameter, same in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, same)
    for layer in network.layers:
        bound = layer[0].in_features ** -0.5
        assert 0.9 * bound < layer[0].weight.abs().max() <= bound


def test_it_is_built_for_the_images():
    network = build_backbone("mlp", image_size=28)
    assert [layer[0].in_features for layer in network.layers] == [3 * 28 * 28, 256]
    assert build_backbone("mlp", width=7, image_size=9, depth=1).out_channels == 7
    assert default_width("mlp") == 256
    options = NetworkOptions(name="mlp", width=6, activation="leaky")
    settled = settle(options, 12)
    assert (settled.width, settled.stem) == (6, None)
    built = make_backbone_builder(options, 12)()
    assert built(torch.zeros(1, 3, 12, 12)).shape == (1, 6, 1, 1)
    found = [m for m in built.modules() if isinstance(m, nn.LeakyReLU)]
    assert len(found) == 2 and not any(isinstance(m, nn.ReLU) for m in built.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "image_size is None"),
        ({"image_size": 8, "stem": "cifar"}, "stem is 'cifar', and 'mlp' has none"),
        ({"image_size": 8, "width": 0}, "width is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 8, "depth": 0}, "depth is 0"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(FastcilError, match=words):
        build_backbone("mlp", **options)


@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_it_is_linearised(activation):
    torch.manual_seed(1)
    network = build_backbone("mlp", 6, 5, activation=activation).double()
    images = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    linearised = linearize(network)
    assert linearised.out_channels == 6 and torch.allclose(linearised(images), network(images))
    names = [name for name, _ in linearised.named_parameters()]
    assert names == [name for name, _ in network.named_parameters()]
    steps = [1e-6 * torch.randn_like(p) for p in network.parameters()]
    with torch.no_grad():
        moved = [p.add_(step) for p, step in zip(linearised.parameters(), steps, strict=True)]
        assert moved
        before = network(images)
        for p, step in zip(network.parameters(), steps, strict=True):
            p.add_(step)
    change = linearised(images) - before
    assert torch.allclose(change, network(images) - before, rtol=1e-4, atol=1e-10)


def test_it_has_kronecker_factors_and_learnable_activations():
    torch.manual_seed(1)
    network = Network([build_backbone("mlp", 6, 5)], LinearHead(6, 4))
    factors = KroneckerFactors(network)
    factors.update(torch.randn(8, 3, 5, 5), torch.zeros(8, dtype=torch.int64))
    names = [f"extractors.0.layers.{k}.0" for k in (0, 1)]
    assert list(factors.dense()) == [*names, "head"]
    assert share_with_pade(network)(torch.zeros(2, 3, 5, 5)).shape == (2, 4)
