"""One rank, a process of its own, that trains some methods in float64 and saves what it holds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backbones import ConvNet
from compositions import SHORT

from fastcil import train
from fastcil.contract import Batch
from fastcil.data import read_batch
from fastcil.engine import reading, seed_run
from fastcil.engine.distributed import joined
from fastcil.engine.loader import Loader
from fastcil.engine.state import save_state
from fastcil.nn import CompletionAutoencoder

# Batches and shares that don't come out even.
OPTIONS = {
    "engine.epoch_scale": 0.04,
    "engine.batch_size": 13,
    "engine.progress": False,
    "engine.threads": 1,
    "augment.size": 12,
}
# Of online methods, for thirty steps at least.
LONG = {
    "ebm.first.epochs": 170,
    "ebm.later.epochs": 170,
    "mer.first.epochs": 170,
    "mer.later.epochs": 170,
}
# Of methods whose recipes are short, for thirty steps at least.
SCALES = {"dlcft": 0.3, "dark": 0.13, "darkpp": 0.13, "eeil": 0.12, "icarl": 0.09, "ncm": 0.09}
SCALES |= {"topic": 0.06, "lecnet": 0.05}
# GEM's exemplars are fewer than four ranks.
MEMORY = {"gem": "3 images", "mer": "8 images"}


# Images that are always the same, at which a teacher looks once.
PLAIN = {"lwf": {"augment.crop": "none", "augment.flip": False, "augment.brightness": 0.0}}


class DoubleNet(ConvNet):
    """Takes what some addons read in single precision too."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.double())

    def levels(self, images: torch.Tensor) -> list[torch.Tensor]:
        return super().levels(images.double())


def draw(per_class: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    labels = [label for label in range(5) for _ in range(per_class)]
    return rng.integers(0, 256, (len(labels), 16, 18, 3), np.uint8), labels


def read_double(*arguments: Any, **named: Any) -> torch.Tensor:
    return read_batch(*arguments, **named).double()


STEPS: list[int] = []
BATCHES, COMPLETE = Loader.batches, CompletionAutoencoder.forward


def count_steps(loaders: Loader, *step: int) -> list[Batch]:
    STEPS.append(1)
    return BATCHES(loaders, *step)


def complete_double(autoencoder: CompletionAutoencoder, images: torch.Tensor) -> torch.Tensor:
    return COMPLETE(autoencoder, images.double())


def learn(method: str) -> dict[str, Any]:
    """What a learner holds after two tasks, and after how many steps."""
    STEPS.clear()
    parts = method.split("+")
    short = {k: v for k, v in {**SHORT, **LONG}.items() if k.partition(".")[0] in parts}
    memory = MEMORY.get(method, "6 images")
    data = draw(11, 0), draw(2, 1)
    scale = {"engine.epoch_scale": SCALES.get(parts[0], OPTIONS["engine.epoch_scale"])}
    backbone = DoubleNet if {"mnemonics", "samc"} & set(parts) else ConvNet
    result = train(
        method,
        data,
        "b3-inc2",
        memory,
        backbone=backbone,
        **{**OPTIONS, **short, **scale, **PLAIN.get(method, {})},
    )
    tasks = [[task.correct, task.exemplars] for task in result.outcomes[0].tasks]
    return {"parts": result.learner.state()["parts"], "tasks": tasks, "steps": len(STEPS)}


def write_slowly(folder: Path, place: Mapping[str, str], timeout: float) -> None:
    """Trains as one of the ranks, of which the first takes longer than ranks wait to write once.

    Args:
        folder: The run's; gets a file ``slow`` when that was done.
        place: As `work` takes it.
        timeout: Seconds that a rank waits for the others in a step.
    """
    os.environ.update(place)
    torch.set_num_threads(1)
    slow = folder / "slow"

    def save_slowly(*what: Any) -> None:
        if not slow.exists():
            time.sleep(1.5 * timeout)
            slow.touch()
        save_state(*what)

    seed_run.save_state = save_slowly
    options = {**OPTIONS, "engine.rank_timeout": timeout, "engine.checkpoint_seconds": 0.0}
    data = draw(11, 0), draw(2, 1)
    train("er", data, "b3-inc2", "6 images", backbone=ConvNet, run_dir=folder, **options)


class _Late:
    """A store whose answers are waited for a while late."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def wait(self, *arguments: Any) -> None:
        time.sleep(1.0)
        self.store.wait(*arguments)


def leave_late(place: Mapping[str, str]) -> None:
    """Does nothing as one of the ranks, of which the second is slow to hear that all are done.

    Args:
        place: As `work` takes it.
    """
    os.environ.update(place)
    with joined("cpu", 60.0) as ranks:
        if ranks.rank:
            ranks._store = _Late(ranks._store)


def work(folder: Path, methods: Sequence[str], place: Mapping[str, str]) -> None:
    """Trains the methods as one of the ranks.

    Args:
        folder: Gets ``METHOD-SIZE-RANK.safetensors``.
        methods: Compositions.
        place: What torchrun would tell this process of itself, in the environment.
    """
    os.environ.update(place)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    reading.read_batch = read_double
    Loader.batches, CompletionAutoencoder.forward = count_steps, complete_double
    with joined("cpu", 60.0) as ranks:
        for method in methods:
            save_state(folder / f"{method}-{ranks.size}-{ranks.rank}.safetensors", learn(method))
