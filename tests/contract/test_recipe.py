"""Schedules against torch's own, and the scaling of lengths."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from fastcil.contract import Recipe, replace_batch_size, restore_optimizer, scale_epochs
from fastcil.errors import FastcilError


@pytest.mark.parametrize(
    "recipe, schedule",
    [
        (Recipe(12, 0.3), lambda o: lr_scheduler.CosineAnnealingLR(o, 12)),
        (
            Recipe(12, 0.3, schedule="step", milestones=(3, 7, 8), gamma=0.2),
            lambda o: lr_scheduler.MultiStepLR(o, [3, 7, 8], 0.2),
        ),
        (Recipe(12, 0.3, schedule="constant"), lambda o: lr_scheduler.ConstantLR(o, 1.0)),
        (
            Recipe(12, 0.3, warmup=4),
            lambda o: lr_scheduler.SequentialLR(
                o,
                [
                    lr_scheduler.LinearLR(o, 1 / 5, 1.0, total_iters=4),
                    lr_scheduler.CosineAnnealingLR(o, 8),
                ],
                [4],
            ),
        ),
    ],
)
def test_schedules_are_torchs(recipe, schedule) -> None:
    optimizer = recipe.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    scheduler = schedule(optimizer)
    for epoch in range(recipe.epochs):
        (rate,) = scheduler.get_last_lr()
        assert recipe.lr_at(epoch) == pytest.approx(rate)
        optimizer.step()
        scheduler.step()


def test_milestones_count_from_the_end_of_the_warmup() -> None:
    recipe = Recipe(10, 1.0, schedule="step", milestones=(3,), warmup=2)
    rates = [recipe.lr_at(epoch) for epoch in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *[1.0] * 3, *[0.1] * 5])


@pytest.mark.parametrize("name, kind", [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_optimizers_have_the_recipes_settings(name, kind) -> None:
    recipe = Recipe(1, 0.3, optimizer=name, momentum=0.8, weight_decay=0.02)
    optimizer = recipe.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.02)
    assert group.get("momentum", 0.8) == 0.8


def build_plain(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimiser as torch has it in Python, a parameter at a time."""
    settings = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "foreach": False}
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, **settings)
    return torch.optim.SGD(
        parameters, momentum=recipe.momentum, nesterov=recipe.nesterov, **settings
    )


def draw_parameters(seed: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """A convolution's, in channels_last, a 1 x 1 one's, a matrix, a vector, a number."""
    shapes = ((5, 3, 3, 3), (4, 2, 1, 1), (3, 4), (7,), ())
    draws = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=draws, dtype=dtype) for shape in shapes]
    made[0] = made[0].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in made]


def pull(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], step: int) -> None:
    """A step of a loss that backward gives gradients of, in whatever layout."""
    optimizer.zero_grad(set_to_none=True)
    targets = draw_parameters(100 + step, parameters[0].dtype)
    pairs = zip(parameters, targets, strict=True)
    sum(((p - t.detach().contiguous()) ** 3).sum() for p, t in pairs).backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam"])
def test_the_fused_optimizers_are_the_plain_ones(name, dtype) -> None:
    options = {"optimizer": "sgd", "nesterov": True} if name == "nesterov" else {"optimizer": name}
    recipe = Recipe(1, 0.01, momentum=0.8, weight_decay=0.02, **options)
    fused, plain = draw_parameters(0, dtype), draw_parameters(0, dtype)
    optimizer, reference = recipe.make_optimizer(fused), build_plain(recipe, plain)
    assert optimizer.param_groups[0]["fused"]
    for step in range(5):
        pull(optimizer, fused, step)
        pull(reference, plain, step)
    tolerance = 8 * torch.finfo(dtype).eps
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_parameters_with_gaps_are_not_fused() -> None:
    gaps = nn.Parameter(torch.ones(4, 6)[:, ::2])
    group = Recipe(1, 0.1).make_optimizer([gaps]).param_groups[0]
    assert (group["fused"], group["foreach"]) == (None, True)


