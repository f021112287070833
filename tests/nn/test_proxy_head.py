"""The local similarity classifier against loops in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastcil.nn import ProxyHead, build_head


def make(in_features: int = 5, classes: int = 3, proxies: int = 4, seed: int = 0) -> ProxyHead:
    torch.manual_seed(seed)
    return ProxyHead(in_features, classes, proxies).double()


def naive(head: ProxyHead, features: torch.Tensor) -> list[list[float]]:
    """eta sum_p s_p softmax_p(s), s = -|f/|f| - w/|w||^2, one number at a time."""
    scores = []
    for feature in features:
        f = feature / feature.norm()
        row = []
        for proxies in head.weight.detach():
            s = [-float((f - w / w.norm()).square().sum()) for w in proxies]
            total = sum(math.exp(v) for v in s)
            row.append(float(head.scale.detach()) * sum(v * math.exp(v) / total for v in s))
        scores.append(row)
    return scores


@pytest.mark.parametrize("proxies", [1, 4, 10])
def test_value(proxies):
    head = make(proxies=proxies)
    head.grow(5)
    torch.nn.init.constant_(head.scale, 2.5)
    features = torch.randn(6, 5, dtype=torch.float64)
    found, expected = head(features), torch.tensor(naive(head, features), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head(7 * features), found)
    assert (found <= 0).all() and (found >= -4 * 2.5).all()


def test_starts_with_directions_of_length_about_one():
    torch.manual_seed(0)
    head = ProxyHead(400, 30)
    assert (head.proxies, head.classes, head.in_features) == (10, 30, 400)
    assert head.weight.shape == (30, 10, 400) and len(head.old) == 0
    assert float(head.scale.detach()) == 1.0
    assert abs(float(head.weight.detach().norm(dim=2).mean()) - 1) < 0.01
    assert abs(float(head.weight.detach().mean())) < 1e-3


def test_cam_weights_are_mean_directions():
    """What the docstring promises: they add up to the score of proxies that weigh the same."""
    head, labels = make(), torch.tensor([2, 0, 2])
    rows = head.cam_weights(labels)
    features = torch.randn(3, 5, dtype=torch.float64)
    for feature, label, row in zip(features, labels.tolist(), rows, strict=True):
        units = [w / w.norm() for w in head.weight[label]]
        torch.testing.assert_close(row, sum(units) / 4)
        f = feature / feature.norm()
        s = [-(f - u).square().sum() for u in units]
        mean = sum(v / 2 + 1 for v in s) / 4
        torch.testing.assert_close(feature @ row, feature.norm() * mean)


@pytest.mark.parametrize("steps", [(5,), (4, 4, 7), (3,)])
def test_growing_keeps_what_is_known(steps):
    head = make()
    torch.nn.init.constant_(head.scale, 3.0)
    for classes in steps:
        known = head.weight.detach().clone()
        head.grow(classes)
        assert torch.equal(head.old, known)
        assert head.new.shape == (classes - len(known), 4, 5) and head.new.dtype == torch.float64
        assert head.classes == classes and float(head.scale.detach()) == 3.0
        assert all(p.requires_grad and p.is_leaf for p in head.parameters())
        assert head.old.data_ptr() != known.data_ptr()
    features = torch.randn(2, 5, dtype=torch.float64)
    assert head(features).shape == (2, steps[-1])


def test_growing_keeps_frozen_frozen():
    head = make().requires_grad_(False)
    head.grow(5)
    assert not any(p.requires_grad for p in head.parameters())


def test_old_proxies_get_no_gradient_once_they_are_left_out():
    head = make()
    head.grow(5)
    head.old.requires_grad_(False)
    head(torch.randn(2, 5, dtype=torch.float64)).sum().backward()
    assert head.old.grad is None and head.new.grad.abs().sum() > 0 and head.scale.grad is not None


def test_imprint():
    head = make()
    before = head.weight.detach().clone()
    norm = sum(float(w.norm()) for w in before.flatten(0, 1)) / 12
    head.grow(6)
    fresh = head.new.detach().clone()
    centres = torch.randn(3, 4, 5, dtype=torch.float64)
    centres[1] = 0.0  # a class without images
    centres[2, 0] = 0.0  # a centre that happens to be zero
    head.imprint(centres)
    assert torch.equal(head.old, before) and torch.equal(head.new[1], fresh[1])
    for k in (0, 2):
        torch.testing.assert_close(head.new[k].detach(), centres[k] * norm)
    assert head.new.requires_grad and head.new.is_leaf


def test_parameters_can_be_replaced_by_name():
    head, features = make(), torch.randn(2, 5, dtype=torch.float64)
    head.grow(5)
    other = make(seed=1)
    other.grow(5)
    found = torch.func.functional_call(head, dict(other.named_parameters()), (features,))
    assert torch.equal(found, other(features)) and not torch.equal(found, head(features))


@pytest.mark.parametrize("grown", [3, 5])
def test_structure(grown):
    head = make()
    head.grow(4)
    head.grow(max(grown, 4))
    again = build_head(json.loads(json.dumps(head.structure()))).double()
    assert again.structure() == head.structure()
    again.load_state_dict(head.state_dict())
    features = torch.randn(2, 5, dtype=torch.float64)
    assert torch.equal(again(features), head(features))
    assert again.old.shape == head.old.shape and again.new.shape == head.new.shape


def test_derivatives_to_second_order():
    head = make(classes=2, proxies=3)
    features = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, features)
    assert torch.autograd.gradgradcheck(head, features)


def test_features_of_zero_have_finite_derivatives():
    head, features = make(), torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(head(features).square().sum(), features, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), [features, *head.parameters()])
    assert first.isfinite().all() and all(g.isfinite().all() for g in second)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: ProxyHead(0, 2), "in_features is 0"),
        (lambda: ProxyHead(2, 0), "classes is 0"),
        (lambda: ProxyHead(2, 2, proxies=0), "proxies is 0"),
        (lambda: make().grow(2), "classes is 2; a head of 3 can only grow"),
        (lambda: make().imprint(torch.zeros(3, 4, 5)), "there must be old ones"),
        (lambda: grown().imprint(torch.zeros(1, 4, 5)), r"centres is \(1, 4, 5\) for 3 old"),
    ],
)
def test_bad_arguments(action, message):
    with pytest.raises(ValueError, match=message):
        action()


def grown() -> ProxyHead:
    head = make()
    head.grow(5)
    return head
