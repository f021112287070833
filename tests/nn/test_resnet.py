from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcil.nn import BACKBONES, build_backbone, resnet18, resnet20, resnet32, stem_for
from fastcil.nn.backbones import default_width
from fastcil.nn.resnet import PaddedShortcut, ResNet


def count(module, kind):
    return sum(isinstance(part, kind) for part in module.modules())


# He et al. 2016: 11.69 M parameters for ResNet-18 with its 513,000 of the classifier; 0.27 M and
# 0.46 M for ResNet-20 and ResNet-32 with 650 of theirs.
@pytest.mark.parametrize(
    ("network", "parameters", "convolutions", "activations", "channels"),
    [
        (resnet18(), 11_689_512 - 513_000, 20, 17, 512),
        (resnet20(), 269_722 - 650, 19, 19, 64),
        (resnet32(), 464_154 - 650, 31, 31, 64),
        (resnet18(last_relu=False), 11_689_512 - 513_000, 20, 16, 512),
        (resnet32(last_relu=False), 464_154 - 650, 31, 30, 64),
    ],
    ids=["resnet18", "resnet20", "resnet32", "resnet18 open", "resnet32 open"],
)
def test_architecture(network, parameters, convolutions, activations, channels):
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert count(network, nn.Conv2d) == convolutions
    assert count(network, nn.ReLU) == activations
    assert network.out_channels == channels


@pytest.mark.parametrize(
    ("name", "stem", "size", "shapes"),
    [
        ("resnet18", "imagenet", 64, [(4, 16), (8, 8), (16, 4), (32, 2)]),
        ("resnet18", "small", 64, [(4, 32), (8, 16), (16, 8), (32, 4)]),
        ("resnet18", "cifar", 32, [(4, 32), (8, 16), (16, 8), (32, 4)]),
        ("resnet20", "cifar", 33, [(4, 33), (8, 17), (16, 9)]),
        ("resnet32", "small", 30, [(4, 15), (8, 8), (16, 4)]),
    ],
)
def test_levels(name, stem, size, shapes):
    network = build_backbone(name, width=4, stem=stem).eval()
    images = torch.randn(2, 3, size, size)
    levels = network.levels(images)
    assert [(level.shape[1], level.shape[2]) for level in levels] == shapes
    assert torch.equal(levels[-1], network(images))


def test_last_relu():
    images = torch.randn(4, 3, 16, 16)
    closed, open_ = resnet20(width=4), resnet20(width=4, last_relu=False)
    open_.load_state_dict(closed.state_dict())
    assert closed(images).amin() >= 0 > open_(images).amin()
    torch.testing.assert_close(open_(images).relu(), closed(images))


def test_padded_shortcut_keeps_every_other_pixel_and_appends_zeros():
    x = torch.randn(2, 3, 5, 4)
    y = PaddedShortcut(2, 2)(x)
    assert torch.equal(y[:, :3], x[:, :, [0, 2, 4]][:, :, :, [0, 2]])
    assert y.shape == (2, 5, 3, 2) and not y[:, 3:].any()


def test_initialisation():
    torch.manual_seed(0)
    network = resnet18()
    weight = network.stages[2][1].conv1.weight
    assert abs(float(weight.detach().std()) / (2 / (256 * 9)) ** 0.5 - 1) < 0.01
    torch.manual_seed(0)
    again = dict(resnet18().named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in network.named_parameters())
    zeroed = resnet20(width=4, zero_init_residual=True)
    assert all(not block.bn2.weight.any() for stage in zeroed.stages for block in stage)


def test_every_activation_is_a_module_of_its_own():
    network = ResNet((2, 2), 4, "cifar")
    calls = []
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, *_: calls.append(id(module)))
    network(torch.randn(1, 3, 8, 8))
    assert len(calls) == len(set(calls)) == count(network, nn.ReLU) == 9


@pytest.mark.parametrize(
    ("size", "stem"),
    [(28, "cifar"), (40, "cifar"), (41, "small"), (112, "small"), (113, "imagenet")],
)
def test_the_stem_follows_the_image_size(size, stem):
    assert stem_for(size) == stem
    built = build_backbone("resnet20", width=4, image_size=size)
    expected = resnet20(width=4, stem=stem)
    assert [p.shape for p in built.parameters()] == [p.shape for p in expected.parameters()]
    assert count(built, nn.MaxPool2d) == (stem == "imagenet")
    assert built.stem[0].stride == ((1, 1) if stem == "cifar" else (2, 2))


def test_a_stem_that_is_named_wins():
    network = build_backbone("resnet18", width=4, image_size=32, stem="imagenet", last_relu=False)
    assert network.stem[0].kernel_size == (7, 7)
    assert build_backbone("resnet18", width=4).stem[0].kernel_size == (7, 7)
    assert build_backbone("resnet32").out_channels == 64


@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_leaky_activations_leave_names_and_initial_weights(name):
    torch.manual_seed(3)
    plain = build_backbone(name, width=4)
    torch.manual_seed(3)
    network = build_backbone(name, width=4, activation="leaky")
    found = [m for m in network.modules() if isinstance(m, nn.LeakyReLU)]
    assert len(found) == count(plain, nn.ReLU) and count(network, nn.ReLU) == 0
    assert {m.negative_slope for m in found} == {0.01}
    assert [n for n, _ in network.named_modules()] == [n for n, _ in plain.named_modules()]
    for (key, value), (other, same) in zip(
        network.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert key == other and torch.equal(value, same)
    images = torch.randn(2, 3, 16, 16)
    assert network(images).amin() < 0 <= plain(images).amin()


def test_default_widths():
    residual = [name for name in BACKBONES if name != "mlp"]
    assert {name: default_width(name) for name in residual} == {
        name: BACKBONES[name]().stem[0].out_channels for name in residual
    }


def test_a_users_own_backbone(monkeypatch):
    monkeypatch.setitem(BACKBONES, "mine", lambda width=8: nn.Conv2d(3, width, 3))
    assert build_backbone("mine", width=5).out_channels == 5
    assert default_width("mine") == 8
    monkeypatch.setitem(BACKBONES, "fixed", lambda: nn.Conv2d(3, 2, 3))
    assert default_width("fixed") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet19",), "backbone is 'resnet19'; the nearest known one is 'resnet1"),
        (("Resnet-32",), "nearest known one is 'resnet32'"),
        (("zzz",), "nearest known one is 'resnet"),
        (("resnet18", 0), "width is 0"),
        (("resnet18", 4, 32, "tiny"), "stem is 'tiny'; it must be one of imagenet, small, cifar"),
        (("resnet18", 4, 32, None, "elu"), "activation is 'elu'; it must be one of relu, leaky"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(*arguments)
