"""Heads that no loss is about are left alone, whatever the optimiser does to weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import Learner

OPTIONS = {"engine.progress": False, "engine.epoch_scale": 0.05, "engine.batch_size": 4}


def shelf(names: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 256, (6, 8, 8, 3), np.uint8) for name in names}


@pytest.mark.parametrize("method", ["finetune", "ewc", "online-ewc", "osla", "mas", "si", "dlcft"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_old_heads_stay_bit_for_bit(method: str, optimizer: str) -> None:
    """Adam divides a weight decay by its own size: with no other gradient it is as large as any."""
    recipe = {"optimizer": optimizer, "weight_decay": 0.1, "lr": 0.01, "epochs": 40}
    own = {f"{method}.head": "task", f"{method}.first": recipe, f"{method}.later": recipe}
    learner = Learner(method, memory="none", backbone=ConvNet, **OPTIONS, **own)
    learner.learn(shelf("ab", 0))
    head = learner.method.network.head
    before = [parameter.detach().clone() for parameter in head.parameters()]
    learner.learn(shelf("cde", 1))
    after = list(learner.method.network.head.parameters())
    assert [len(p) for p in after] == [5] * len(before)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new[:2])
