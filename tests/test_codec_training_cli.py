"""``fastcil codec train`` and ``finetune``: flags, presets, complaints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastcil.cli import main
from fastcil.compression import FINETUNING, PRETRAINING, load_with_facts
from fastcil.engine.codec_training_arguments import parse_codec_finetune, parse_codec_train

DATA = "scenes:classes=2,size=64,train_per_class=2,test_per_class=1"
BRIEF = ["--recipe.epochs=1", "--epoch-steps=1", "--recipe.batch_size", "2", "--size=64"]
QUIET = ["--device=cpu", "--progress=false", "--threads=1"]


def test_train_then_finetune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    train = ["codec", "train", DATA, "--model=hierarchical-tiny", "--out", first, *BRIEF, *QUIET]
    assert main(train) == 0
    told = capsys.readouterr().out
    assert f"codec: {first}" in told and "lambda: 32 to 1024" in told
    tune = ["codec", "finetune", first, DATA, "--strategy", "kr", "--replay", DATA, "--alpha=0.5"]
    assert main([*tune, "--lambda-range", "32", "4096", "--out", second, *BRIEF, *QUIET]) == 0
    assert "lambda: 32 to 4096" in capsys.readouterr().out
    facts = load_with_facts(second)[1]
    assert facts.lambda_range == (32, 4096) and len(facts.history) == 2


def test_presets_lie_below_flags() -> None:
    given = parse_codec_train([DATA, "--out=x"])
    assert given["training"] == PRETRAINING["paper"] and given["model"] == "hierarchical-small"
    given = parse_codec_train([DATA, "--out=x", "--preset", "small", "--recipe.lr=0.25"])
    small = PRETRAINING["small"]
    assert given["training"].recipe.lr == 0.25
    assert given["training"].recipe.hold == small.recipe.hold
    assert given["training"].ema == small.ema and given["training"].size == small.size
    given = parse_codec_finetune(["m", DATA, "--preset=small", "--out=x", "--replay=old"])
    assert given["training"] == FINETUNING["small"]
    assert (given["model"], given["data"], given["replay"]) == ("m", DATA, "old")


@pytest.mark.parametrize(
    "flags",
    [
        ["--lambda-range", "4", "1024"],
        ["--lambda_range", "4", "1024"],
        ["--lambda-range=[4, 1024]"],
        ["--lambda-range", "[4, 1024]"],
    ],
)
def test_a_range_is_two_numbers(flags: list[str]) -> None:
    given = parse_codec_finetune(["m", DATA, "--out=x", *flags, "--seed=3"])
    assert given["training"].lambda_range == (4.0, 1024.0) and given["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["codec", "trian"], "command 'codec trian' is unknown; did you mean 'train'?"),
        (["codec", "train", DATA, "--out=x", "--preset=huge"], "preset is 'huge'"),
        (["codec", "train", DATA, "--out=x", "--size=100"], "size is 100"),
        (["codec", "train", DATA], "out"),
        (["codec", "train", DATA, "--out=x", "--sise=64"], "option '--sise=64' is unknown"),
        (["codec", "train", DATA, "--out=x", "--lambda-range=fast"], "lambda_range"),
        (["codec", "finetune", "none", DATA, "--out=x"], "replay is None"),
        (["codec", "finetune", "none", DATA, "--out=x", "--replay=y"], "which is no file"),
    ],
)
def test_bad_commands_say_one_sentence(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and out == ""
    assert not list(tmp_path.iterdir())


def test_the_group_lists_its_commands(capsys: Any) -> None:
    assert main(["codec", "--help"]) == 0
    assert main(["codec"]) == 2
    told = capsys.readouterr().out
    assert told.count("  train ") == 2 and told.count("  finetune ") == 2
