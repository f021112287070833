"""Compiled objectives: the same numbers as eager ones, task after task."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet
from torch import Tensor

import fastcil
from fastcil.contract import Stage
from fastcil.engine.trainer import Trainer

SHORT = {"engine.epoch_scale": 0.01, "engine.progress": False}


@pytest.fixture
def counted_compile(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """torch.compile traces and runs its graphs as they are; counts graphs and their calls."""
    counts = {"graphs": 0, "calls": 0}
    compile_ = torch.compile

    def backend(graph: Any, inputs: Iterable[Tensor]) -> Callable[..., Any]:
        counts["graphs"] += 1

        def run(*args: Any) -> Any:
            counts["calls"] += 1
            return graph(*args)

        return run

    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, backend=backend, **options)
    )
    return counts


# To trace dlcft's tangents takes its time.
@pytest.mark.parametrize(
    "method",
    [
        "finetune",
        "foster+cim",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("darkpp", "gem", "si", "dlcft")),
    ],
)
def test_compiled_objectives_survive_growing_heads(
    method, counted_compile, assert_same, monkeypatch
) -> None:
    """Tasks with heads of 2, 3 and 5 classes give what eager training gives.

    Each stage of a task has a head, networks or an objective of its own, and so graphs of its own,
    which are made in its first epoch.
    """
    rng = np.random.default_rng(0)
    sizes = (2, 1, 2)
    data = [
        {f"{t}{k}": rng.integers(0, 256, (6, 12, 12, 3), np.uint8) for k in range(classes)}
        for t, classes in enumerate(sizes)
    ]
    tensors, calls, made = [], [], []
    run_epoch = Trainer._run_epoch

    def counted(trainer: Trainer, stage: Stage, epoch: int) -> None:
        before = counted_compile["graphs"]
        run_epoch(trainer, stage, epoch)
        made.append((epoch, counted_compile["graphs"] - before))

    monkeypatch.setattr(Trainer, "_run_epoch", counted)
    for compiled in (False, True):
        learner = fastcil.Learner(
            method,
            memory="8 images",
            backbone=ConvNet,
            **{**SHORT, "engine.compile": compiled, "engine.batch_size": 8},
        )
        for shelf in data:
            learner.learn(shelf)
            calls.append(counted_compile["calls"])
        assert learner.predict(data[0]["00"]).scores.shape == (6, 5)
        tensors.append(learner.parts.state())
    eager, compiled = calls[: len(sizes)], calls[len(sizes) :]
    assert not any(eager) and compiled == sorted(set(compiled)) and compiled[0] > 0
    assert_same(tensors[0], tensors[1])
    assert any(graphs for _, graphs in made)
    assert not any(graphs for epoch, graphs in made if epoch > 0)


def learn_pairs(tasks: int, **options: Any) -> fastcil.Learner:
    """A learner of two classes a task, few steps each."""
    rng = np.random.default_rng(0)
    learner = fastcil.Learner(
        "finetune",
        memory="none",
        backbone=ConvNet,
        **{**SHORT, "engine.compile": True, "engine.batch_size": 4, **options},
    )
    for t in range(tasks):
        learner.learn({f"{t}{k}": rng.integers(0, 256, (4, 12, 12, 3), np.uint8) for k in range(2)})
    return learner


def test_a_long_stream_stays_compiled(counted_compile, monkeypatch) -> None:
    """More stages than torch traces one piece of code."""
    tasks, made = torch._dynamo.config.recompile_limit + 2, []
    run_stage = Trainer._run_stage

    def counted(trainer: Trainer, *arguments: Any) -> None:
        before = dict(counted_compile)
        run_stage(trainer, *arguments)
        made.append([counted_compile[name] - before[name] for name in ("graphs", "calls")])

    monkeypatch.setattr(Trainer, "_run_stage", counted)
    learn_pairs(tasks)
    assert len(made) == tasks
    # Batches are alike, so that each stage is traced once; the first is the longer one.
    assert made[1:] == [[1, made[1][1]]] * (tasks - 1)
    assert made[0][0] == 1 and made[0][1] >= made[1][1] > 0


def test_what_the_caller_compiled_stays_compiled(counted_compile) -> None:
    own = torch.compile(lambda x: x.cos() + 1)
    own(torch.ones(3))
    before = counted_compile["graphs"]
    learn_pairs(1)
    made = counted_compile["graphs"]
    assert made > before
    own(torch.zeros(3))
    assert counted_compile["graphs"] == made


def test_graphs_go_with_their_stage(monkeypatch) -> None:
    graphs: list[weakref.ref[Any]] = []
    compile_ = torch.compile

    def backend(graph: Any, inputs: Iterable[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            return graph(*args)

        graphs.append(weakref.ref(run))
        return run

    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=backend))
    learn_pairs(3)
    gc.collect()
    assert len(graphs) == 3 and not any(graph() for graph in graphs)
