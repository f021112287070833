"""Where a CIM branch's activations are, and which a new extractor starts with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastcil.addons.curves import blocks, inherited, learnable
from fastcil.nn import Pade, resnet20
from fastcil.nn.aggregation import aggregate


def some_curves(count: int) -> list[Pade]:
    curves = [Pade() for _ in range(count)]
    with torch.no_grad():
        for number, curve in enumerate(curves):
            curve.numerator[0] = number
    return curves


def marks(curves: list[Pade]) -> list[int]:
    return [int(curve.numerator[0]) for curve in curves]


@pytest.mark.parametrize("places", ["all", "last-block"])
def test_two_branches_start_as_the_one_they_were(places: str) -> None:
    plain = resnet20(width=4)
    both = aggregate(copy.deepcopy(plain))
    curves = some_curves(len(learnable(plain, places)))
    before = dict(zip(learnable(plain, places), marks(curves), strict=True))
    made = inherited(curves, both, places)
    after = dict(zip(learnable(both, places), marks(made), strict=True))
    assert len(after) == 2 * len(before) and len({id(curve) for curve in made}) == len(made)
    for name, mark in before.items():
        assert after[f"stable.{name}"] == after[f"plastic.{name}"] == mark
    assert inherited(made, both, places) == made


def test_a_block_of_two_branches_is_that_of_both() -> None:
    both = aggregate(resnet20(width=4))
    found = blocks(both)
    relus = [name for name, part in both.named_modules() if isinstance(part, nn.ReLU)]
    assert sorted(name for block in found for name in block) == sorted(relus)
    for block, one in zip(found, blocks(resnet20(width=4)), strict=True):
        assert block == [f"{branch}.{name}" for branch in ("stable", "plastic") for name in one]


def test_another_build_starts_anew() -> None:
    made = inherited(some_curves(5), resnet20(width=4), "all")
    assert marks(made) == marks([Pade() for _ in range(19)])
