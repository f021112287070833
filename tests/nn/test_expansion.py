"""Expanded and compressed networks against Yang et al.'s (2022) equations, written naively."""

from __future__ import annotations

import copy
import json
from itertools import product

import pytest
import torch
from backbones import ConvNet
from safetensors.torch import save
from torch import nn

from fastcil.errors import FastcilError
from fastcil.nn import ExpandedBackbone, Expansion, LinearHead, Network
from fastcil.nn.expansion import check_rates, nodes_in_use, retention_curve
from fastcil.nn.growing import compress, expanded_backbone, without_settled
from fastcil.nn.lifecycle import frozen_copy

C = 6
FORMS = list(product(("fc", "conv1x1", "conv3x3"), ("ne", "nc", "sa")))


def make(layer="fc", indicator="sa", beta=3.0, **options):
    torch.manual_seed(0)
    expansion = Expansion(C, C, layer=layer, indicator=indicator, **options).double()
    expansion.weight.data.normal_()
    expansion.beta.fill_(beta)
    return expansion


def some_maps(count=4):
    torch.manual_seed(1)
    return torch.randn(count, C, 3, 5, dtype=torch.float64)


def naive_responses(expansion, maps):
    """f' of each image, node and position."""
    images, _, height, width = maps.shape
    k = 1 if expansion.layer == "conv3x3" else 0
    out = torch.zeros(images, expansion.nodes, height, width, dtype=maps.dtype)
    for b, i, y, x in product(range(images), range(expansion.nodes), range(height), range(width)):
        for dy, dx in product(range(-k, k + 1), range(-k, k + 1)):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                row = expansion.weight.detach()[i, :, dy + k, dx + k]
                out[b, i, y, x] += row @ maps[b, :, y + dy, x + dx]
    return out


def naive_alpha(expansion, responses):
    if expansion.indicator == "ne":
        return torch.ones_like(responses)  # Eq. 3
    if expansion.indicator == "nc":
        return (1 / (1 + (-expansion.s.detach()).exp()))[None, :, None, None].expand_as(responses)
    outputs = responses
    if expansion.layer == "fc":
        outputs = responses.flatten(2).mean(2)[:, :, None, None].expand_as(responses)
    return 1 / (1 + (-expansion.beta * outputs).exp())  # Eq. 6


@pytest.mark.parametrize(("layer", "indicator"), FORMS)
def test_new_features_and_their_indicator(layer, indicator):
    expansion, maps = make(layer, indicator), some_maps()
    responses = naive_responses(expansion, maps)
    alpha = naive_alpha(expansion, responses)
    torch.testing.assert_close(expansion.responses(maps), responses)
    torch.testing.assert_close(expansion.alpha(responses).expand_as(alpha), alpha)
    torch.testing.assert_close(expansion(maps), alpha * responses)
    use = expansion.use(maps)
    torch.testing.assert_close(use[:, 0], alpha.amax((2, 3)))
    torch.testing.assert_close(use[:, 1], alpha.mean((2, 3)))


def test_a_fully_connected_layer_works_on_pooled_features():
    expansion, maps = make("fc", "sa"), some_maps()
    pooled = maps.mean((2, 3)) @ expansion.weight[:, :, 0, 0].T
    expected = pooled / (1 + (-3 * pooled).exp())
    torch.testing.assert_close(expansion(maps).mean((2, 3)), expected)
    # Responses below zero vanish as beta grows.
    expansion.beta.fill_(1e6)
    torch.testing.assert_close(expansion(maps).mean((2, 3)), pooled.relu())


@pytest.mark.parametrize("gamma_of", ["all", "backbone"])
@pytest.mark.parametrize("fuse", ["sum", "concat"])
def test_features_of_all_tasks_are_fused(fuse, gamma_of):
    """Eq. 4, task after task."""
    torch.manual_seed(0)
    expanded = ExpandedBackbone(ConvNet((4, C)), fuse, 0.7, gamma_of).double().eval()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    base = expected = expanded.backbone(images)
    for number, layer in enumerate(("fc", "conv3x3", "fc")):
        expansion = expanded.expand(layer).double()
        expansion.weight.data.normal_()
        new = naive_alpha(expansion, naive_responses(expansion, base)) * naive_responses(
            expansion, base
        )
        old = (0.7 if gamma_of == "all" or not number else 1.0) * expected
        expected = old + new if fuse == "sum" else torch.cat([old, new], 1)
        torch.testing.assert_close(expanded(images), expected)
        assert expanded.out_channels == expected.shape[1]
    levels = expanded.levels(images)
    torch.testing.assert_close(levels[-1], expected)
    assert len(levels) == 2 and levels[0].shape[1] == 4
    structure = expanded.structure()
    again = ExpandedBackbone.build(structure, lambda: ConvNet((4, C)).double())
    assert again.structure() == structure
    del structure["gamma_of"]  # as it was saved before
    assert ExpandedBackbone.build(structure, lambda: ConvNet((4, C))).gamma_of == "all"


