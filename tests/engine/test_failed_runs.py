"""A run of a comparison that fails: the others go on, are kept, and are shown."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import yaml

from fastcil import FastcilError
from fastcil.cli import main
from fastcil.engine.compare import RunsFailedError, compare
from fastcil.engine.report import load_comparison

FIXED = {
    "data": "scenes:classes=4,size=32,train_per_class=6,test_per_class=3",
    "scenario": "lfs-2",
    "memory": "24KiB",
}
NETWORK = {"name": "resnet20", "width": 4}
ENGINE = {"epoch_scale": 0.005, "progress": False}
SHORT = {"network": NETWORK, "engine": ENGINE}
WILD = {
    "er": {},
    "wild": {"method": "er", "er.first.lr": 1e25, "er.later.lr": 1e25},
    "finetune": {},
}


def test_a_run_that_fails_leaves_the_others(tmp_path: Path) -> None:
    with (
        pytest.raises(RunsFailedError) as caught,
        pytest.warns(UserWarning, match=r"^'wild' failed: stage 'replay' .* go on\.$"),
    ):
        compare(WILD, **FIXED, run_dir=tmp_path, **SHORT)
    said = str(caught.value)
    assert said.startswith("1 of 3 runs failed ('wild': stage 'replay' diverged in epoch 0 (")
    assert said.endswith("or clip its gradients); the others are done.")
    assert list(caught.value.comparison.results) == ["er", "finetune"]
    assert list(load_comparison(tmp_path).results) == ["er", "finetune"]
    # The same without a folder, and of a single run its own error.
    with pytest.warns(UserWarning), pytest.raises(RunsFailedError) as caught:
        compare(WILD, **FIXED, **SHORT)
    assert list(caught.value.comparison.results) == ["er", "finetune"]
    alone = {"wild": WILD["wild"]}
    with pytest.warns(UserWarning), pytest.raises(FastcilError, match=r"^stage 'replay' diverged"):
        compare(alone, **FIXED, **SHORT)


def test_the_command_line_shows_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "wild.yaml"
    options = {"methods": WILD, **FIXED, "run_dir": str(tmp_path / "run")}
    config.write_text(yaml.safe_dump({**options, **SHORT}), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["compare", "--config", str(config)]) == 2
    shown = capsys.readouterr()
    assert "1 of 3 runs failed ('wild'" in shown.err and "finetune" in shown.out
    assert (tmp_path / "run" / "report.html").is_file()
