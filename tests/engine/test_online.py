"""Online streams: what is trained once, what may be seen again, and that such runs go on."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet
from compositions import every_other
from torch import nn

from fastcil import Arrival, FastcilError, Result, Scenario, train
from fastcil.contract import Recipe, Stage, Stream, Task
from fastcil.data import Dataset, Examples, ImageStore
from fastcil.engine.online import see_once, taken
from fastcil.engine.plan import make_plan
from fastcil.engine.preset_files import read_preset
from fastcil.engine.rehearsal import rehearse
from fastcil.engine.seed_run import SeedRun
from fastcil.engine.state import load_state
from fastcil.engine.trainer import Trainer

OPTIONS = {
    "engine.batch_size": 6,
    "engine.progress": False,
    "augment.size": 12,
    "engine.checkpoint_seconds": 0,
}


def part(per_class: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    labels = [c for c in range(4) for _ in range(per_class)]
    images = rng.integers(0, 256, (len(labels), 12, 12, 3), np.uint8)
    return Examples(ImageStore.from_batch(images), torch.tensor(labels))


DATA = Dataset("four", part(7, 0), part(3, 1), ("a", "b", "c", "d"))


def run(method: str = "er", scenario: Any = "lfs-2-online", **changes: Any) -> Result:
    arguments = {"memory": "8 images", "backbone": ConvNet, **OPTIONS, **changes}
    return train(method, DATA, scenario, **arguments)


def make_stage(*streams: Stream, steps: int = 0, **recipe: Any) -> Stage:
    network = nn.Linear(1, 1)
    plan = Recipe(**{"epochs": 9, "lr": 0.1, "warmup": 3, **recipe})
    return Stage("any", network, lambda batch: {}, streams, plan, network.parameters, steps=steps)


def make_task(online: bool = True) -> Task:
    whole = part(5, 2)
    return Task(1, (2, 3), 2, whole.select(range(12)), whole.select(range(12, 20)), online=online)


def test_stages_on_new_images_pass_once_and_those_on_exemplars_stay() -> None:
    task = make_task()
    new, old, empty = task.examples, task.exemplars, task.examples.select([])
    only_old = Stream((new, old), 5, subset=torch.arange(12, 20))
    stages = {
        "new": make_stage(Stream((new,), 5)),
        "both": make_stage(Stream((new, old), 5)),
        "beside": make_stage(Stream((new,), 5), only_old),
        "balanced": make_stage(Stream((new, old), 5, subset=torch.tensor([0, 3, 12, 14]))),
        "asked": make_stage(Stream((new, old), 5, subset=lambda: torch.tensor([1]))),
        "behind nothing": make_stage(Stream((empty,), 5), Stream((new,), 5)),
        "never": make_stage(Stream((new,), 5), epochs=0, warmup=0),
        "old": make_stage(Stream((old,), 5)),
        "old of both": make_stage(only_old),
        "nothing": make_stage(Stream((empty,), 5)),
    }
    before = {name: stage.recipe for name, stage in stages.items()}
    see_once(list(stages.values()), replace(task, online=False))
    assert {name: stage.recipe for name, stage in stages.items()} == before
    see_once(list(stages.values()), task)
    once = {"new", "both", "beside", "balanced", "asked", "behind nothing"}
    for name, stage in stages.items():
        if name in once:
            assert stage.recipe == replace(before[name], epochs=1, warmup=0), name
            assert stage.recipe.lr_at(0) == 0.1, "at its peak rate"
        else:
            assert stage.recipe == before[name], name


@pytest.mark.parametrize(("steps", "left"), [(0, 0), (2, 2), (40, 3)])
def test_companions_on_new_images_take_no_more_than_a_pass(steps, left) -> None:
    task = make_task()
    main = make_stage(Stream((task.examples,), 4))
    main.companions = [
        make_stage(Stream((task.examples,), 4), steps=steps),
        make_stage(Stream((task.exemplars,), 4), steps=steps),
    ]
    see_once([main], task)
    assert [companion.steps for companion in main.companions] == [left, steps]
    assert [companion.recipe.epochs for companion in main.companions] == [1, 9]


def test_what_a_stream_takes_of_its_parts() -> None:
    parts = part(1, 0), part(1, 0).select([]), part(2, 0)
    assert taken(Stream(parts, 2)).tolist() == [4, 0, 8]
    assert taken(Stream(parts, 2, subset=torch.tensor([0, 3, 4, 11]))).tolist() == [2, 0, 2]
    assert taken(Stream(parts, 2, subset=torch.tensor([], dtype=torch.int64))).sum() == 0


def test_every_image_is_seen_once_in_a_shuffle(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    step = Stage.step

    def watch(stage: Stage, batches: Any, stepper: Any) -> Any:
        if stepper.stage is stage and not batches[0].part.any():
            seen[-1] += batches[0].index.tolist()
        return step(stage, batches, stepper)

    begin = Trainer.run

    def start(trainer: Trainer, *arguments: Any) -> None:
        seen.append([])
        begin(trainer, *arguments)

    monkeypatch.setattr(Stage, "step", watch)
    monkeypatch.setattr(Trainer, "run", start)
    run("er")
    assert [sorted(indices) for indices in seen] == [list(range(14))] * 2
    assert seen[0] != sorted(seen[0]) and seen[0] != seen[1]


@pytest.mark.parametrize(
    "method",
    ["lwf", "icarl", "eeil", "foster", "der+cim", "icarl+mnemonics", "dlcft", "dark", "gem+samc"],
)
@pytest.mark.parametrize("scenario", ["lfs-2-online", "data-2-online"])
def test_no_stage_of_any_method_passes_twice(
    method, scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    begin = Trainer.run

    def look(trainer: Trainer, stages: Any, *arguments: Any) -> None:
        epochs.extend(stage.recipe.epochs for stage in stages if not stage.behind)
        begin(trainer, stages, *arguments)

    monkeypatch.setattr(Trainer, "run", look)
    result = run(method, scenario)
    assert len(epochs) >= 2 and set(epochs) == {1}
    assert np.isfinite(result.average_accuracy)


def test_a_rehearsal_counts_single_epochs() -> None:
    plan = make_plan(
        "icarl", DATA, "lfs-2-online", "8 images", None, 0, "cpu", ConvNet, {"augment.size": 12}
    )
    assert [stage.epochs for task in rehearse(plan) for stage in task.stages] == [1, 1]


def identity(scenario: Scenario) -> dict[str, Any]:
    plan = make_plan("er", DATA, scenario, "none", None, 0, "cpu", ConvNet, {"augment.size": 12})
    return plan.identity()


def test_seeing_images_once_is_another_run(tmp_path: Path) -> None:
    arrivals = (Arrival((0, 1)), Arrival((2, 3)))
    ways = [{"task_aware": a, "online": b} for a in (False, True) for b in (False, True)]
    streams = [Scenario("mine", arrivals, **way) for way in ways]
    tasks = [identity(stream)["tasks"] for stream in streams]
    assert len(set(tasks)) == 4
    # What such a stream was before there were online ones: its unfinished runs go on.
    value = 0
    for arrival in arrivals:
        value = zlib.crc32(repr((arrival.classes, [])).encode(), value)
    assert tasks[0] == f"2 tasks, crc32 {value:08x}"
    run(scenario=streams[1], run_dir=tmp_path)
    with pytest.raises(FastcilError, match="tasks was 2 tasks"):
        run(scenario=streams[0], run_dir=tmp_path, **{"engine.epoch_scale": 0.01})


def stopped_run(
    monkeypatch: pytest.MonkeyPatch, every: int, **arguments: Any
) -> tuple[Result, list[int]]:
    """A run stopped after every few steps, until it is done, and in which tasks it was stopped."""
    save = SeedRun._save_between_steps
    steps, stops = 0, []

    def stop(seed_run: SeedRun, trainer: Trainer) -> None:
        nonlocal steps
        save(seed_run, trainer)
        steps += 1
        if steps % every == 0:
            stops.append(len(seed_run.outcome.tasks))
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SeedRun, "_save_between_steps", stop)
        while True:
            try:
                return run(**arguments), stops
            except KeyboardInterrupt:
                assert len(stops) < 200


@pytest.mark.parametrize("method", every_other(["icarl", "der+cim", "icarl+mnemonics", "gem+samc"]))
def test_stopped_again_and_again_ends_in_the_same_bits(
    method, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, assert_same
) -> None:
    whole = run(method, run_dir=tmp_path / "whole")
    stopped, stops = stopped_run(monkeypatch, 3, method=method, run_dir=tmp_path / "stopped")
    assert len(stops) > 1
    for a, b in zip(whole.outcomes[0].tasks, stopped.outcomes[0].tasks, strict=True):
        assert_same({**vars(a), "seconds": 0}, {**vars(b), "seconds": 0})


SAMC_RUN = read_preset("samc/cifar100-10")
OF_SAMC = [*(method for method in SAMC_RUN.configs if method != "samc"), "gem+samc", "ebm+samc"]


@pytest.mark.parametrize("method", every_other(OF_SAMC))
def test_methods_as_samcs_paper_sets_them_go_on_in_the_middle_of_a_task(
    method, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, assert_same
) -> None:
    """Their forms for one pass draw, hold and step as those for many epochs don't."""
    found = SAMC_RUN.options_for([method])
    own = {part: found[part] for part in method.split("+") if part in found}
    if method == "eec":
        own["eec"]["width"] = 4
    # Stages behind the stream keep several epochs, the autoencoder's of EEC a hundred.
    arguments = {"method": method, "scenario": "task-2-online", "engine.epoch_scale": 0.04, **own}
    whole = run(**arguments, run_dir=tmp_path / "whole")
    stopped, stops = stopped_run(monkeypatch, 2, **arguments, run_dir=tmp_path / "stopped")
    assert set(stops) == {0, 1}, "in the middle of either task"
    for a, b in zip(whole.outcomes[0].tasks, stopped.outcomes[0].tasks, strict=True):
        assert_same({**vars(a), "seconds": 0}, {**vars(b), "seconds": 0})
    ends = [tmp_path / name / "seed-0" / "learner.safetensors" for name in ("whole", "stopped")]
    assert_same(*({**load_state(end), "settings": None} for end in ends))
