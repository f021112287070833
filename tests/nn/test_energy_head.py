"""Energies against loops in float64, and what heads promise."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastcil.nn import EnergyHead, Network, build_head
from fastcil.nn.energy_head import GATES

BOTH = pytest.mark.parametrize("gate", GATES)


def make(gate="softmax", in_features=5, classes=3, width=7):
    torch.manual_seed(0)
    return EnergyHead(in_features, classes, gate, width).double()


def naive(head, features):
    """Minus the energies, one number at a time, by the formulas of the released networks."""
    values = {name: p.detach().tolist() for name, p in head.named_parameters()}
    scores = []
    for f in features.tolist():
        h = [
            sum(v * x for v, x in zip(row, f, strict=True)) + c
            for row, c in zip(values["hidden"], values["offset"], strict=True)
        ]
        row = []
        for e in values["embedding"]:
            if head.gate == "softmax":
                whole = sum(math.exp(v) for v in e)
                units = [u * len(e) * math.exp(v) / whole for u, v in zip(h, e, strict=True)]
            else:
                units = [max(0.0, u + u * v / math.hypot(*e)) for u, v in zip(h, e, strict=True)]
            row.append(sum(w * u for w, u in zip(values["readout"], units, strict=True)))
        scores.append(row)
    return scores


@BOTH
@pytest.mark.parametrize("width", [1, 4, 11])
def test_value(gate, width):
    head = make(gate, width=width)
    head.grow(5)
    features = torch.randn(6, 5, dtype=torch.float64)
    found, expected = head(features), torch.tensor(naive(head, features), dtype=torch.float64)
    assert found.shape == (6, 5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_starts_as_linear_layers_and_an_embedding_do():
    torch.manual_seed(0)
    head = EnergyHead(400, 300)
    assert (head.in_features, head.classes, head.width) == (400, 300, 400)
    for p in (head.hidden, head.offset, head.readout):
        assert p.detach().abs().max() <= 0.05 and abs(p.detach().std() * 20 * 3**0.5 - 1) < 0.1
    rows = head.embedding.detach()
    assert abs(rows.std() - 1) < 0.01 and abs(rows.mean()) < 0.01


@BOTH
@pytest.mark.parametrize("more", [0, 1, 4])
def test_growing_keeps_what_is_known(gate, more):
    head, features = make(gate), torch.randn(2, 5).double()
    before, shared = head(features), [head.hidden, head.offset, head.readout]
    head.grow(3 + more)
    assert [head.hidden, head.offset, head.readout] == shared
    assert head.classes == 3 + more and head.embedding.dtype == torch.float64
    torch.testing.assert_close(head(features)[:, :3], before, rtol=1e-14, atol=1e-14)
    assert all(p.requires_grad and p.is_leaf for p in head.parameters())
    head.requires_grad_(False).grow(9)
    assert not any(p.requires_grad for p in head.parameters())


def test_maps_add_up_to_energies():
    """The mean over positions of <row, F(p)> is the score but for what the offset adds."""
    head, maps = make(), torch.randn(4, 5, 3, 2).double()
    labels = torch.tensor([2, 0, 1, 2])
    rows = head.cam_weights(labels)
    found = (maps * rows[:, :, None, None]).sum(1).mean((1, 2))
    scores = head(maps.mean((2, 3))) - head(torch.zeros(1, 5).double())
    torch.testing.assert_close(found, scores[range(4), labels])


@BOTH
def test_gradients_of_all_orders(gate):
    head = make(gate, in_features=3, classes=2, width=4)
    inputs = tuple(p.detach().clone().requires_grad_() for p in head.parameters())

    def function(features, *values):
        names = [name for name, _ in head.named_parameters()]
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (features,))

    features = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (features, *inputs))
    assert torch.autograd.gradgradcheck(function, (features, *inputs))


@BOTH
def test_structure(gate):
    head = EnergyHead(5, 2, gate, width=3)
    head.grow(6)
    again = build_head(json.loads(json.dumps(head.structure())))
    assert again.structure() == head.structure() and repr(again) == repr(head)
    again.load_state_dict(head.state_dict())
    features = torch.randn(2, 5)
    assert torch.equal(again(features), head(features))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: EnergyHead(0, 2), "in_features is 0"),
        (lambda: EnergyHead(2, 0), "classes is 0"),
        (lambda: EnergyHead(2, 2, width=-1), "width is -1"),
        (lambda: EnergyHead(2, 2, "relu"), "gate is 'relu'; it must be one of softmax, normalised"),
        (lambda: make().grow(2), "classes is 2; a head of 3 can only grow"),
        (lambda: make("normalised").cam_weights(torch.tensor([0])), "take gate 'softmax'"),
    ],
)
def test_bad_arguments(action, message):
    with pytest.raises(ValueError, match=message):
        action()


def test_a_network_may_have_one():
    extractor = torch.nn.Conv2d(3, 5, 3)
    extractor.out_channels = 5
    network = Network([extractor], EnergyHead(5, 4))
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert network.cam_weights(torch.tensor([3, 1])).shape == (2, 5)