@pytest.mark.parametrize("layer", ["fc", "conv1x1"])
@pytest.mark.parametrize("tau", [0.2, 0.5, 0.9])
def test_compression_of_self_activated_nodes(layer, tau):
    """Eq. 7, and its price."""
    expansion, maps = make(layer, "sa", tau=tau), some_maps()
    alpha = naive_alpha(expansion, naive_responses(expansion, maps))
    excess = max(float(alpha.mean()) - tau, 0.0)
    assert float(expansion.compression(maps, 0.0).detach()) == pytest.approx(excess)
    priced = float(expansion.compression(maps, 0.3).detach())
    assert priced == pytest.approx(excess + 0.3 * tau)


def test_compression_of_learned_indicators():
    """Eq. 5, and the gradient that App. A.1 (i) and (ii) gives."""
    expansion, maps = make("fc", "nc", tau=0.1), some_maps()
    s = expansion.s.detach()
    alpha = torch.sigmoid(s)
    expected = ((s.abs() - 10) ** 2).sum() + alpha.mean() - 0.1
    loss = expansion.compression(maps, 0.5)
    torch.testing.assert_close(loss.detach(), expected)
    (gradient,) = torch.autograd.grad(loss, expansion.s)
    expected = 2 * (s.abs() - 10) * s.sign() + alpha * (1 - alpha) / C
    torch.testing.assert_close(gradient, expected)
    assert float(make("fc", "ne").compression(maps, 0.5)) == 0


@pytest.mark.parametrize("start", [0.1, 0.9])
@pytest.mark.parametrize("rho", [0.3, 0.7])
def test_tau_follows_the_retention_from_both_sides(start, rho):
    """min over tau of ReLU(a - tau) + rho tau is rho a, at tau = a."""
    expansion, maps = make("fc", "sa", tau=start), some_maps()
    rate = float(expansion.use(maps)[:, 1].mean().detach())
    assert 0.05 < rate < 0.95
    for step in range(300):
        loss = expansion.compression(maps, rho)
        (slope,) = torch.autograd.grad(loss, expansion.level)
        expansion.level.data -= slope / (step + 2)
    assert float(expansion.tau.detach()) == pytest.approx(rate, abs=0.02)
    assert float(loss.detach()) == pytest.approx(rho * rate, abs=0.02)


def test_tau_without_a_price_only_grows_and_the_pressure_vanishes():
    expansion, maps = make("fc", "sa", tau=0.05), some_maps()
    before = float(expansion.tau.detach())
    for _ in range(100):
        loss = expansion.compression(maps, 0.0)
        (slope,) = torch.autograd.grad(loss, expansion.level)
        assert slope <= 0
        expansion.level.data -= 0.2 * slope
        assert float(expansion.tau.detach()) >= before
        before = float(expansion.tau.detach())
    (pressure,) = torch.autograd.grad(expansion.compression(maps, 0.0), expansion.weight)
    assert float(loss.detach()) == 0 and not pressure.any()


def test_gradient_of_tau_and_of_the_nodes():
    maps = some_maps()
    expansion = make("conv3x3", "sa", tau=0.2)
    loss = expansion.compression(maps, 0.25)
    level, weight = torch.autograd.grad(loss, [expansion.level, expansion.weight])
    # A slope of rho - 1 below the rate, times that of tau = sigmoid(4 u).
    assert float(level) == pytest.approx((0.25 - 1) * 4 * 0.2 * 0.8)
    shifted, step = copy.deepcopy(expansion), 1e-6
    shifted.weight.data[1, 2, 0, 1] += step
    slope = (shifted.compression(maps, 0.25) - loss).detach() / step
    assert float(weight[1, 2, 0, 1]) == pytest.approx(float(slope), rel=1e-3)


@pytest.mark.parametrize("left", [[True] * C, [True, False, False, True, True, False], [False] * C])
@pytest.mark.parametrize("fuse", ["sum", "concat"])
@pytest.mark.parametrize(("layer", "indicator"), [("fc", "sa"), ("fc", "nc"), ("conv3x3", "sa")])
def test_removed_nodes_are_as_if_their_indicator_was_zero(layer, indicator, fuse, left):
    torch.manual_seed(0)
    expanded = ExpandedBackbone(ConvNet((4, C)), fuse)
    network = Network([expanded], LinearHead(C, 5)).eval()
    for task in range(2):
        expansion = expanded.expand(layer, indicator)
        expansion.weight.data.normal_()
        expansion.beta.fill_(4.0)
        network.head.grow(7 + task, expanded.out_channels)
        images, keep = torch.randn(3, 3, 8, 8), torch.tensor(left)
        masked = copy.deepcopy(network)
        newest = expanded_backbone(masked).newest
        hide = newest.alpha
        newest.alpha = lambda r, hide=hide, keep=keep: hide(r) * keep[None, :, None, None]
        with torch.no_grad():
            expected = masked(images)
            size = len(save(network.state_dict()))
            compress(network, keep)
            torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-6)
            labels = torch.tensor([0, 6, 6])
            found = network.maps(images).mean((2, 3)) * network.cam_weights(labels)
            scores = network(images) - network.head.bias
            torch.testing.assert_close(found.sum(1), scores.gather(1, labels[:, None])[:, 0])
        assert (len(save(network.state_dict())) < size) == (not keep.all())
        assert network.structure()["extractors"][0]["expansions"][-1]["nodes"] == keep.sum()
        assert network.head.in_features == network.out_channels
        again = Network.build(json.loads(json.dumps(network.structure())), lambda: ConvNet((4, C)))
        again.load_state_dict(network.state_dict())
        assert again.structure() == network.structure()
        with torch.no_grad():
            assert torch.equal(again.eval()(images), network(images))