@pytest.mark.parametrize("form", ["fused", "plain"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_an_optimizer_goes_on_from_a_file_to_the_same_bits(name, form) -> None:
    """Files keep no strides: a momentum comes back contiguous, whatever its parameter is."""
    recipe = Recipe(1, 0.05, optimizer=name)
    through, again = draw_parameters(0, torch.float32), draw_parameters(0, torch.float32)
    optimizer = recipe.make_optimizer(through)
    first = optimizer if form == "fused" else build_plain(recipe, through)
    for step in range(2):
        pull(first, through, step)
    saved = first.state_dict()
    saved["state"] = {
        number: {key: value.clone().contiguous() for key, value in held.items()}
        for number, held in saved["state"].items()
    }
    with torch.no_grad():
        for one, other in zip(again, through, strict=True):
            one.copy_(other)
    if first is not optimizer:
        restore_optimizer(optimizer, first.state_dict())
    other = recipe.make_optimizer(again)
    restore_optimizer(other, saved)
    for step in range(2, 4):
        pull(optimizer, through, step)
        pull(other, again, step)
    assert all(map(torch.equal, through, again))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"epochs": -1}, "epochs is -1; it must be at least 0."),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1."),
        ({"warmup": -2}, "warmup is -2; it must be at least 0."),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001; it must be at least 0."),
        ({"momentum": float("nan")}, "momentum is nan; it must be at least 0."),
        ({"clip": -1.0}, "clip is -1.0; it must be at least 0."),
        ({"clip_value": -1.0}, "clip_value is -1.0; it must be at least 0."),
        ({"lr": 0}, "lr is 0; it must be a positive number."),
        ({"lr": float("inf")}, "lr is inf; it must be a positive number."),
        ({"gamma": 0.0}, "gamma is 0.0; it must be a positive number."),
        ({"schedule": "exp"}, "schedule is 'exp'; it must be one of cosine, step, constant."),
        (
            {"nesterov": True, "momentum": 0.0},
            "nesterov is True with optimizer 'sgd' and momentum 0.0; set it to False, or use 'sgd' "
            "and a momentum above 0.",
        ),
        (
            {"nesterov": True, "optimizer": "adam"},
            "nesterov is True with optimizer 'adam' and momentum 0.9; set it to False, or use "
            "'sgd' and a momentum above 0.",
        ),
        ({"optimizer": "lion"}, "optimizer is 'lion'; it must be one of sgd, adam."),
    ],
)
def test_bad_recipes_are_a_sentence(changes, says) -> None:
    with pytest.raises(FastcilError) as caught:
        Recipe(**{"epochs": 3, "lr": 0.1, **changes})
    assert str(caught.value) == says


LONG = Recipe(200, 0.1, milestones=(60, 120, 170), warmup=10, schedule="step")
FIXED = Recipe(10, 0.1, batch_size=16)


@dataclass(frozen=True)
class Deep:
    recipe: Recipe = LONG


@dataclass(frozen=True)
class Config:
    long: Recipe = LONG
    fixed: Recipe = field(default=FIXED, metadata={"own_batch": True})
    deep: Deep = Deep()
    period: int = field(default=40, metadata={"epochs": True})
    never: int = field(default=0, metadata={"epochs": True})
    count: int = 40


@pytest.mark.parametrize(
    "factor, epochs, milestones, warmup, period",
    [
        (1.0, 200, (60, 120, 170), 10, 40),
        (0.5, 100, (30, 60, 85), 5, 20),
        (0.1, 20, (6, 12, 17), 1, 4),
        (1e-4, 1, (1, 1, 1), 0, 1),
        (3.0, 600, (180, 360, 510), 30, 120),
    ],
)
def test_every_length_in_epochs_is_scaled(factor, epochs, milestones, warmup, period) -> None:
    config = scale_epochs(Config(), factor)
    for recipe in (config.long, config.deep.recipe):
        assert (recipe.epochs, recipe.milestones, recipe.warmup) == (epochs, milestones, warmup)
        assert (recipe.lr, recipe.schedule) == (0.1, "step")
    assert (config.period, config.never, config.count) == (period, 0, 40)
    assert Config() == Config(LONG, FIXED), "the original is as it was"


def test_batch_sizes_are_replaced_but_for_those_of_their_own() -> None:
    config = replace_batch_size(Config(), 7)
    assert (config.long.batch_size, config.deep.recipe.batch_size) == (7, 7)
    assert config.fixed == FIXED
    assert replace_batch_size(Config(), None) == Config()
