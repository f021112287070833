"""What a published run tells before it starts, and that nothing hangs on it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcil.engine.needs import announce, measure
from fastcil.engine.plan import Plan, make_plan
from fastcil.engine.rehearsal import STEPS, rehearse
from fastcil.engine.run import train

DATA = "scenes:classes=6,size=32,train_per_class=20,test_per_class=4"
FEW = "scenes:classes=6,size=32,train_per_class=8,test_per_class=1"
SHORT: dict[str, Any] = {
    "network.name": "resnet20",
    "network.width": 4,
    "engine.epoch_scale": 0.02,
    "engine.batch_size": 8,
}
PRESET = "cifar100/b0-5"


def plan(method: str, data: str = DATA, **options: Any) -> Plan:
    memory = "12 images"
    return make_plan(
        method, data, "lfs-3", memory, None, (0,), "cpu", None, {**SHORT, **options}, PRESET
    )


def test_a_run_is_the_same_whether_it_tells_or_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, silent = (
        train(
            "foster+cim",
            FEW,
            "lfs-2",
            "12 images",
            preset=PRESET,
            run_dir=tmp_path / str(progress),
            **{**SHORT, "engine.epoch_scale": 0.01, "engine.progress": progress},
        )
        for progress in (True, False)
    )
    err = capsys.readouterr().err
    assert err.count("cifar100/b0-5: ") == 1 and err.count("steps of each stage timed") == 1
    for readout in told.readouts:
        assert (told.curve(readout) == silent.curve(readout)).all()
    one, other = (
        (tmp_path / name / "seed-0" / "learner.safetensors").read_bytes()
        for name in ("True", "False")
    )
    # "true" is shorter than "false", and what is before the tensors is filled up to 8 bytes.
    assert abs(len(one) - len(other)) in (0, 8)
    weights = [
        torch.cat([p.flatten() for p in result.learner.method.network.parameters()])
        for result in (told, silent)
    ]
    assert torch.equal(*weights)


def test_generators_are_left_as_they_were() -> None:
    planned = plan("icarl")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rehearse(planned)
    assert torch.equal(torch.get_rng_state(), before)


def test_lines_say_images_memory_and_length(capsys: pytest.CaptureFixture[str]) -> None:
    train("finetune", DATA, "lfs-3", "12 images", preset=PRESET, **SHORT)
    lines = [line for line in capsys.readouterr().err.splitlines() if "task" not in line[:20]]
    nbytes = (120 + 24) * (32 * 32 * 3 + 24)
    assert lines[0] == f"scenes: images in host memory: {nbytes / 1e3:.1f} kB"
    assert lines[1] == (
        f"cifar100/b0-5: 120 training and 24 test images of 6 classes, {nbytes / 1e3:.1f} kB; "
        f"memory 12 images, at the end about 12 raw images, {12 * 3096 / 1e3:.1f} kB"
    )
    wanted = r"finetune: (\d+) epochs in 3 tasks, about (\d+) steps and 1 min a seed on cpu with \d"
    epochs, steps = map(int, re.match(wanted, lines[2]).groups())  # type: ignore[union-attr]
    assert steps == 5 * epochs, "40 images a task in batches of 8"


def test_a_growing_memory_is_told_as_it_will_be(capsys: pytest.CaptureFixture[str]) -> None:
    train("er", DATA, "lfh-1", "3 images/class", preset=PRESET, **SHORT)
    assert "memory 3 images/class, at the end about 18 raw images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method",
    [
        "foster+cim",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("der", "joint", "icarl", "er")),
    ],
)
def test_steps_and_epochs_are_those_of_the_run(method: str, monkeypatch, tmp_path: Path) -> None:
    done = {"epoch": 0, "step": 0}

    class Count:
        def __call__(self, event: str, fields: dict[str, Any]) -> None:
            done[event] = done.get(event, 0) + 1

    monkeypatch.setattr("fastcil.engine.seed_run.make_progress", lambda enabled: Count())
    # Raw exemplars fill memory to the last image: what is estimated is then exact.
    planned = plan(method, FEW)
    needs = measure(planned)
    train(method, FEW, "lfs-3", "12 images", **{**SHORT, "engine.progress": False})
    assert needs.epochs == done["epoch"]
    slack = 0.25 if method in ("foster+cim", "der") else 0.0  # more exemplars; balanced subsets
    assert math.isclose(needs.steps, done["step"], rel_tol=slack, abs_tol=0 if slack == 0 else 3)
    assert needs.seconds > 0 and needs.rate > 0 and needs.device_nbytes == 0


def test_a_rehearsal_is_a_few_steps_of_each_stage(monkeypatch) -> None:
    from fastcil.engine.trainer import Trainer

    steps: list[str] = []
    run_step = Trainer._run_step

    def counted(self: Trainer, lane: Any, epoch: int, step: int) -> int:
        steps.append(lane.stage.name)
        return run_step(self, lane, epoch, step)

    monkeypatch.setattr(Trainer, "_run_step", counted)
    first, second = rehearse(plan("foster", **{"engine.epoch_scale": 1.0}))
    assert [stage.epochs for stage in first.stages] == [200]
    assert [stage.epochs for stage in second.stages] == [170, 130]
    assert len(steps) == 3 * STEPS
    assert (first.extractors, second.extractors) == (1, 1), "the teacher is released"
    assert [stage.new for stage in second.stages] == [1.0, 1.0]


def test_what_cannot_be_measured_stops_nothing(
    monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("fastcil.engine.needs.rehearse", fail)
    train("finetune", DATA, "lfs-3", "none", preset=PRESET, **SHORT)
    assert "how long it will take could not be measured: out of luck" in capsys.readouterr().err


def test_only_presets_of_runs_tell_and_only_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"run_dir": tmp_path, "preset": PRESET, **SHORT}
    train("finetune", DATA, "lfs-3", "none", preset="finetuning", **SHORT)
    assert "training and" not in capsys.readouterr().err
    train("finetune", DATA, "lfs-3", "none", **run)
    assert "training and" in capsys.readouterr().err
    train("finetune", DATA, "lfs-3", "none", **run)
    assert capsys.readouterr().err == ""


def test_what_is_about_to_be_read_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    announce("cim/food101-lfs10", "food101", {})
    assert capsys.readouterr().err == (
        "cim/food101-lfs10: reading 101,000 images, about 71.4 GB in memory, for a while twice "
        "that\n"
    )
    announce("cim/food101-lfs10", "elsewhere", {})
    announce("cim/food101-lfs10", "food101", {"engine": {"progress": False}})
    announce("pycil", "food101", {})
    announce(None, "scenes", {})
    assert capsys.readouterr().err == ""


def test_weights_that_a_published_run_starts_from_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    announce("dlcft/cifar100-data10", "cifar100", {"network": {"name": "resnet18"}})
    asked, reading = capsys.readouterr().err.splitlines()
    assert asked == (
        "dlcft/cifar100-data10: published with a network pre-trained on ImageNet32, and this one "
        "starts at random; pass such weights, --network.weights FILE"
    )
    assert reading.startswith("dlcft/cifar100-data10: reading 60,000 images, about 184.3 MB")
    announce("lecnet/cub200-sa", "elsewhere", {})
    assert "pre-trained on ImageNet," in capsys.readouterr().err
    announce("dlcft/mit67-data4", "elsewhere", {"network": {"weights": "some.safetensors"}})
    announce("dlcft/mit67-data4", "mit67", {"engine": {"progress": False}})
    assert capsys.readouterr().err == ""
