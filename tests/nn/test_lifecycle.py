"""How networks start and are copied."""

from __future__ import annotations

import torch
from backbones import ConvNet
from torch import nn

from fastcil.nn import Network
from fastcil.nn.lifecycle import frozen_copy, new_head, start_network, successor


def test_start_network():
    backbone = ConvNet()
    network = start_network(backbone, 4)
    assert isinstance(network, Network)
    assert network.extractors[0] is backbone
    assert network.head.bias is not None
    assert network(torch.zeros(2, 3, 6, 6)).shape == (2, 4)
    assert start_network(ConvNet(), 4, bias=False).head.bias is None
    assert start_network(ConvNet(), 4, normalised=True).head.normalised


def test_new_head_lies_where_its_network_does():
    with torch.device("meta"):
        backbone = ConvNet()
    assert new_head(backbone, 6, 3).weight.device.type == "meta"
    assert new_head(nn.ReLU(), 6, 3).weight.device.type == "cpu"


def test_successor_of_a_frozen_module_trains():
    network = start_network(ConvNet(), 4)
    network.freeze(0)
    network.train()
    old = network.extractors[0]
    new = successor(old)
    assert not old.layers[1].training and new.layers[1].training
    assert not any(p.requires_grad for p in old.parameters())
    assert all(p.requires_grad for p in new.parameters())
    assert not {p.data_ptr() for p in old.parameters()} & {p.data_ptr() for p in new.parameters()}
    for name, value in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], value)


def test_frozen_copy_no_longer_changes():
    network = start_network(ConvNet(), 4)
    teacher = frozen_copy(network)
    teacher.train()
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    logits = teacher(images)
    assert not logits.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    network.eval()
    assert torch.equal(logits, network(images).detach())
    assert all(p.requires_grad for p in network.parameters())
