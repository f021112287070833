from __future__ import annotations

import json
import math

import pytest
import torch

from fastcil.nn import CosineHead, build_head
from fastcil.nn.nearest_mean import class_means
from fastcil.ops import cam


def grown(old=4, new=3, in_features=6):
    """A float64 head of two blocks, with a sigma of its own."""
    torch.manual_seed(0)
    head = CosineHead(in_features, old).double()
    head.grow(old + new)
    with torch.no_grad():
        head.sigma.fill_(7.5)
    return head


def test_logits_are_scaled_cosines():
    head, features = grown(), torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        cosines, logits = head.cosines(features), head(features)
    rows = [*head.old.tolist(), *head.new.tolist()]
    assert logits.shape == (5, 7) and len(rows) == head.classes == 7
    for b, f in enumerate(features.tolist()):
        for k, w in enumerate(rows):
            dot = sum(x * y for x, y in zip(f, w, strict=True))
            expected = dot / math.hypot(*f) / math.hypot(*w)
            assert float(cosines[b, k]) == pytest.approx(expected, rel=1e-12)
            assert float(logits[b, k]) == pytest.approx(7.5 * expected, rel=1e-12)


def test_starts_uniform_with_a_scale_of_one():
    torch.manual_seed(0)
    head = CosineHead(400, 100)
    assert torch.equal(head.sigma, torch.ones(())) and head.old.shape == (0, 400)
    rows = head.new.detach()
    # Uniform in ±1/20: the standard deviation is 0.05 / sqrt(3).
    assert rows.abs().max() <= 0.05 and abs(rows.std() / (0.05 / 3**0.5) - 1) < 0.02
    assert [name for name, _ in head.named_parameters()] == ["old", "new", "sigma"]


@pytest.mark.parametrize("more", [0, 1, 5])
def test_growing_makes_old_of_what_is_known(more):
    head = grown()
    before, sigma, features = head.weight.detach(), head.sigma, torch.randn(2, 6).double()
    logits = head(features)
    head.grow(7 + more)
    assert torch.equal(head.old, before) and head.new.shape == (more, 6)
    assert head.sigma is sigma and bool(sigma == 7.5)
    assert head.new.dtype == torch.float64 and (head.classes, head.in_features) == (7 + more, 6)
    assert bool((head.new != 0).all()) and bool((head.new.abs() <= 6**-0.5).all())
    torch.testing.assert_close(head(features)[:, :7], logits, rtol=1e-14, atol=1e-14)
    assert all(p.requires_grad and p.is_leaf for p in head.parameters())


def test_growing_keeps_frozen_frozen():
    head = CosineHead(3, 2).requires_grad_(False)
    head.grow(5)
    assert not any(p.requires_grad for p in head.parameters())


def test_only_the_block_that_trains_moves():
    head, before = grown(), grown()
    optimizer = torch.optim.SGD([head.new, head.sigma], lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        head(torch.randn(4, 6).double()).square().sum().backward()
        optimizer.step()
    assert torch.equal(head.old, before.old)
    assert not torch.equal(head.new, before.new) and not torch.equal(head.sigma, before.sigma)


def test_imprinting():
    head = grown(old=4, new=3)
    drawn = head.new.detach().clone()
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(9, 6, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 0, 0, 0, 0, 2, 2, 2, 0])  # none of the second new class
    parameter = head.new
    head.imprint(class_means(features, labels, 3))
    assert head.new is parameter and head.new.requires_grad
    norm = sum(math.hypot(*row) for row in head.old.tolist()) / 4
    for k in (0, 2):
        mean = [0.0] * 6
        for f, label in zip(features.tolist(), labels.tolist(), strict=True):
            if label == k:
                mean = [m + x / math.hypot(*f) for m, x in zip(mean, f, strict=True)]
        expected = [norm * m / math.hypot(*mean) for m in mean]
        assert head.new[k].tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(head.new[1], drawn[1])


def test_maps_show_what_the_cosine_comes_from():
    head, maps = grown(), torch.randn(3, 6, 4, 5).double()
    labels = torch.tensor([6, 1, 3])
    rows, features = head.cam_weights(labels), maps.mean((2, 3))
    activation = (maps * rows[:, :, None, None]).sum(1)
    expected = features.norm(dim=1) * head.cosines(features)[range(3), labels]
    torch.testing.assert_close(activation.mean((1, 2)), expected)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3).double())
    torch.testing.assert_close(cam(maps, rows), cam(maps, 3.0 * head.weight[labels]))


def test_gradients_of_all_orders():
    head = grown(old=2, new=2, in_features=3)
    inputs = tuple(p.detach().clone().requires_grad_() for p in head.parameters())

    def function(features, *values):
        names = [name for name, _ in head.named_parameters()]
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (features,))

    features = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (features, *inputs))
    assert torch.autograd.gradgradcheck(function, (features, *inputs))


def test_features_of_zero_have_finite_derivatives():
    head, features = grown(), torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    logits = head(features)
    assert not logits.any()
    (slope,) = torch.autograd.grad(logits.sum(), features, create_graph=True)
    (again,) = torch.autograd.grad(slope.square().sum(), features)
    assert slope.isfinite().all() and again.isfinite().all()


def test_cosines_of_half_features_are_taken_in_float32():
    head = CosineHead(6, 4)
    features = (100 * torch.randn(3, 6)).to(torch.bfloat16)
    assert head(features).dtype == torch.float32
    assert torch.equal(head(features), head(features.float()))


@pytest.mark.parametrize("sizes", [(4,), (4, 7), (4, 5, 5)])
def test_structure(sizes):
    head = CosineHead(5, sizes[0])
    for classes in sizes[1:]:
        head.grow(classes)
    again = build_head(json.loads(json.dumps(head.structure())))
    assert again.structure() == head.structure() and repr(again) == repr(head)
    again.load_state_dict(head.state_dict())
    features = torch.randn(2, 5)
    assert torch.equal(again(features), head(features))
    starts = {p.untyped_storage().data_ptr() for p in again.parameters() if p.numel()}
    assert len(starts) == sum(p.numel() > 0 for p in again.parameters())


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: CosineHead(0, 2), "in_features is 0"),
        (lambda: CosineHead(2, 0), "classes is 0"),
        (lambda: CosineHead(4, 3).grow(2), "classes is 2; a head of 3 can only grow"),
        (lambda: grown().imprint(torch.zeros(2, 6)), r"means is \(2, 6\) for 4 old rows"),
        (lambda: CosineHead(6, 3).imprint(torch.zeros(3, 6)), r"means is \(3, 6\) for 0 old"),
        (lambda: build_head({"kind": "cosin"}), "'cosin'; the nearest known one is 'cosine'"),
    ],
)
def test_bad_arguments(action, message):
    with pytest.raises(ValueError, match=message):
        action()
