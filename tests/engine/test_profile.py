"""A profile says where the time of every stage goes, and leaves traces that can be looked at."""

from __future__ import annotations

import json

import pytest
from backbones import ConvNet

from fastcil.cli import main
from fastcil.engine.profile import TRACED, WARM, profile
from fastcil.errors import FastcilError
from fastcil.nn.phases import OTHER

DATA = "scenes:classes=4,size=32,train_per_class=8,test_per_class=4"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    made = profile(
        "foster+cim", DATA, "lfs-2", "8 images", run_dir=folder, steps=2, backbone=ConvNet
    )
    return made, folder


def test_all_stages_of_both_tasks(found):
    made, _ = found
    assert [[stage.name for stage in task.stages] for task in made.tasks] == [
        ["first"],
        ["boosting", "compression"],
    ]
    assert [lane.name for lane in made.tasks[1].stages[0].lanes] == ["boosting", "mask"]
    assert made.tasks[1].stages[0].epochs == 170
    assert made.tasks[1].images == 16 and made.tasks[1].tests == 16


def test_steps_are_shared_out_among_phases(found):
    made, _ = found
    boosting, mask = made.tasks[1].stages[0].lanes
    assert {"data", "forward", "backward", "optimiser"} <= set(boosting.seconds)
    assert boosting.seconds["forward"] > boosting.seconds["optimiser"]
    assert set(mask.seconds) <= {"addon", OTHER} and mask.seconds["addon"] > 0
    assert set(made.tasks[0].once) == {"addon", "memory update", "evaluation", OTHER}
    assert made.tasks[1].stages[0].epoch()["addon"] >= mask.seconds["addon"] * mask.steps


def test_lanes_know_how_long_the_real_run_is(found):
    made, _ = found
    boosting, mask = made.tasks[1].stages[0].lanes
    assert boosting.steps == 1 and boosting.images > 16  # 16 new ones, and exemplars
    assert mask.steps == 1  # one for every two classes


def test_operators_are_ranked(found):
    made, _ = found
    ops = made.tasks[1].stages[0].lanes[0].ops
    assert [op.seconds for op in ops] == sorted((op.seconds for op in ops), reverse=True)
    assert any("conv" in op.name for op in ops[:3]) and 0 < sum(op.share for op in ops) <= 1
    assert not any(op.name.startswith("fastcil: ") for op in ops)


def test_traces_are_chrome_s(found):
    made, folder = found
    names = [lane.trace for task in made.tasks for stage in task.stages for lane in stage.lanes]
    assert len(set(names)) == 5 and {path.name for path in folder.glob("*.json")} == {
        *names,
        "profile.json",
    }
    events = json.loads((folder / names[0]).read_text())["traceEvents"]
    steps = [event for event in events if event.get("name") == "fastcil: backward"]
    assert len(steps) == TRACED


def test_what_is_written_is_what_is_shown(found):
    made, folder = found
    assert (folder / "profile.txt").read_text() == str(made)
    saved = json.loads((folder / "profile.json").read_text())
    assert saved["steps"] == 2 and saved["config"]["method"] == "foster+cim"
    assert "boosting" in str(made) and "memory update" in str(made) and WARM


def test_what_a_method_does_at_the_end_is_told():
    """EWC's Fisher information, which is no step of a stage."""
    options = {"ewc.first.batch_size": 4, "network.width": 4, "network.name": "resnet20"}
    made = profile("ewc", DATA, "lfs-2", steps=1, tasks=1, **options, **{"engine.knn": 3})
    once = made.tasks[0].once
    assert once[OTHER] > once["memory update"]
    assert "what begins and ends stages and tasks" in " ".join(str(made).split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1."),
        ({"tasks": 0}, "tasks is 0; it must be at least 1."),
        ({"network.depth": 3}, "option 'network.depth' is unknown"),
        ({"engine.data": "disk"}, "engine.data is 'disk', but the images are in memory"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(FastcilError) as error:
        profile("er", DATA, "lfs-2", "8 images", **options)
    assert str(error.value).startswith(message)


def test_command_line(tmp_path, capsys):
    command = f"profile gem --data {DATA} --scenario lfs-2 --tasks 1 --steps 1".split()
    command += ["--network.name", "mlp", "--network.width", "4", "--memory", "8 images"]
    assert main([*command, "--run-dir", str(tmp_path / "gem")]) == 0
    shown = capsys.readouterr().out
    assert "gem, task 1: 16 new images" in shown and "task 2" not in shown
    assert (tmp_path / "gem" / "profile.json").is_file()


def test_a_method_by_an_unknown_name(capsys):
    assert main(["profile", "fostre"]) == 2
    assert "did you mean 'foster'?" in capsys.readouterr().err
