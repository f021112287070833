"""What few-shot sessions train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcil.nn import LinearHead, Network, resnet18, resnet20
from fastcil.nn.sessions import last_block, scores_keeping, session_parameters


def trained(network, trains):
    chosen = {id(p) for p in session_parameters(network, trains)}
    return [name for name, p in network.named_parameters() if id(p) in chosen]


@pytest.mark.parametrize("make", [resnet18, resnet20])
def test_convolutions_before_the_last_block_are_left_out(make):
    network = Network([make(width=2)], LinearHead(make(width=2).out_channels, 3))
    everything = [name for name, _ in network.named_parameters()]
    assert trained(network, "all") == everything
    kernels = [n for n, p in network.named_parameters() if p.ndim == 4]
    last = f"extractors.0.stages.{len(network.extractors[0].stages) - 1}.{'12'[make is resnet20]}."
    kept = trained(network, "last-block")
    assert [n for n in kept if n in kernels] == [n for n in kernels if n.startswith(last)]
    assert [n for n in kept if n not in kernels] == [n for n in everything if n not in kernels]


def test_frozen_norms_stay_out():
    network = Network([resnet20(width=2)], LinearHead(8, 3))
    network.freeze_norms()
    assert len(trained(network, "last-block")) == 2 + 2


def test_every_extractor_has_a_last_block():
    network = Network([resnet20(width=2), resnet20(width=2)], LinearHead(16, 3))
    kernels = [n for n in trained(network, "last-block") if network.get_parameter(n).ndim == 4]
    assert [n.split(".")[1] for n in kernels] == ["0", "0", "1", "1"]


def test_last_block_of_other_networks():
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    assert last_block(chain) is chain[1][0]
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3, 4))
    assert last_block(layers) is layers


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"normalised": True}], ids=str)
@pytest.mark.parametrize("known", [0, 3, 5])
def test_scores_keeping(options, known):
    head, features = LinearHead(6, 5, **options), torch.randn(4, 6, requires_grad=True)
    scores = scores_keeping(head, features, known)
    torch.testing.assert_close(scores, head(features), rtol=0, atol=0)
    scores.square().sum().backward()
    assert not head.weight.grad[:known].any() and (known == 5 or head.weight.grad[known:].any())
    if head.bias is not None:
        assert not head.bias.grad[:known].any()
    assert features.grad.any()
