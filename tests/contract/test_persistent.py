"""State that is rebuilt from JSON and tensors."""

from __future__ import annotations

import json

import pytest
import torch
from backbones import ConvNet
from torch import nn

from fastcil.contract import Persistent, Retained, Stage, evaluating, total
from fastcil.contract.recipe import Recipe
from fastcil.errors import FastcilError
from fastcil.nn import LinearHead, Network


class Context:
    def bare_backbone(self) -> nn.Module:
        return ConvNet()


class Keeper(Persistent):
    """Has children that come and go, and a buffer whose size depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.context = Context()
        self.network: Network | None = None
        self.teacher: Network | None = None
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("means", torch.empty(0, 0))

    def fill(self, classes: int, extractors: int = 1) -> Keeper:
        parts = [ConvNet() for _ in range(extractors)]
        self.network = Network(parts, LinearHead(6 * extractors, classes))
        self.network.freeze(*range(extractors - 1))
        with torch.no_grad():
            self.scale.fill_(2.5)
        self.means = torch.randn(classes, 4)
        return self


def copy(keeper: Keeper, into: Keeper) -> Keeper:
    structure = json.loads(json.dumps(keeper.structure()))
    tensors = {name: value.clone() for name, value in keeper.tensors().items()}
    into.restore(structure)
    into.load_tensors(tensors)
    return into


@pytest.mark.parametrize("before", [Keeper, lambda: Keeper().fill(9, 3)])
@pytest.mark.parametrize("teacher", [False, True])
def test_a_fresh_or_a_used_one_becomes_the_same(before, teacher) -> None:
    keeper = Keeper().fill(5, 2)
    if teacher:
        keeper.teacher = Network([ConvNet()], LinearHead(6, 3))
    again = before()
    if not teacher:
        again.teacher = Network([ConvNet()], LinearHead(6, 3))
    again = copy(keeper, again)
    assert (again.teacher is None) == (not teacher)
    assert again.network.frozen == (0,) and len(again.network.extractors) == 2
    assert keeper.tensors().keys() == again.tensors().keys()
    assert all(torch.equal(v, again.tensors()[k]) for k, v in keeper.tensors().items())
    images = torch.randn(2, 3, 8, 8)
    with evaluating(keeper), evaluating(again), torch.no_grad():
        assert torch.equal(keeper.network(images), again.network(images))


def test_what_does_not_fit_is_a_sentence() -> None:
    keeper = Keeper().fill(5)
    again = Keeper()
    again.restore(keeper.structure())
    tensors = dict(keeper.tensors())
    with pytest.raises(FastcilError, match="the saved state of Keeper does not fit: means"):
        again.load_tensors({k: v for k, v in tensors.items() if k != "means"})
    tensors["network.head.weight"] = torch.zeros(5, 7)
    with pytest.raises(FastcilError, match=r"parameter network\.head\.weight is \(5, 7\)"):
        again.load_tensors(tensors)


def test_evaluating_puts_each_part_back() -> None:
    network = Network([ConvNet(), ConvNet()], LinearHead(12, 3)).train()
    network.freeze(0)
    network.extractors[1].layers[1].eval()
    before = {name: part.training for name, part in network.named_modules()}
    assert len(set(before.values())) == 2
    with pytest.raises(RuntimeError), evaluating(network):
        assert not any(part.training for part in network.modules())
        raise RuntimeError
    assert {name: part.training for name, part in network.named_modules()} == before


def test_retained_counts_its_buffers() -> None:
    buffers = {"a": torch.zeros(3, 5, dtype=torch.float16), "b": torch.zeros(7, dtype=torch.int64)}
    assert Retained("x", "logits", buffers).nbytes == 3 * 5 * 2 + 7 * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_total_is_in_single_precision_or_better(dtype) -> None:
    terms = {"a": torch.tensor(4096.0, dtype=dtype), "b": torch.tensor(0.5, dtype=dtype)}
    assert total(terms).dtype == torch.promote_types(dtype, torch.float32)
    assert float(total(terms)) == 4096.5


def test_a_loss_with_replaced_parameters_is_pure_and_differentiable() -> None:
    """Stage.loss at theta' = theta + delta, against a network that has these weights."""
    keeper = Keeper().fill(3)
    stage = Stage(
        name="s",
        method=keeper,
        objective=lambda images: {"mean": keeper.network(images).square().mean()},
        streams=(),
        recipe=Recipe(1, 0.1),
        parameters=lambda: keeper.network.parameters(),
    )
    images = torch.randn(2, 3, 6, 6)
    before = {name: value.clone() for name, value in keeper.tensors().items()}
    name = "network.head.weight"
    weight = (before[name] + 1.0).requires_grad_()
    with evaluating(keeper):
        loss = stage.loss(images, {name: weight})["mean"]
        (gradient,) = torch.autograd.grad(loss, weight)
        features = keeper.network.features(images)
        expected = (features @ weight.T + keeper.network.head.bias).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight)[0])
    assert all(torch.equal(value, keeper.tensors()[k]) for k, value in before.items())
    assert not torch.equal(stage.loss(images)["mean"], loss)
