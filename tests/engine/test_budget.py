"""At every task boundary of every method the bytes held are at most the budget.

They are added up from the buffers found in the memory object itself, down to the storage under
each tensor, not from what it says of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from backbones import ConvNet
from torch import Tensor

from fastcil import Budget, train
from fastcil.contract import lookup, parse_composition
from fastcil.contract.registry import METHODS
from fastcil.engine.finding import exceeds_budget
from fastcil.engine.learner import Learner
from fastcil.engine.result import Result
from fastcil.engine.seed_run import SeedRun
from fastcil.errors import FastcilError
from fastcil.memory import Memory

SIZES = (3, 2, 1)
COMPOSITIONS = [
    *(name for name in METHODS if name != "joint"),
    "icarl+cam",
    "icarl+aanets",
    "er+mrdc",
    "icarl+mrdc",
    "darkpp+cam",
    "icarl+mnemonics",
    "er+samc",
    "der+cim",
    "foster+cim",
]
OPTIONS = {
    "engine.epoch_scale": 0.005,
    "engine.batch_size": 16,
    "engine.progress": False,
    "augment.size": 16,
}
OWN = {
    "eec": {"eec.width": 4},
    "er+samc": {"samc.completion": "rule", "samc.threshold": 0.2},
}
COUNTED = ("exemplars", "logits", "generator", "codec")


def draw(per_class: int, seed: int) -> tuple[list[np.ndarray], list[int]]:
    """Images of every size from 14 to 26 pixels a side."""
    rng = np.random.default_rng(seed)
    labels = [label for label in range(sum(SIZES)) for _ in range(per_class)]
    sides = [rng.integers(14, 27, 2) for _ in labels]
    return [rng.integers(0, 256, (*side, 3), np.uint8) for side in sides], labels


DATA = draw(10, 0), draw(2, 1)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor that an object holds, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for option in dataclasses.fields(value):
            yield from tensors_in(getattr(value, option.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Memory):
        yield from tensors_in(vars(value))


def nbytes_of(tensors: Iterator[Tensor]) -> int:
    """Bytes of the storages under some tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def check_boundary(learner: Learner) -> int:
    """Compares what is held with the budget; the bytes that count."""
    memory, budget = learner.memory, learner.budget
    state = memory.state()
    exemplars = sum(t.numel() * t.element_size() for t in state.values())
    held_in_all = nbytes_of(tensors_in(memory))
    assert exemplars + memory.working_nbytes == held_in_all, "memory holds more than it says"
    retained = [e for part in learner.parts.learners for e in part.retained()]
    kinds = {entry.kind for entry in retained}
    counted = [e for e in retained if budget.count == "all" or e.kind in COUNTED]
    held = exemplars + sum(nbytes_of(tensors_in(dict(e.buffers))) for e in counted)
    said = learner.nbytes()
    assert held == said["budgeted"]
    lasting = [e for e in retained if e.kind != "analysis"]
    assert said["all"] == exemplars + sum(nbytes_of(tensors_in(dict(e.buffers))) for e in lasting)
    known_kinds = {"network", "logits", "curvature", "generator", "codec", "analysis"}
    assert kinds <= known_kinds or budget.count == "all"
    if memory.keeps != "everything":
        classes = len(learner.class_names)
        limit = budget.limit(classes)
        assert (held if budget.unit == "bytes" else memory.units) <= limit + 1e-6
        # What a method chooses itself shares one budget; otherwise each class has its quota.
        if budget.unit == "images" and memory.selection != "own":
            units = memory.codec.units(memory._images)
            for label in range(classes):
                mine = float(units[memory._labels == label].sum())
                assert mine <= budget.quota(classes) + 1e-6
    return held


