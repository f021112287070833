"""Recipes of a codec's training: the schedule, the published figures, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from fastcil.compression import FINETUNING, PRETRAINING, CodecRecipe, CodecTraining
from fastcil.compression.training import preset
from fastcil.errors import FastcilError

RECIPE = CodecRecipe(epochs=2, lr=1e-3)


@pytest.mark.parametrize(
    ("epochs", "hold", "final"), [(10, 0.5, 0.1), (7, 0.0, 0.1), (4, 1.0, 0.3)]
)
def test_the_rate_is_held_and_falls_to_its_end(epochs: int, hold: float, final: float) -> None:
    recipe = CodecRecipe(epochs=epochs, lr=0.2, hold=hold, final=final)
    start = hold * epochs
    for epoch in range(epochs):
        share = max(0.0, epoch - start) / max(1, epochs - start)
        factor = final + (1 - final) * (1 + math.cos(math.pi * share)) / 2
        assert recipe.lr_at(epoch) == pytest.approx(0.2 * factor)
    if hold < 1:
        assert recipe.lr_at(epochs) == pytest.approx(0.2 * final)


def test_warm_up_and_other_schedules_are_the_usual_ones() -> None:
    recipe = CodecRecipe(epochs=8, lr=1.0, warmup=1, hold=0.25)
    assert [recipe.lr_at(e) for e in range(3)] == [0.5, 1.0, 1.0]
    steps = CodecRecipe(epochs=8, lr=1.0, schedule="step", milestones=(4,))
    assert [steps.lr_at(e) for e in (3, 4)] == [1.0, 0.1]


@pytest.mark.parametrize(
    ("table", "steps", "lr", "hold", "ema"),
    [(PRETRAINING, 500_000, 2e-4, 0.5, 0.9999), (FINETUNING, 100_000, 1e-4, 0.0, 0.0)],
)
def test_the_published_recipes(table: Any, steps: int, lr: float, hold: float, ema: float) -> None:
    config = preset(table, "paper")
    recipe = config.recipe
    assert (config.steps, config.size, config.ema) == (steps, 256, ema)
    assert (recipe.lr, recipe.hold, recipe.final, recipe.clip) == (lr, hold, 0.1, 2.0)
    assert (recipe.optimizer, recipe.weight_decay, recipe.batch_size) == ("adam", 0.0, 32)
    assert config.steps * recipe.batch_size in (16_000_000, 3_200_000)
    assert config.ema_ramp == 10_000 and config.alpha == 0.5
    for name, limits in (("low-to-high", (32, 4096)), ("high-to-low", (4, 1024))):
        assert FINETUNING[f"paper-{name}"] == replace(FINETUNING["paper"], lambda_range=limits)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"size": 100}, "size is 100; it must be a multiple of 64"),
        ({"epoch_steps": 0}, "epoch_steps is 0"),
        ({"ema": 1.0}, "ema is 1.0; it must be below 1"),
        ({"ema_ramp": 0.0}, "ema_ramp is 0.0"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be above 0"),
        ({"lambda_range": (64.0, 32.0)}, "lambda_range is"),
        ({"strategy": "dec"}, "strategy is 'dec'; it must be one of all, enc, enc-dec, kr"),
        ({"target": "latents"}, "target is 'latents'"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(FastcilError, match=says):
        CodecTraining(RECIPE, **given)


@pytest.mark.parametrize("name", ["hold", "final"])
def test_shares_are_from_0_to_1(name: str) -> None:
    with pytest.raises(FastcilError, match=f"{name} is 1.5; it must be a share"):
        CodecRecipe(epochs=1, lr=1.0, **{name: 1.5})
    with pytest.raises(FastcilError, match="preset is 'large'; it must be one of paper, small"):
        preset(PRETRAINING, "large")
