"""Masks over channels against their equations, and pruned networks against masked ones."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from backbones import ConvNet
from torch import nn

from fastcil.errors import FastcilError
from fastcil.nn import LinearHead, Network, share_with_pade
from fastcil.nn.channel_masks import ChannelMask, MaskedResNet, layers
from fastcil.nn.pruning import PrunedResNet, prune
from fastcil.nn.resnet import ResNet

SHAPES = {
    "projected": {"blocks": (2, 1), "width": 4, "stem": "imagenet"},
    "padded": {"blocks": (2, 2), "width": 5, "stem": "cifar", "projected": False},
    "unrectified": {"blocks": (1, 1, 1), "width": 3, "stem": "small", "last_relu": False},
}
SURE = 50.0


def body(shape: str, seed: int = 0) -> ResNet:
    """A network in float64 whose batch norms are not those of the start."""
    torch.manual_seed(seed)
    network = ResNet(**SHAPES[shape]).double()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                tensor.data.uniform_(0.5, 2.5)
    return network


def masked(shape: str, seed: int = 0, off: float = 0.5) -> MaskedResNet:
    """Masks that are 0 or 1 to the last bit, ``off`` of them 0."""
    network = MaskedResNet(body(shape, seed), scale=SURE)
    generator = torch.Generator().manual_seed(seed)
    for mask in network.masks:
        draw = torch.rand(mask.logits.shape, generator=generator)
        draw[0] = draw[0] if off == 1.0 else 1.0
        mask.logits.data = torch.where(draw < off, -SURE, SURE).double()
    return network


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5)).double()


def convolution_weights(network: nn.Module) -> int:
    return sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("scale", [1 / 400, 0.7, 1.0, 6.0, 8.0])
def test_mask_and_its_compensated_gradient(scale):
    e = np.array([-2.0, -0.3, 0.0, 0.4, 1.5])
    mask = ChannelMask(5, scale).double()
    mask.logits.data = torch.from_numpy(e)
    g = np.linspace(-1, 2, 5)
    (mask.values() * torch.from_numpy(g)).sum().backward()

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    sharp = sigmoid(mask.scale.item() * e)
    s = mask.scale.item()
    plain = g * s * sharp * (1 - sharp)
    slope = sigmoid(e) * (1 - sigmoid(e))
    exact = torch.sigmoid(mask.scale * mask.logits)
    assert torch.equal(mask.values().detach(), exact.detach())
    np.testing.assert_allclose(mask.values().detach(), sharp, rtol=1e-12)
    np.testing.assert_allclose(
        mask.logits.grad, plain * slope / (s * sharp * (1 - sharp)), rtol=1e-9
    )


def test_gradient_is_there_where_the_sigmoid_has_none():
    mask = ChannelMask(2, scale=1e4)
    mask.values().sum().backward()
    assert torch.equal(mask.values().detach(), torch.ones(2))
    torch.testing.assert_close(mask.logits.grad, torch.full((2,), 0.19661193))


def test_maps_keep_their_dtype():
    mask = ChannelMask(2, scale=1.0)
    assert mask(torch.ones(1, 2, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES)
def test_share_of_weights_in_use(shape):
    network = MaskedResNet(body(shape), scale=0.8)
    for number, mask in enumerate(network.masks):
        mask.logits.data = torch.linspace(-1, 1 + number / 3, len(mask.logits)).double()
    norms = [torch.sigmoid(m.scale * m.logits).sum().item() for m in network.masks]
    assert len(norms) == 1 + 2 * sum(SHAPES[shape]["blocks"])
    plain = body(shape)
    first = plain.stem[0]
    used = first.kernel_size[0] ** 2 * 3 * norms[0]
    place = 0
    for stage in plain.stages:
        for block in stage:
            used += 9 * norms[place] * norms[place + 1] + 9 * norms[place + 1] * norms[place + 2]
            if isinstance(block.shortcut, nn.Sequential):
                used += norms[place] * norms[place + 2]
            place += 2
    assert network.used().item() == pytest.approx(used / convolution_weights(plain), rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("off", [0.0, 0.5, 1.0])
def test_pruned_computes_what_masked_did(shape, training, off):
    whole = masked(shape, off=off)
    small = prune(whole)
    whole.train(training)
    small.train(training)
    last = whole.masks[-1].kept()
    assert small.out_channels == len(last) == small(images()).shape[1]
    if off == 1.0:
        # A map without any channel keeps one.
        assert [len(kept) for kept in small.kept] == [1] * len(whole.masks)
        for mask, kept in zip(whole.masks, small.kept, strict=True):
            mask.logits.data[kept] = SURE
    expected, found = whole(images()), small(images())
    torch.testing.assert_close(found, expected[:, last], rtol=1e-9, atol=1e-9)
    assert expected.abs().max() > 0.1
    gone = torch.ones(expected.shape[1], dtype=torch.bool)
    gone[last] = False
    assert not expected[:, gone].any()
    for ours, theirs in zip(small.levels(images()), whole.levels(images()), strict=True):
        assert ours.shape[2:] == theirs.shape[2:]
    # The share that masks leave in use is that of the weights still there.
    share = convolution_weights(small) / convolution_weights(body(shape))
    assert whole.used().item() == pytest.approx(share, rel=1e-9)
    assert share == 1.0 if off == 0.0 else share < 0.6


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_what_is_left_are_those_of_the_whole(shape):
    whole = masked(shape).train()
    small = prune(whole).train()
    for network in (whole, small):
        network(images()).square().sum().backward()
    for own, wide in zip(layers(small.body), layers(whole.body), strict=True):
        outputs = small.kept[own.writes]
        grad = wide.conv.weight.grad[outputs]
        grad = grad if own.reads < 0 else grad[:, small.kept[own.reads]]
        torch.testing.assert_close(own.conv.weight.grad, grad, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(own.norm.bias.grad, wide.norm.bias.grad[outputs])


def test_pruning_leaves_the_masked_network_as_it_was():
    whole = masked("padded")
    before = copy.deepcopy(whole.state_dict())
    small = prune(whole)
    assert all(torch.equal(v, before[k]) for k, v in whole.state_dict().items())
    shared = {p.data_ptr() for p in whole.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not shared
    assert sum(p.nbytes for p in small.parameters()) < 0.5 * sum(
        p.nbytes for p in whole.parameters()
    )


def test_memory_format_is_kept():
    whole = masked("projected").to(memory_format=torch.channels_last)
    small = prune(whole)
    for conv in (m for m in small.modules() if isinstance(m, nn.Conv2d)):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES)
def test_restored_from_its_structure(shape):
    extractors = [
        masked(shape, 1),
        prune(masked(shape, 2)),
        prune(masked(shape, 3)),
        body(shape, 4),
    ]
    head = LinearHead(sum(e.out_channels for e in extractors), 5).double()
    network = Network(extractors, head).eval()
    network.freeze(1)
    structure = json.loads(json.dumps(network.structure()))
    again = Network.build(structure, lambda: ResNet(**SHAPES[shape]).double())
    again = again.double().eval()
    again.load_state_dict(network.state_dict())
    assert again.structure() == network.structure()
    assert torch.equal(again(images()), network(images()))
    assert not any(p.requires_grad for p in again.extractors[1].parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_whole_network_starts_from_a_pruned_one(shape):
    whole, fresh = masked(shape, 1), body(shape, 9)
    untouched = copy.deepcopy(fresh)
    small = prune(whole)
    grown = small.unpruned(fresh)
    assert grown is fresh
    again = MaskedResNet(copy.deepcopy(grown), SURE)
    for mask, old in zip(again.masks, whole.masks, strict=True):
        mask.logits.data = old.logits.data.clone()
    torch.testing.assert_close(again.eval()(images()), whole.eval()(images()))
    first, kept = grown.stem[0].weight, small.kept[0]
    gone = [c for c in range(len(first)) if c not in kept.tolist()]
    assert gone and torch.equal(first[gone], untouched.stem[0].weight[gone])
    assert torch.equal(grown.stem[1].running_var[gone], untouched.stem[1].running_var[gone])
    assert not torch.equal(first[kept], untouched.stem[0].weight[kept])


def test_a_pade_branch_shares_masks_and_what_is_left():
    for network in (masked("padded").eval(), prune(masked("padded")).eval()):
        branch = share_with_pade(network)
        own = {id(p) for p in network.parameters()}
        assert own <= {id(p) for p in branch.parameters()}
        assert branch(images()).shape == network(images()).shape


def test_second_derivatives_go_through_masks():
    network = MaskedResNet(body("padded"), scale=2.0).eval()
    inputs = images().requires_grad_()
    named = dict(network.named_parameters())
    gradients = torch.autograd.grad(
        network(inputs).square().sum() + network.used(), list(named.values()), create_graph=True
    )
    (slope,) = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)
    assert slope.isfinite().all() and slope.abs().max() > 0


@pytest.mark.parametrize("make", [MaskedResNet, lambda backbone: PrunedResNet(backbone, [])])
def test_another_backbone_is_refused(make):
    with pytest.raises(FastcilError, match="backbone is a ConvNet, whose channels can't be masked"):
        make(ConvNet())