@pytest.fixture
def boundaries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Checks every boundary, when the task is measured and when it is done; the bytes held."""
    held: list[int] = []
    measure, save = SeedRun._measure, SeedRun._save

    def measured(run: SeedRun, *arguments: Any) -> Any:
        assert run.learner is not None
        held.append(check_boundary(run.learner))
        return measure(run, *arguments)

    def saved(run: SeedRun, *arguments: Any) -> None:
        assert run.learner is not None and check_boundary(run.learner) == held[-1]
        save(run, *arguments)

    monkeypatch.setattr(SeedRun, "_measure", measured)
    monkeypatch.setattr(SeedRun, "_save", saved)
    return held


def run(method: str, memory: str, **options: Any) -> Result:
    options = {**OPTIONS, **OWN.get(method, {}), **options}
    result = train(method, DATA, "b3-inc2", memory, backbone=ConvNet, **options)
    assert [task.classes for task in result.outcomes[0].tasks] == list(SIZES)
    return result


def test_every_method_is_here() -> None:
    assert {name.partition("+")[0] for name in COMPOSITIONS} | {"joint"} >= set(METHODS)


@pytest.mark.parametrize(
    "memory",
    [
        "13001B",
        "2 images/class",
        pytest.param("2500B/class", marks=pytest.mark.slow),
        pytest.param("13 images", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", COMPOSITIONS)
def test_the_budget_is_kept_at_every_boundary(method, memory, boundaries) -> None:
    result = run(method, memory)
    assert len(boundaries) == len(SIZES)
    tasks, known = result.outcomes[0].tasks, 0
    for held, task in zip(boundaries, tasks, strict=True):
        known += task.classes
        assert task.nbytes["budgeted"] == held
        assert task.limit == Budget.parse(memory).limit(known)
        if lookup("method", parse_composition(method)[0]).keeps == "nothing":
            # eec keeps codes.
            assert (held > 0) == (method == "eec") and task.exemplars == [0] * known
        else:
            # Something is kept of every class, by chance of most, and the budget is not idle.
            own = result.learner.memory.selection == "own"
            assert min(task.exemplars) >= 1 or (own and sum(map(bool, task.exemplars)) > known / 2)
            used = held if "B" in memory else task.units
            # A method that chooses itself makes room in advance, in the first task for raw images.
            assert used >= (0.4 if own else 0.45) * task.limit
    assert not exceeds_budget(result)
    assert result.learner.memory.counts(6) == tasks[-1].exemplars


def test_a_budget_for_everything_counts_networks(boundaries) -> None:
    result = run("der", "20000B, count=all")
    tasks = result.outcomes[0].tasks
    networks = [sum(n for name, n in t.nbytes.items() if "extractor" in name) for t in tasks]
    assert networks[0] == 0 < networks[1] < networks[2]
    for held, task, network in zip(boundaries, tasks, networks, strict=True):
        assert held == task.nbytes["all"] == task.nbytes["exemplars"] + network <= 20000


def test_a_compressed_memory_holds_more_exemplars_in_the_same_bytes(boundaries) -> None:
    raw, small = run("icarl", "25000B"), run("icarl+cam", "25000B", **{"cam.threshold": 0.9})
    assert small.exemplars > 1.2 * raw.exemplars


def test_what_completes_exemplars_counts_with_them(boundaries) -> None:
    completed = {"samc.completion": "both", "samc.analyse": True}
    result = run("er+samc", "100000B", **completed)
    for held, task in zip(boundaries, result.outcomes[0].tasks, strict=True):
        autoencoder, originals = task.nbytes["autoencoder"], task.nbytes["originals of exemplars"]
        assert held == task.nbytes["exemplars"] + autoencoder <= 100000 and originals > 0
    with pytest.raises(FastcilError, match="keeps 86244 bytes beside exemplars"):
        run("er+samc", "50000B", **completed)


def test_joint_keeps_everything_and_says_so(boundaries) -> None:
    result = run("joint", "4000B")
    known = 0
    for held, task in zip(boundaries, result.outcomes[0].tasks, strict=True):
        known += task.classes
        assert task.exemplars == [10] * known and held > task.limit
    assert exceeds_budget(result) and result.nbytes == boundaries[-1]
    assert result.learner.method.keeps == "everything"


def test_without_memory_nothing_is_kept(boundaries) -> None:
    for method in ("er", "darkpp", "icarl", "foster+cim"):
        result = run(method, "none")
        assert boundaries[-3:] == [0, 0, 0] and result.exemplars == 0


def test_without_a_limit_everything_is_kept(boundaries) -> None:
    result = run("icarl", "unlimited")
    assert result.outcomes[0].tasks[-1].exemplars == [10] * 6
    assert [task.limit for task in result.outcomes[0].tasks] == [None] * 3


def test_a_budget_that_networks_alone_exceed_is_a_sentence() -> None:
    too_small = pytest.warns(UserWarning, match="would hold one of each")
    sentence = pytest.raises(FastcilError, match="bytes beside exemplars; pass at least '")
    with too_small, sentence:
        run("der", "1000B, count=all")
