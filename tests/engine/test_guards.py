"""What goes wrong around a run: other processes, odd data, other versions, a full disk."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastcil
from fastcil import FastcilError, ops, train
from fastcil.cli import main
from fastcil.data import Dataset, Examples, ImageStore
from fastcil.engine import doctor, environment
from fastcil.engine.compare import compare
from fastcil.engine.seed_run import SeedRun
from fastcil.engine.state import locked, write_atomically
from fastcil.engine.trainer import Trainer

DATA = "scenes:classes=4,size=32,train_per_class=6,test_per_class=3"
SHORT = {
    "network.name": "resnet20",
    "network.width": 4,
    "engine.epoch_scale": 0.005,
    "engine.progress": False,
}
FIXED = {"data": DATA, "scenario": "lfs-2", "memory": "24KiB"}


def part(labels: list[int]) -> Examples:
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 16, 16, 3), np.uint8)
    return Examples(ImageStore.from_batch(pixels), torch.tensor(labels, dtype=torch.int64))


@pytest.mark.parametrize(
    "training, test, says",
    [
        ([0, 1, 2] * 3, [], "has no test image of class 'a'"),
        ([0, 1, 2] * 3, [0, 2], "has no test image of class 'b'"),
        ([0, 1] * 3, [0, 1, 2], "has no training image of class 'c'"),
    ],
)
def test_a_class_that_cannot_be_learned_or_tested(training, test, says) -> None:
    data = Dataset("odd", part(training), part(test), ("a", "b", "c"))
    with pytest.raises(FastcilError, match=says):
        train("er", data, "lfs-3", "none", **SHORT)


def test_another_config_is_refused_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("er", **FIXED, run_dir=tmp_path / "er", **SHORT)
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("trained"))
    with pytest.raises(FastcilError, match=r"another config \(er\.later\.lr was"):
        compare("finetune,er", **FIXED, run_dir=tmp_path, **SHORT, **{"er.later.lr": 0.03})


def test_an_option_that_runs_did_not_have_counts_as_what_they_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("er", "ncm"):
        train(method, **FIXED, run_dir=tmp_path / method, **SHORT)
        identity = tmp_path / method / "identity.yaml"
        lines = identity.read_text(encoding="utf-8").splitlines(keepends=True)
        old = [line for line in lines if "nesterov" not in line]
        assert len(old) < len(lines)
        identity.write_text("".join(old), encoding="utf-8")
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("trained"))
    train("er", **FIXED, run_dir=tmp_path / "er", **SHORT)
    with pytest.raises(FastcilError, match=r"later\.nesterov was False, now True"):
        train("ncm", **FIXED, run_dir=tmp_path / "ncm", **SHORT)


def test_a_report_takes_the_seeds_that_all_methods_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare("er,finetune", **FIXED, seeds=[0], run_dir=tmp_path, **SHORT)
    train("er", **FIXED, seeds=[1, 0], run_dir=tmp_path / "er", **SHORT)
    assert main(["report", str(tmp_path)]) == 0
    train("er", **FIXED, seeds=[1], run_dir=tmp_path / "er", **SHORT)
    assert main(["report", str(tmp_path)]) == 2
    assert "no seed in common" in capsys.readouterr().err


def test_a_resumed_run_scans_as_this_sitting_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SHORT, "engine.checkpoint_seconds": 0}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SeedRun, "_measure", stop)
        with pytest.raises(KeyboardInterrupt):
            train("er", **FIXED, run_dir=tmp_path, **options)
    seen = set()
    measure = SeedRun._measure

    def look(run: SeedRun, *arguments):
        assert run.learner is not None
        seen.add((run.learner.settings.engine.scan_batch, run.learner.parts.context.batch_size))
        return measure(run, *arguments)

    monkeypatch.setattr(SeedRun, "_measure", look)
    train("er", **FIXED, run_dir=tmp_path, **options, **{"engine.scan_batch": 7})
    assert seen == {(7, 7)}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train("er", **FIXED, run_dir=tmp_path, **SHORT)
    code = (
        "import sys, pathlib; from fastcil.engine.state import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "seed-0")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(fastcil.__file__).parents[1],
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(FastcilError, match="is in use by another process"):
        train("er", **FIXED, run_dir=tmp_path, **SHORT)
    holder.kill()
    holder.wait()
    assert train("er", **FIXED, run_dir=tmp_path, **SHORT).outcomes


def test_what_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("er", **FIXED, run_dir=tmp_path / "run", **SHORT)
    (tmp_path / "run" / "report.html").unlink(missing_ok=True)
    (tmp_path / "run" / "report.html").mkdir()
    assert main(["report", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(FastcilError, match=r"/file/x' can't be written: "):
        write_atomically(tmp_path / "file" / "x", b"")
    with pytest.raises(FastcilError, match="can't be written"), locked(tmp_path / "file"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "run"]


def test_doctor_names_kernels_that_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fastcil._C", None)
    monkeypatch.delattr(fastcil, "_C", raising=False)
    name, finding, good = doctor._extension()
    assert name == "C++ kernels" and "can't be loaded" in finding and not good


@pytest.mark.parametrize(
    ("found", "good"), [("3.4.1", False), ("3.5.0", True), ("3.7.1+git1", True), ("4.0", True)]
)
def test_doctor_names_a_triton_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch, found: str, good: bool
) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    name, finding, fits = doctor._triton()
    assert name == "triton" and finding.startswith(found) and fits is good
    assert ("too old" in finding) is not good


def test_the_environment_names_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment.environment("cpu")["device"] == "cpu"


@pytest.mark.parametrize("offset", [2**63 - 6, -1, 7])
def test_an_offset_outside_the_pixels_is_never_followed(offset: int) -> None:
    pixels = torch.arange(12, dtype=torch.uint8)
    geometry = torch.tensor([[2, 2, 0, 0, 2, 2, 0, 0]], dtype=torch.int16)
    offsets = torch.tensor([offset])
    for call in (
        lambda: ops.read([pixels], torch.zeros(1, dtype=torch.int64), offsets, geometry, (2, 2)),
        lambda: ops.reconstruct(pixels, offsets, geometry),
        lambda: ImageStore.from_state(
            {"pixels": pixels, "offsets": offsets, "geometry": geometry}
        ).image(0),
    ):
        with pytest.raises(ValueError, match=r"offsets\[0\]"):
            call()
