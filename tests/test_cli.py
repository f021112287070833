"""The command line, command by command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import fastcil
from fastcil.cli import main
from fastcil.contract.registry import ADDONS, CODECS, METHODS
from fastcil.engine.trainer import Trainer

ROOT = Path(__file__).parents[1]
DATA = "scenes:classes=4,size=32,train_per_class=8,test_per_class=6"
TINY = [
    f"--data={DATA}",
    "--scenario=lfs-2",
    "--memory=24KiB",
    "--network.name=resnet20",
    "--network.width=4",
    "--engine.epoch_scale=0.005",
    "--engine.batch_size=16",
]
QUIET = "--engine.progress=false"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["train", "--method=icarl+cam", *TINY, QUIET, "--seeds=5,2"]
    assert main([*arguments, f"--run-dir={folder}"]) == 0
    return folder


def test_train_writes_a_run_and_its_report(trained: Path) -> None:
    assert {p.name for p in trained.iterdir()} == {
        *("config.yaml", "environment.yaml", "identity.yaml", "report.html", "result.json"),
        *("seed-2", "seed-5"),
    }
    assert (trained / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_train_again_says_the_same_and_trains_nothing(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "run", None)
    result = fastcil.Result.load(trained)
    assert main(["train", f"--config={trained / 'config.yaml'}", f"--run_dir={trained}"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{result}\nreport: {trained / 'report.html'}\n" and err == ""


def test_evaluate_reproduces_the_last_accuracy(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = fastcil.Result.load(trained)
    for place, number in (
        (trained, 1),  # the lowest seed's
        (trained / "seed-5", 0),
        (trained / "seed-2" / "learner.safetensors", 1),
    ):
        assert main(["evaluate", str(place), "--data", DATA, "--device=cpu"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in lines] == ["nme", "linear"]
        for line in lines:
            name, top1, top5 = re.fullmatch(r"(\w+): top-1 (.*) %, top-5 (.*) %", line).groups()
            assert float(top1) == pytest.approx(result.per_seed("last", name)[number], abs=0.005)
            assert float(top5) == pytest.approx(
                result.per_seed("last_top5", name)[number], abs=0.005
            )


def test_evaluate_matches_classes_by_name(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = DATA.replace("classes=4", "classes=6")
    assert main(["evaluate", str(trained), f"--data={more}"]) == 0
    assert "nme: top-1" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path), f"--data={DATA}"]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_compare_prints_a_table_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "compared"
    flags = [*TINY, QUIET, f"--run_dir={folder}", "--der.aux_weight=0.5"]
    assert main(["compare", "--methods", "finetune,der", *flags]) == 0
    out = capsys.readouterr().out
    assert "difference to finetune" in out and re.search(r"│ der +│", out)
    assert out.endswith(f"report: {folder / 'report.html'}\n")
    content = json.loads((folder / "compare.json").read_text())
    assert content["configs"]["der"]["der"]["aux_weight"] == 0.5
    config = yaml.safe_load((folder / "der" / "config.yaml").read_text())
    assert config == content["configs"]["der"]
    # A comparison holds several Learners; which one is meant must be said.
    assert main(["evaluate", str(folder), f"--data={DATA}"]) == 2
    assert main(["evaluate", str(folder / "der"), f"--data={DATA}"]) == 0


def test_report_is_written_anew(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trained / "report.html"
    before = file.read_bytes()
    file.unlink()
    assert main(["report", str(trained)]) == 0
    assert capsys.readouterr().out == f"report: {file}\n" and file.read_bytes() == before


def test_methods_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in (*METHODS, *ADDONS, *CODECS):
        assert re.search(rf"^  {name} +\S", out, re.M), name


@pytest.mark.parametrize(
    "name, lines",
    [
        ("foster", ["  --foster.boosting.lr 0.1", "  --foster.beta2 0.97"]),
        ("cim", ["  --cim.threshold 0.6", "  --cim.mask.optimizer adam"]),
        ("foster+cim", ["  --foster.beta2 0.97", "  --cim.threshold 0.6"]),
        ("ft-cnn", ["  --finetune.first.epochs 200"]),
        ("bbox", ["The crop under a box at full resolution, and the rest at 1/eta of its pixels."]),
    ],
)
def test_methods_describes_one(name, lines, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", name]) == 0
    assert set(lines) <= set(capsys.readouterr().out.splitlines())


def test_doctor_finds_torch(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "-- ")) for line in lines)
    assert any(line.split()[1:3] == ["torch", torch.__version__] for line in lines)


COMMANDS = ["train", "compare", "pretrain", "evaluate", "report", "methods", "presets", "doctor"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code: Any = None
    try:
        code = main([command, "--help"])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code in (0, None) and err == ""
    assert out.startswith(f"usage: fastcil {command}")
    if command in ("train", "compare"):
        for flag in ("--data", "--run_dir", "--engine.epoch_scale", "--cim.threshold"):
            assert flag in out


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_help_names_every_command(arguments, code, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {command} ", out, re.M) for command in COMMANDS)


def python_m(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastcil", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        **options,
    )


def test_python_m_fastcil() -> None:
    done = python_m("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{fastcil.__version__}\n", "")
    done = python_m("trian")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("fastcil: command 'trian' is unknown; did you mean 'train'?")


def test_an_interruption_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", "--method=er", *TINY, QUIET, f"--run_dir={tmp_path}"]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", stop)
        assert main(arguments) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "goes on from the last checkpoint" in err
    assert main(arguments) == 0
    assert (tmp_path / "result.json").is_file()


def test_progress_is_told_on_stderr_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--method=finetune", *TINY, f"--run_dir={tmp_path}"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Result(finetune: average") and out.count("\n") == 2
    assert "finetune task 2/2 finetune: 1 epochs" in err
    assert re.search(r"finetune task 2/2: linear [\d.]+ % on 4 classes; 0 exemplars, 0 bytes", err)


@pytest.mark.filterwarnings("default:::fastcil")
def test_what_is_left_out_is_told_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.zeros((9, 32, 32, 3), np.uint8)
    labels = np.array([0, 1] * 4 + [-1])
    np.savez(tmp_path / "bad.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    data = [*TINY, f"--data={tmp_path / 'bad.npz'}", "--scenario=lfs-1", "--load.skip_bad=true"]
    assert main(["train", "--method=finetune", *data, QUIET, f"--run-dir={tmp_path / 'run'}"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("fastcil: warning: 2 left out, the first: ") and err.count("\n") == 1
    listed = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert len(listed) == 2 and listed[0] in err
