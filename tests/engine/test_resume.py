"""A run killed with SIGKILL at any moment goes on to the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import fastcil.engine.report
from fastcil.cli import main
from fastcil.engine.state import load_state, save_state

OPTIONS = [
    "--data=scenes:classes=6,size=32,train_per_class=8,test_per_class=2",
    "--network.name=resnet20",
    "--network.width=4",
    "--engine.epoch_scale=0.01",
    "--engine.batch_size=16",
    "--engine.checkpoint_seconds=0",
    "--engine.progress=false",
    "--engine.threads=1",
]
# Each run is a process of its own, forked from one that has done nothing but import torch.
FORKS = multiprocessing.get_context("forkserver")
IMPORTS = ["fastcil.cli", "fastcil.engine.arguments", "fastcil.engine.run", "torch._dynamo"]


def command(run_dir: Path, method: str = "foster+cim") -> list[str]:
    # Memory must have room for the autoencoder of samc.
    memory = "120KiB" if method.endswith("samc") else "24KiB"
    scenario = "few-2-2x4" if method == "lecnet" else "lfs-3"
    given = [f"--method={method}", f"--scenario={scenario}", f"--memory={memory}"]
    return ["train", *given, *OPTIONS, f"--run_dir={run_dir}"]


def kill_after(run_dir: Path, events: int, seconds: float) -> bool:
    """Kills a run some time after its log has grown by some lines; whether it was still going."""
    log = run_dir / "seed-0" / "events.jsonl"
    before = count_lines(log)
    process = FORKS.Process(target=main, args=(command(run_dir),))
    process.start()
    while process.is_alive() and count_lines(log) < before + events:
        time.sleep(0.003)
    process.join(seconds)
    killed = process.is_alive()
    process.kill()
    process.join()
    return killed


def kill_in_second_task(run_dir: Path, method: str, seconds: float) -> bool:
    """Kills a run some time after its second task began to train; whether it was still going."""
    log = run_dir / "seed-0" / "events.jsonl"
    process = FORKS.Process(target=main, args=(command(run_dir, method),))
    process.start()
    while process.is_alive() and not trains_second_task(log):
        time.sleep(0.003)
    process.join(seconds)
    killed = process.is_alive()
    process.kill()
    process.join()
    return killed


def trains_second_task(log: Path) -> bool:
    _, *later = (log.read_text() if log.is_file() else "").split('"event": "task"')[1:] or [""]
    return bool(later) and '"event": "stage"' in later[0]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def outcome(run_dir: Path) -> list[dict]:
    content = json.loads((run_dir / "seed-0" / "result.json").read_text())
    tasks = content["outcomes"][0]["tasks"]
    for task in tasks:
        del task["seconds"]
    return tasks


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_report(patch)
        assert main(command(folder)) == 0
    return folder


def without_report(patch: pytest.MonkeyPatch) -> None:
    """Half of the time, and nothing that a kill could spoil: it is made of the results."""
    patch.setattr(fastcil.engine.report, "write_report", lambda run_dir: run_dir)


def test_killed_three_times_ends_in_the_same_bits(
    uninterrupted: Path, tmp_path: Path, assert_same
) -> None:
    FORKS.set_forkserver_preload(IMPORTS)
    luck = random.Random(os.getpid())
    # Up to four of the lines are written before the first step.
    waits = [(luck.randint(4, 8), luck.uniform(0, 0.2)) for _ in range(3)]
    folder = tmp_path / "run"
    kills = sum(kill_after(folder, *wait) for wait in waits)
    assert kills == 3, f"the run ended before it was killed; waits {waits}"
    # The last sitting is a program started from nothing.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    last = [sys.executable, "-m", "fastcil", *command(folder)]
    done = subprocess.run(last, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert_same(outcome(uninterrupted), outcome(folder), f"waits {waits}")
    whole, again = (
        load_state(run_dir / "seed-0" / "learner.safetensors")
        for run_dir in (uninterrupted, folder)
    )
    assert_same(whole, again, f"waits {waits}")
    left = {file.name for file in (folder / "seed-0").iterdir()}
    assert left == {"events.jsonl", "learner.safetensors", "result.json"}


# What stops in a process of all methods is in `test_interrupt`.
@pytest.mark.parametrize(
    "method",
    ["darkpp", "gem+samc", *(pytest.param(m, marks=pytest.mark.slow) for m in ("dlcft", "lecnet"))],
)
def test_killed_in_the_second_task(
    method: str, tmp_path: Path, assert_same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of the first, and what the later tasks make of it; a few-shot session too."""
    without_report(monkeypatch)
    FORKS.set_forkserver_preload(IMPORTS)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert main(command(whole, method)) == 0
    wait = random.Random(os.getpid()).uniform(0, 0.1)
    assert kill_in_second_task(folder, method, wait), f"it ended before; waited {wait}"
    saved = load_state(folder / "seed-0" / "checkpoint.safetensors")
    assert len(saved["tasks"]) == 1, f"killed elsewhere; waited {wait}"
    # As if another version had begun: whoever reads the result learns of both.
    (sitting,) = saved["sittings"]
    sitting["torch"], now = "1.0", sitting["torch"]
    save_state(folder / "seed-0" / "checkpoint.safetensors", saved)
    assert main(command(folder, method)) == 0
    assert_same(outcome(whole), outcome(folder), f"waited {wait}")
    environment = json.loads((folder / "result.json").read_text())["environment"]
    assert environment["torch"] == f"1.0, then {now}"
    one, two = (load_state(f / "seed-0" / "learner.safetensors") for f in (whole, folder))
    assert_same(one, two, f"waited {wait}")


def test_a_finished_run_is_read_and_not_repeated(uninterrupted: Path) -> None:
    log = uninterrupted / "seed-0" / "events.jsonl"
    before = log.read_bytes()
    assert main(command(uninterrupted)) == 0
    assert log.read_bytes() == before


def test_another_config_is_refused_with_the_difference(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(uninterrupted), "--cim.threshold=0.7"]) == 2
    out, err = capsys.readouterr()
    assert "cim.threshold was 0.6, now 0.7" in err
    assert out == "" and err.count("\n") == 1


def test_the_run_directory_is_complete(uninterrupted: Path) -> None:
    config = yaml.safe_load((uninterrupted / "config.yaml").read_text())
    assert config["method"] == "foster+cim" and config["cim"]["threshold"] == 0.6
    environment = yaml.safe_load((uninterrupted / "environment.yaml").read_text())
    assert environment["torch"] and environment["processor"]
    events = [
        json.loads(line)
        for line in (uninterrupted / "seed-0" / "events.jsonl").read_text().splitlines()
    ]
    names = [event["event"] for event in events]
    assert names.count("evaluated") == 3 and names[-1] == "finished"
    assert {p.name for p in uninterrupted.iterdir()} >= {
        "config.yaml",
        "environment.yaml",
        "result.json",
        "seed-0",
        "report.html",
    }
