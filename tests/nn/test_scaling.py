"""Frozen convolutions with a learnable scale per pair of channels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastcil.nn import LinearHead, Network, resnet18, resnet20, share_with_pade
from fastcil.nn.scaling import ScaledConv2d, has_scales, merge_scales, scale_convolutions

CASES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (1, 3), "stride": 2, "bias": False},
    {"kernel_size": 3, "groups": 2, "dilation": 2},
    {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_every_pair_of_channels_has_its_scale(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **options).double()
    scaled = ScaledConv2d(conv)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    assert torch.equal(scaled(x), conv(x))
    with torch.no_grad():
        scaled.scale.normal_()
    weight = conv.weight.detach().numpy().copy()
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            weight[o, i] *= float(scaled.scale[o, i, 0, 0].detach())
    expected = copy.deepcopy(conv)
    expected.weight.data = torch.from_numpy(weight)
    torch.testing.assert_close(scaled(x), expected(x), rtol=1e-13, atol=1e-13)
    merged = scaled.merged()
    assert type(merged) is nn.Conv2d and torch.equal(merged(x), scaled(x))
    assert merged.extra_repr() == conv.extra_repr() == scaled.extra_repr()


def test_gradients_of_all_orders():
    torch.manual_seed(0)
    scaled = ScaledConv2d(nn.Conv2d(2, 3, 2).double())
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    scale = scaled.scale.detach().clone().normal_().requires_grad_()

    def function(x, scale):
        return torch.func.functional_call(scaled, {"scale": scale}, (x,))

    assert torch.autograd.gradcheck(function, (x, scale))
    assert torch.autograd.gradgradcheck(function, (x, scale))


def test_only_scales_and_norms_and_biases_train():
    torch.manual_seed(0)
    network = resnet18(width=4, stem="cifar")
    names = {name for name, _ in network.named_parameters()}
    images = torch.randn(2, 3, 16, 16)
    expected = network.eval()(images)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    state = torch.get_rng_state()
    assert scale_convolutions(network.train()) is network
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(network.eval()(images), expected)
    now = dict(network.named_parameters())
    convolutions = {k for k, v in before.items() if v.ndim == 4}
    assert now.keys() == (names - convolutions) | {
        k.removesuffix("weight") + "scale" for k in convolutions
    }
    assert {k for k in network.state_dict() if not k.endswith(".scale")} == before.keys()
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1)
    network(images).square().sum().backward()
    optimizer.step()
    after = network.state_dict()
    for name in convolutions:
        assert torch.equal(after[name], before[name])
        assert not torch.equal(
            after[name.removesuffix("weight") + "scale"], torch.ones(*before[name].shape[:2], 1, 1)
        )
    assert not torch.equal(after["stem.1.weight"], before["stem.1.weight"])


def test_scaling_again_goes_on_from_the_scales():
    network = scale_convolutions(resnet20(width=2))
    parts = dict(network.named_modules())
    scale_convolutions(network)
    assert all(parts[name] is part for name, part in network.named_modules())


def test_merging_computes_the_same_and_trains_again():
    torch.manual_seed(0)
    network = scale_convolutions(resnet20(width=2).double()).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("scale"):
                parameter.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected, modules = network(images), [name for name, _ in network.named_modules()]
    assert has_scales(network)
    assert merge_scales(network) is network and not has_scales(network)
    assert torch.equal(network(images), expected)
    assert [name for name, _ in network.named_modules()] == modules
    plain = resnet20(width=2).double()
    assert dict(plain.named_parameters()).keys() == dict(network.named_parameters()).keys()
    plain.load_state_dict(network.state_dict())
    network(images).sum().backward()
    assert network.stem[0].weight.grad.any()
    bare = nn.Sequential(nn.ReLU())
    assert merge_scales(bare) is bare


def test_a_convolution_in_two_places_stays_one():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    network = scale_convolutions(nn.Sequential(conv, nn.ReLU(), conv))
    assert isinstance(network[0], ScaledConv2d) and network[0] is network[2]


def test_restored_from_a_file():
    torch.manual_seed(0)
    network = Network([scale_convolutions(resnet20(width=2))], LinearHead(8, 3)).eval()
    with torch.no_grad():
        network.extractors[0].stem[0].scale.normal_()
    twin = Network.build(network.structure(), lambda: scale_convolutions(resnet20(width=2)))
    twin.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(twin.eval()(images), network(images))


def test_a_pade_branch_shares_scales_and_weights():
    network = scale_convolutions(resnet20(width=2))
    branch = share_with_pade(network)
    assert branch.stem[0].scale is network.stem[0].scale
    assert branch.stem[0].weight is network.stem[0].weight


def test_training_mode_and_device_follow():
    network = scale_convolutions(resnet20(width=2).eval())
    assert not any(part.training for part in network.modules())
    half = network.to(torch.bfloat16)
    assert half.stem[0].weight.dtype == half.stem[0].scale.dtype == torch.bfloat16


class Standardised(nn.Conv2d):
    """Computes something else than a convolution with its weight."""


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "module Sequential has no nn.Conv2d in it"),
        (nn.Sequential(Standardised(2, 2, 1)), "conv is a Standardised; only nn.Conv2d itself"),
    ],
)
def test_what_cannot_be_scaled(module, message):
    with pytest.raises(ValueError, match=message):
        scale_convolutions(module)


def test_where_one_cannot_be_scaled_none_is():
    module = nn.Sequential(nn.Conv2d(3, 3, 1), Standardised(3, 3, 1))
    with pytest.raises(ValueError, match="Standardised"):
        scale_convolutions(module)
    assert type(module[0]) is nn.Conv2d
