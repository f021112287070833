"""Presets: published configurations by name, or a YAML file, below what is said outright."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastcil.contract import lookup
from fastcil.contract.registry import METHODS
from fastcil.engine.arguments import parse_run
from fastcil.engine.catalogue import describe
from fastcil.engine.compare import compare
from fastcil.engine.options import make_settings
from fastcil.engine.presets import merge_options, presets
from fastcil.engine.run import train
from fastcil.errors import FastcilError
from fastcil.methods.foster import Foster
from fastcil.methods.icarl import ICaRL

TINY = "scenes:classes=4,size=32,train_per_class=2,test_per_class=1"
NAMED = [(method, name) for method in METHODS for name in presets(lookup("method", method))]


@pytest.mark.parametrize("method, name", NAMED)
def test_a_named_preset_is_the_methods_config(method: str, name: str) -> None:
    wanted = presets(lookup("method", method))[name]
    assert wanted != lookup("method", method).Config()  # type: ignore[attr-defined]
    from_python = make_settings(method, merge_options(name, {}, [method]))
    assert from_python.groups[method] == wanted
    assert name in describe(method)


@pytest.mark.parametrize("method, name", list(dict(reversed(NAMED)).items()))
def test_a_preset_named_by_a_flag_is_the_methods_config(method: str, name: str) -> None:
    """Each method's first."""
    parsed = parse_run("train", ["--method", method, "--preset", name])
    assert "preset" not in parsed
    config = make_settings(method, {method: parsed[method]}).groups[method]
    assert config == presets(lookup("method", method))[name]


def test_a_named_preset_concerns_the_parts_that_have_it() -> None:
    merged = merge_options("imagenet", {}, ["icarl+cam", "finetune", "foster"])
    assert set(merged) == {"icarl", "foster"}
    parsed = parse_run("compare", ["--methods=icarl,foster+cim", "--preset=cifar-b50"])
    defaults = make_settings("icarl").as_dict()
    assert parsed["icarl"] == {
        **defaults["icarl"],
        "first": {**defaults["icarl"]["first"], "milestones": (49, 63)},
        "later": {**defaults["icarl"]["later"], "milestones": (49, 63)},
    }
    assert parsed["foster"]["beta1"] == Foster.PRESETS["cifar-b50"].beta1


def test_flags_and_a_config_file_win_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: icarl\npreset: pycil\nicarl.first.lr: 0.3\n")
    parsed = parse_run("train", [f"--config={file}", "--icarl.first.epochs=7"])
    first = parsed["icarl"]["first"]
    published = ICaRL.PRESETS["pycil"].first
    assert (first["lr"], first["epochs"]) == (0.3, 7)
    assert first["weight_decay"] == published.weight_decay
    assert parsed["icarl"]["loss"] == "softmax"
    assert parse_run("train", [f"--config={file}", "--preset=imagenet"])["icarl"]["later"][
        "milestones"
    ] == (20, 30, 40, 50)


def test_what_is_passed_wins_over_a_preset_file(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        "er:\n  first: {lr: 1e-3, epochs: 9}\n  later.lr: 0.2\n"
        "engine.threads: 2\naugment:\nnetwork: {width: 8}\n"
    )
    merged = merge_options(preset, {"er": {"first": {"epochs": 4}}, "network.width": 16}, ["er"])
    config = make_settings("er", merged).groups
    assert (config["er"].first.lr, config["er"].first.epochs) == (1e-3, 4)
    assert config["er"].first.schedule == "step", "what neither names keeps its default"
    assert (config["er"].later.lr, config["engine"].threads) == (0.2, 2)
    assert config["network"].width == 16
    assert merge_options(None, {"er.first.lr": 1}, ["er"]) == {"er": {"first": {"lr": 1}}}
    flags = ["--method=er", f"--preset={preset}", "--er.first.epochs=4", "--network.width=16"]
    parsed = parse_run("train", flags)
    assert make_settings("er", {name: parsed[name] for name in config}).groups == config


@pytest.mark.parametrize(
    "text, says",
    [
        ("just words", "holds no options"),
        ("a: [1", "is not YAML"),
        ("", "holds no options"),
        ("1: 2", "option '1' is unknown"),
        ("method: er", "'method' is no option but an argument"),
    ],
)
def test_bad_preset_files_are_a_sentence(tmp_path: Path, text: str, says: str) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(text)
    with pytest.raises(FastcilError, match=says) as caught:
        train("er", TINY, "lfs-2", preset=preset)
    assert "\n" not in str(caught.value)
    with pytest.raises(FastcilError, match=says):
        parse_run("train", ["--method=er", f"--preset={preset}"])
    with pytest.raises(FastcilError, match="can't be read"):
        merge_options(tmp_path / "none.yaml", {}, ["er"])


def test_an_unknown_preset_is_answered_with_the_nearest(monkeypatch) -> None:
    with pytest.raises(FastcilError, match=r"'cifar-b', .* did you mean 'cifar-b0'\? Known"):
        train("foster+cim", TINY, "lfs-2", preset="cifar-b")
    monkeypatch.delattr("fastcil.methods.finetune.Finetune.PRESETS")
    with pytest.raises(FastcilError, match=r"preset is 'fast', .*; finetune has none\."):
        compare(["finetune"], TINY, "lfs-2", preset="fast")
