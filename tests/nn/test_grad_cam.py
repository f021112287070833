"""Grad-CAM against its equations in loops, for heads, layers and norms of every kind."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from fastcil.errors import FastcilError
from fastcil.nn import CosineHead, GradCAM, LinearHead, Network
from fastcil.nn.grad_cam import saliency


class Backbone(nn.Module):
    """Two levels, the second in place."""

    out_channels = 5

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4))
        self.relu = nn.ReLU(inplace=in_place)
        self.second = nn.Conv2d(4, 5, 3, 2, 1)
        self.spare = nn.Conv2d(3, 3, 1)

    def forward(self, images):
        return self.second(self.relu(self.first(images)))


class Squared(nn.Module):
    """A head whose scores are no linear function of features."""

    def __init__(self, in_features: int, classes: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.randn(classes, in_features))

    def forward(self, features):
        return -(features[:, None] - self.weight).square().sum(2)


NORMALISED = functools.partial(LinearHead, normalised=True)


def make(head=LinearHead, extractors: int = 1, in_place: bool = False) -> Network:
    torch.manual_seed(3)
    backbones = [Backbone(in_place) for _ in range(extractors)]
    network = Network(backbones, head(5 * extractors, 4)).double().eval()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return network


IMAGES = torch.randn(6, 3, 13, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 3, 1, 2, 0, 3])


def naive(network: Network, images, classes, layer=None, scores=None):
    """Eqs. D.1 and D.2, image by image, channel by channel, position by position; then scaled."""
    results = []
    for image, label in zip(images, classes.tolist(), strict=True):
        kept = []
        modules = [e if layer is None else e.get_submodule(layer) for e in network.extractors]

        def keep(module, inputs, output, kept=kept):
            kept.append(output)

        hooks = [module.register_forward_hook(keep) for module in modules]
        y = (scores or network)(image[None])[0, label]
        for hook in hooks:
            hook.remove()
        summed = 0.0
        for maps in kept:
            (gradient,) = torch.autograd.grad(y, maps, retain_graph=True)
            for k in range(maps.shape[1]):
                height, width = maps.shape[2:]
                alpha = 0.0
                for i in range(height):
                    for j in range(width):
                        alpha += gradient[0, k, i, j] / (height * width)
                summed = summed + alpha * maps[0, k].detach()
        shown = summed.clamp(min=0)
        span = shown.max() - shown.min()
        results.append((shown - shown.min()) / span if span > 0 else torch.zeros_like(shown))
    return torch.stack(results)


@pytest.mark.parametrize("layer", [None, "first", "relu", "second", "first.0"])
@pytest.mark.parametrize("extractors", [1, 2])
@pytest.mark.parametrize("head", [LinearHead, NORMALISED, CosineHead, Squared])
def test_maps_are_those_of_the_equations(head, extractors, layer):
    network = make(head, extractors)
    before = copy.deepcopy(network.state_dict())
    found = GradCAM(network, layer=layer)(IMAGES, LABELS)
    torch.testing.assert_close(found, naive(network, IMAGES, LABELS, layer), rtol=1e-9, atol=1e-9)
    assert float(found.amax()) == 1.0 and float(found.amin()) == 0.0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks for m in network.modules())


@pytest.mark.parametrize("extractors", [1, 2])
def test_a_linear_head_needs_no_backward_pass(extractors, monkeypatch):
    network = make(extractors=extractors)
    long_way = GradCAM(network, scores=lambda images: network(images))
    expected = long_way(IMAGES, LABELS)
    predicted = long_way(IMAGES, LABELS, torch.tensor([1, 3]))

    def refuse(*_, **__):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    found = GradCAM(network)(IMAGES, LABELS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        GradCAM(network)(IMAGES, LABELS, torch.tensor([1, 3])), predicted, rtol=1e-9, atol=1e-12
    )
    with pytest.raises(AssertionError, match="a backward pass"):
        long_way(IMAGES, LABELS)


def test_a_batch_is_one_pass_forward_and_one_backward(monkeypatch):
    network = make(CosineHead)
    calls = []
    network.extractors[0].register_forward_pre_hook(lambda *_: calls.append("forward"))
    grad = torch.autograd.grad

    def counted(*arguments, **options):
        calls.append("backward")
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    with torch.no_grad():
        GradCAM(network, layer="first")(IMAGES, LABELS)
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("head", [LinearHead, Squared])
def test_the_predicted_class_is_the_best_of_those_named(head):
    network = make(head)
    among = torch.tensor([1, 2])
    best = network(IMAGES)[:, 1:3].argmax(1) + 1
    found = GradCAM(network)(IMAGES, LABELS, among)
    torch.testing.assert_close(found, naive(network, IMAGES, best), rtol=1e-9, atol=1e-9)


def test_scores_of_another_kind():
    network = make()

    def scores(images):
        return network(images).square()

    found = GradCAM(network, scores)(IMAGES, LABELS)
    expected = naive(network, IMAGES, LABELS, scores=scores)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_scores_that_pass_the_extractors_by_leave_the_networks_own():
    network = make()
    weight = network.head.weight

    def elsewhere(images):
        return images.mean((2, 3)) @ weight[:, :3].T

    found = GradCAM(network, elsewhere)(IMAGES, LABELS)
    assert torch.equal(found, GradCAM(network, lambda images: network(images))(IMAGES, LABELS))


def test_statistics_of_the_batch_are_used_and_not_noted():
    network = make()
    found = GradCAM(network, norms="batch")(IMAGES, LABELS)
    before = copy.deepcopy(network.state_dict())
    assert not any(m.training for m in network.modules())
    other = copy.deepcopy(network).train()
    maps = other.maps(IMAGES)
    weights = network.head.weight[LABELS]
    torch.testing.assert_close(found, saliency(maps, weights), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not torch.allclose(found, GradCAM(network)(IMAGES, LABELS))


def test_what_follows_may_work_in_place():
    network = make(Squared, in_place=True)
    found = GradCAM(network, layer="first")(IMAGES, LABELS)
    plain = make(Squared)
    torch.testing.assert_close(found, GradCAM(plain, layer="first")(IMAGES, LABELS))


def test_maps_that_say_nothing_are_zeros():
    maps = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 3.0]]], [[[-1.0, 5.0]]]])
    weights = torch.tensor([[-1.0], [2.0], [0.0]])
    assert torch.equal(saliency(maps, weights), torch.zeros(3, 1, 2))


def test_no_image_has_no_map():
    for network in (make(), make(Squared)):
        assert GradCAM(network)(IMAGES[:0], LABELS[:0]).shape == (0, 4, 5)


def test_half_precision_is_summed_in_single():
    network = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = GradCAM(network)(IMAGES.float(), LABELS)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, GradCAM(network)(IMAGES.float(), LABELS))


@pytest.mark.parametrize(
    ("layer", "says"), [("third", "layer is 'third', which Backbone has not; it has first,")]
)
def test_unknown_layers_are_a_sentence(layer, says):
    with pytest.raises(FastcilError, match=says):
        GradCAM(make(), layer=layer)


def test_a_layer_that_is_not_called_is_a_sentence():
    with pytest.raises(FastcilError, match="doesn't call"):
        GradCAM(make(), layer="spare")(IMAGES, LABELS)