def test_nodes_may_be_removed_again():
    expansion = make()
    maps, rows = some_maps(), expansion.weight.detach().clone()
    expansion.remove(torch.tensor([True, False, True, True, False, True]))
    expansion.remove(torch.tensor([False, True, True, False]))
    assert expansion.place.tolist() == [2, 2, 0, 1, 2, 2] and expansion.nodes == 2
    assert torch.equal(expansion.weight, rows[[2, 3]]) and "2 of 6" in str(expansion)
    assert expansion(maps).shape == (4, 2, 3, 5)


def test_which_nodes_are_in_use():
    torch.manual_seed(0)
    use = torch.rand(5, 2, C).sort(1, descending=True).values
    largest, mean = use.unbind(1)
    unused = [max(largest[:, i].tolist()) >= 0.5 for i in range(C)]
    assert nodes_in_use(make(), use, "unused").tolist() == unused
    often = [sum(mean[:, i].tolist()) / 5 >= 0.5 for i in range(C)]
    assert nodes_in_use(make(), use, "mean").tolist() == often != unused
    assert nodes_in_use(make(indicator="ne"), 0 * use, "mean").all()
    learned = make(indicator="nc")
    assert torch.equal(nodes_in_use(learned, use, "mean"), learned.s > 0)


def test_what_is_trained_and_what_stays():
    expanded = ExpandedBackbone(ConvNet((4, C)))
    network = Network([expanded], LinearHead(C, 5))
    first, second = expanded.expand(), expanded.expand()
    trained = {id(p) for p in without_settled(network.parameters(), expanded, True)}
    assert not trained & {id(p) for p in first.parameters()}
    assert trained >= {id(p) for p in (*second.parameters(), *expanded.backbone.parameters())}
    fixed = {id(p) for p in without_settled(network.parameters(), expanded, False)}
    assert trained - fixed == {id(second.level)}
    learned = expanded.expand(indicator="nc")
    trained = {id(p) for p in without_settled(network.parameters(), expanded, True)}
    assert id(learned.s) in trained and id(learned.level) not in trained


def test_a_frozen_backbone_stays_in_evaluation_mode():
    expanded = ExpandedBackbone(ConvNet((4, C)))
    expanded.expand()
    expanded.freeze()
    again = ExpandedBackbone.build(expanded.structure(), lambda: ConvNet((4, C)))
    for built in (expanded, again):
        built.train()
        assert built.newest.training and not built.backbone.training
        assert not any(p.requires_grad for p in built.backbone.parameters())
    teacher = frozen_copy(Network([again], LinearHead(C, 2)))
    assert not teacher.train().extractors[0].newest.training


def test_starts_close_to_nothing_and_sharpens():
    torch.manual_seed(0)
    expansion, maps = Expansion(64, 64), torch.randn(4, 64, 2, 2).abs()
    alpha = expansion.alpha(expansion.responses(maps)).detach()
    assert (alpha - 0.5).abs().max() < 0.1
    expansion.beta.fill_(1e6)
    alpha = expansion.alpha(expansion.responses(maps)).detach()
    assert (alpha - alpha.round()).abs().max() < 1e-6 and 0 < alpha.mean() < 1


def test_works_in_half_precision():
    expanded = ExpandedBackbone(nn.Identity())
    expanded.backbone.out_channels = C
    expansion = expanded.expand()
    expansion.remove(torch.arange(C) < 4)
    maps = torch.randn(2, C, 3, 3)
    expected = expanded(maps)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(expanded(maps).float(), expected, rtol=0.05, atol=0.05)


def test_the_curve_of_retention():
    title, payload = retention_curve([make(tau=0.25), Expansion(C, 3, width=C)])
    assert title == "Retention rate" and payload["x"] == [1, 2]
    assert payload["y"] == {"nodes kept, of 1": [1.0, 0.5], "τ": [0.25, 0.5]}
    assert list(retention_curve([make(indicator="ne")])[1]["y"]) == ["nodes kept, of 1"]


@pytest.mark.parametrize(
    ("tau", "price", "says"),
    [(0.0, 0.5, "tau is 0.0"), (1.0, 0.5, "tau is 1.0"), (0.5, 1.0, "price is 1.0")],
)
def test_rates_out_of_range_are_a_sentence(tau, price, says):
    with pytest.raises(FastcilError, match=says):
        check_rates(tau, price)
