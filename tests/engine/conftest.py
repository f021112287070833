"""Results as `train` saves them, made up in milliseconds; and what it means to be equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastcil.engine.result import Result, SeedOutcome, TaskOutcome
from fastcil.memory import Budget


def build_result(
    method: str = "er",
    level: float = 0.8,
    classes: tuple[int, ...] = (2, 2, 2),
    seeds: tuple[int, ...] = (0, 1, 2),
    readouts: tuple[str, ...] = ("linear",),
    memory: str = "4KiB",
    held: float = 0.9,
    network: int = 0,
    records: list[dict] | None = None,
    images: int = 20,
) -> Result:
    """A method that is right with probability about ``level``, less for older tasks.

    ``held`` is the share of the budget's limit held after each task, ``network`` the bytes of a
    further network after the last one; ``records`` are the last task's.
    """
    budget = Budget.parse(memory)
    outcomes = []
    for seed in seeds:
        rng = np.random.default_rng([seed, *method.encode()])
        outcome = SeedOutcome(seed)
        for t in range(len(classes)):
            ages = [t - j for j in range(t + 1) for _ in range(classes[j])]
            limit = budget.limit(len(ages))
            amount = 1000.0 if np.isinf(limit) else held * limit
            nbytes = {"exemplars": int(amount)}
            if network and t + 1 == len(classes):
                nbytes["extractor 1"] = network
            nbytes |= {"budgeted": int(amount), "all": sum(nbytes.values())}
            correct = {}
            for readout in readouts:
                chance = [np.clip(level - 0.1 * age, 0.05, 0.95) for age in ages]
                top1 = rng.binomial(images, chance)
                top5 = top1 + rng.binomial(images - top1, 0.5)
                count = [images] * len(ages)
                correct[readout] = {"top1": top1.tolist(), "top5": top5.tolist(), "count": count}
            outcome.tasks.append(
                TaskOutcome(
                    classes=classes[t],
                    correct=correct,
                    exemplars=[3 + k % 2 for k in range(len(ages))],
                    nbytes=nbytes,
                    limit=None if np.isinf(limit) else limit,
                    units=amount,
                    seconds=10.0 + t,
                    records=(records or []) if t + 1 == len(classes) else [],
                )
            )
        outcomes.append(outcome)
    config = {
        "method": method,
        "data": "scenes",
        "scenario": f"lfs-{len(classes)}",
        "memory": memory,
        "seeds": list(seeds),
        method: {"epochs": 3},
    }
    environment = {"device": "cpu", "commit": "0123456789ab", "command": "fastcil train --x '<y>'"}
    return Result(config, environment, outcomes)


@pytest.fixture
def make_result() -> Callable[..., Result]:
    """Makes a synthetic result; see `build_result`."""
    return build_result


def check_same(a: Any, b: Any, place: str = "") -> None:
    """Equal structure, equal numbers, equal bits in tensors; ``place`` says where they differ."""
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            check_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            check_same(x, y, f"{place}[{k}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), place
    else:
        assert a == b, place


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Compares nested state bit for bit; see `check_same`."""
    return check_same
