from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fastcil.nn import HEADS, LinearHead, build_head


@pytest.mark.parametrize("bias", [True, False])
def test_value(bias):
    head, features = LinearHead(6, 4, bias), torch.randn(3, 6)
    expected = features @ head.weight.T + (head.bias if bias else 0)
    torch.testing.assert_close(head(features), expected)
    assert (head.bias is not None) == bias
    assert len(list(head.parameters())) == 1 + bias
    labels = torch.tensor([2, 0, 2])
    assert torch.equal(head.cam_weights(labels), head.weight[labels])


def test_starts_as_a_linear_layer():
    torch.manual_seed(0)
    head = LinearHead(400, 100)
    weight, bias = head.weight.detach(), head.bias.detach()
    assert weight.abs().max() <= 0.05 and bias.abs().max() <= 0.05
    # Uniform in ±1/20: the standard deviation is 0.05 / sqrt(3).
    assert abs(weight.std() / (0.05 / 3**0.5) - 1) < 0.02
    assert abs(weight.mean()) < 1e-3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("classes", "in_features"), [(7, None), (4, 9), (9, 12), (4, 6)])
def test_growing_keeps_what_is_known(classes, in_features, bias):
    head = LinearHead(6, 4, bias).double()
    old = {name: value.clone() for name, value in head.state_dict().items()}
    head.grow(classes, in_features)
    wide = in_features or 6
    assert head.weight.shape == (classes, wide) and head.weight.dtype == torch.float64
    assert (head.classes, head.in_features) == (classes, wide)
    assert torch.equal(head.weight[:4, :6], old["weight"])
    new = head.weight.detach().clone()
    new[:4, :6] = 1.0
    assert bool((new != 0).all())
    new[:4, :6] = 0.0
    assert new.abs().max() <= 1 / wide**0.5
    if bias:
        assert torch.equal(head.bias[:4], old["bias"]) and head.bias.shape == (classes,)
    assert head(torch.randn(2, wide).double()).shape == (2, classes)
    assert all(p.requires_grad and p.is_leaf for p in head.parameters())


def test_growing_keeps_frozen_frozen():
    head = LinearHead(3, 2).requires_grad_(False)
    head.grow(5)
    assert not any(p.requires_grad for p in head.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_structure(bias):
    head = LinearHead(5, 2, bias)
    head.grow(4, 7)
    again = build_head(json.loads(json.dumps(head.structure())))
    assert again.structure() == head.structure()
    again.load_state_dict(head.state_dict())
    features = torch.randn(2, 7)
    assert torch.equal(again(features), head(features))


def test_normalised():
    torch.manual_seed(0)
    head = LinearHead(300, 100, normalised=True)
    assert head.bias is None and abs(head.weight.std() / 0.001 - 1) < 0.02
    known = head.weight.detach().clone()
    head.grow(150)
    assert torch.equal(head.weight[:100], known)
    assert abs(head.weight[100:].std() / 0.001 - 1) < 0.03
    features = torch.randn(3, 300)
    unit = features / features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(features), unit @ head.weight.T)
    assert torch.equal(head(torch.zeros(1, 300)), torch.zeros(1, 150))
    again = build_head(json.loads(json.dumps(head.structure())))
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(features), head(features)) and "normalised" in str(head)


def test_another_kind_of_head(monkeypatch):
    monkeypatch.setitem(HEADS, "mine", lambda structure: nn.Linear(structure["d"], 2))
    assert build_head({"kind": "mine", "d": 3}).in_features == 3


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: LinearHead(0, 2), "in_features is 0"),
        (lambda: LinearHead(2, 0), "classes is 0"),
        (lambda: LinearHead(4, 3).grow(2), "classes is 2; a head of 3 can only grow"),
        (lambda: LinearHead(4, 3).grow(3, 2), "in_features is 2; a head of 4 can only grow"),
        (lambda: build_head({"kind": "liner"}), "'liner'; the nearest known one is 'linear'"),
        (lambda: build_head({}), "head kind is None"),
    ],
)
def test_bad_arguments(action, message):
    with pytest.raises(ValueError, match=message):
        action()
