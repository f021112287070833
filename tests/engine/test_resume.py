"""A run killed with SIGKILL at any moment goes on to the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fastcil.engine.state import load_state

OPTIONS = [
    "--data=scenes:classes=6,size=32,train_per_class=12,test_per_class=4",
    "--scenario=lfs-3",
    "--memory=24KiB",
    "--network.name=resnet20",
    "--network.width=4",
    "--engine.epoch_scale=0.02",
    "--engine.batch_size=16",
    "--engine.checkpoint_seconds=0",
    "--engine.progress=false",
    "--engine.threads=1",
]


def command(method: str, run_dir: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "fastcil", "train", f"--method={method}"),
        *OPTIONS,
        f"--run_dir={run_dir}",
    ]


def run(method: str, run_dir: Path) -> None:
    subprocess.run(command(method, run_dir), check=True, capture_output=True, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def kill_after(method: str, run_dir: Path, events: int) -> bool:
    """Starts a run and kills it once its log has grown by some lines; whether it was killed."""
    log = run_dir / "seed-0" / "events.jsonl"
    before = count_lines(log)
    process = subprocess.Popen(
        command(method, run_dir),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    while process.poll() is None:
        if count_lines(log) >= before + events:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.003)
    return False


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def outcome(run_dir: Path) -> list[dict]:
    content = json.loads((run_dir / "seed-0" / "result.json").read_text())
    tasks = content["outcomes"][0]["tasks"]
    for task in tasks:
        del task["seconds"]
    return tasks


def assert_same(a: object, b: object, place: str = "") -> None:
    """Equal structure, equal numbers, equal bits in tensors."""
    import torch

    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple)) and len(a) == len(b), place
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}[{k}]")
    elif isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b), place
    else:
        assert a == b, place


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run("foster+cim", folder)
    return folder


def test_killed_three_times_ends_in_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    luck = random.Random(os.getpid())
    waits = [luck.randint(3, 9) for _ in range(3)]
    folder = tmp_path / "run"
    kills = sum(kill_after("foster+cim", folder, wait) for wait in waits)
    assert kills == 3, f"the run ended before it was killed; waits {waits}"
    run("foster+cim", folder)
    assert_same(outcome(uninterrupted), outcome(folder))
    whole = load_state(uninterrupted / "seed-0" / "learner.safetensors")
    again = load_state(folder / "seed-0" / "learner.safetensors")
    assert_same(whole, again)
    assert (
        not list(folder.rglob("*.draft*"))
        and not (folder / "seed-0" / "checkpoint.safetensors").exists()
    )


def test_a_finished_run_is_read_and_not_repeated(uninterrupted: Path) -> None:
    log = uninterrupted / "seed-0" / "events.jsonl"
    before = log.read_bytes()
    run("foster+cim", uninterrupted)
    assert log.read_bytes() == before


def test_another_config_is_refused_with_the_difference(uninterrupted: Path) -> None:
    other = [*command("foster+cim", uninterrupted), "--cim.threshold=0.7"]
    done = subprocess.run(other, capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert "cim.threshold was 0.6, now 0.7" in done.stderr
    assert "Traceback" not in done.stderr


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
