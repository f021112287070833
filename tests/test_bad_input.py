"""Twenty ways to be wrong: each gets one sentence, no traceback, and leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from fastcil.cli import main

SMALL = [
    *("--data", "scenes:classes=4,size=32,train_per_class=4,test_per_class=2"),
    *("--scenario", "lfs-2"),
]


def tree(root: Path) -> Path:
    """A folder data set of two classes that is in order."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for k in range(3):
                cv2.imwrite(str(folder / f"{k}.png"), np.full((40, 40, 3), 9 * k, np.uint8))
    return root


def broken_image(root: Path) -> str:
    (tree(root) / "train" / "cat" / "0.png").write_bytes(b"not an image")
    return str(root)


def empty_class(root: Path) -> str:
    (tree(root) / "train" / "cow").mkdir()
    return str(root)


def untrained_class(root: Path) -> str:
    tree(root)
    shutil.copytree(root / "test" / "dog", root / "test" / "wolf")
    return str(root)


def npz(root: Path, **changes: object) -> str:
    arrays = {
        "x_train": np.zeros((4, 8, 8, 3), np.uint8),
        "y_train": np.array([0, 1, 0, 1]),
        "x_test": np.zeros((2, 8, 8, 3), np.uint8),
        "y_test": np.array([0, 1]),
    }
    arrays.update(changes)
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / "data.npz", **{k: v for k, v in arrays.items() if v is not None})
    return str(root / "data.npz")


def yaml_file(root: Path, text: str) -> str:
    root.mkdir(parents=True, exist_ok=True)
    (root / "options.yaml").write_text(text)
    return str(root / "options.yaml")


def occupied(root: Path) -> str:
    root.mkdir(parents=True)
    (root / "thesis.tex").write_text("important")
    return str(root)


Arguments = Callable[[Path], list[str]]

# name -> (arguments, what the sentence must say)
CASES: dict[str, tuple[Arguments, str]] = {
    "unknown command": (lambda d: ["trian"], "did you mean 'train'"),
    "unknown method": (lambda d: ["train", "--method=fosterr", *SMALL], "did you mean 'foster'"),
    "unknown addon": (lambda d: ["train", "--method=foster+cmi", *SMALL], "addon 'cmi'"),
    "addon first": (lambda d: ["train", "--method=cim", *SMALL], "foster+cim"),
    "method as addon": (lambda d: ["train", "--method=der+foster", *SMALL], "only addons"),
    "addon twice": (lambda d: ["train", "--method=der+cim+cim", *SMALL], "twice"),
    "codec beside cim": (
        lambda d: ["train", "--method=foster+cim", "--codec=raw", *SMALL],
        "codec is 'raw'",
    ),
    "unknown codec": (lambda d: ["train", "--method=er", "--codec=png", *SMALL], "codec 'png'"),
    "unknown option": (
        lambda d: ["train", "--method=foster+cim", "--cim.treshold=0.5", *SMALL],
        "did you mean 'cim.threshold'",
    ),
    "word for a number": (
        lambda d: ["train", "--method=foster+cim", "--cim.threshold=high", *SMALL],
        "cim.threshold",
    ),
    "negative epochs": (
        lambda d: ["train", "--method=finetune", "--finetune.first.epochs=-3", *SMALL],
        "epochs is -3",
    ),
    "unknown precision": (
        lambda d: ["train", "--method=er", "--engine.precision=fp8", *SMALL],
        "engine.precision",
    ),
    "pickled weights": (
        lambda d: ["train", "--method=er", "--network.weights=r18.pth", *SMALL],
        "pass the state_dict in Python",
    ),
    "no such weights": (
        lambda d: ["pretrain", f"--network.weights={d}/none.safetensors", *SMALL[:2]],
        "which is no file",
    ),
    "pretrain an unknown option": (
        lambda d: ["pretrain", "--epocs=3", *SMALL[:2]],
        "did you mean 'epochs'",
    ),
    "pretrain backwards": (lambda d: ["pretrain", "--lr=-1", *SMALL[:2]], "lr is -1.0"),
    "bare memory": (lambda d: ["train", "--method=er", "--memory=64", *SMALL], "memory"),
    "unknown scenario": (lambda d: ["train", "--method=er", *SMALL, "--scenario=5"], "scenario"),
    "too many tasks": (
        lambda d: ["train", "--method=er", *SMALL, "--scenario=lfs-9"],
        "fewer tasks",
    ),
    "seeds": (lambda d: ["train", "--method=er", "--seeds=0,x", *SMALL], "seeds is '0,x'"),
    "device": (lambda d: ["train", "--method=er", "--device=cuda:77", *SMALL], "device is"),
    "no such data": (lambda d: ["train", "--method=er", f"--data={d}/none"], "FASTCIL_DATA"),
    "broken image": (lambda d: ["train", "--method=er", f"--data={broken_image(d)}"], "0.png"),
    "empty class": (lambda d: ["train", "--method=er", f"--data={empty_class(d)}"], "cow"),
    "class only in test": (
        lambda d: ["train", "--method=er", f"--data={untrained_class(d)}"],
        "wolf",
    ),
    "npz without a key": (
        lambda d: ["train", "--method=er", f"--data={npz(d, y_test=None)}"],
        "y_test",
    ),
    "npz with a pickle": (
        lambda d: [
            *("train", "--method=er"),
            f"--data={npz(d, y_train=np.array([0, 'a', None, 1], dtype=object))}",
        ],
        "y_train",
    ),
    "label out of range": (
        lambda d: ["train", "--method=er", f"--data={npz(d, y_train=np.array([0, 1, -1, 1]))}"],
        "-1",
    ),
    "labels missing": (
        lambda d: ["train", "--method=er", f"--data={npz(d, y_train=np.array([0, 1]))}"],
        "y_train",
    ),
    "YAML with an unknown option": (
        lambda d: ["train", "--config=" + yaml_file(d, "method: er\nmemroy: 3 images")],
        "memroy",
    ),
    "YAML that is none": (lambda d: ["train", f"--config={yaml_file(d, 'a: [1')}"], "not YAML"),
    "occupied run_dir": (
        lambda d: ["train", "--method=er", *SMALL, f"--run_dir={occupied(d)}"],
        "not empty",
    ),
    "report of no run": (lambda d: ["report", str(d)], "run"),
    "evaluate no learner": (lambda d: ["evaluate", str(d / "x"), *SMALL[:2]], "x"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_a_sentence_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("FASTCIL_DATA", raising=False)
    arguments, says = CASES[name]
    argv = arguments(tmp_path / "input")
    made = sorted(tmp_path.rglob("*"))
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fastcil: ") and err.count("\n") == 1 and out == "", err
    assert says in err, err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == made, "it left something behind"
