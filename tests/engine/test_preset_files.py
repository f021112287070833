"""Presets of whole runs: they parse, compose, and are the papers' cells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

import fastcil
from fastcil.cli import main
from fastcil.contract import lookup
from fastcil.contract.registry import ADDONS, METHODS
from fastcil.data import Augmentation
from fastcil.engine import preset_files
from fastcil.engine.arguments import parse_run
from fastcil.engine.compare import compare
from fastcil.engine.groups import GROUPS
from fastcil.engine.options import check_keys, config_types, make_settings
from fastcil.engine.parts import Parts
from fastcil.engine.preset_files import (
    ARGUMENTS,
    RunPreset,
    is_run_preset,
    preset_names,
    read_preset,
)
from fastcil.engine.resolve import make_augmentation
from fastcil.engine.run import train
from fastcil.engine.scenario import split_classes
from fastcil.errors import FastcilError
from fastcil.memory import Budget
from fastcil.methods.lecnet import LECNet

FILES = sorted((Path(fastcil.__file__).parent / "presets").glob("*/*.yaml"))
CLASSES = {
    "food101": 101,
    "imagenet100:list=lucir": 100,
    "imagenet": 1000,
    "cifar100": 100,
    "cifar10": 10,
    "mini-imagenet": 100,
    "mnist": 10,
}
SAMC = [name for name in preset_names() if name.startswith("samc/")]
DLCFT = [name for name in preset_names() if name.startswith("dlcft/")]
FEW_SHOT = [n for n in preset_names() if read_preset(n).arguments["scenario"].startswith("few-")]
MNIST = "lecnet/mnist-5"
SIDES = {"cim": 224, "samc/mini": 84, "lecnet/cub200": 224, "fscil/mini": 84, "fscil/cub200": 224}
SIDES |= {"lecnet/mnist": 28, "dlcft/mit67": 224}
SHARED = {"title", "images", "configs", "runs", "pretrained", *ARGUMENTS}
# Of the runs of one file the first that a method is in: they differ in tasks and memory.
CELLS = [
    (name, method)
    for (_, method), name in {
        (name.partition("-")[0], figure.method): name
        for name in reversed(preset_names())
        for figure in read_preset(name).published
    }.items()
]
TINY = "scenes:classes=4,size=32,train_per_class=6,test_per_class=4"
SHORT = {"network.name": "resnet20", "network.width": 4, "engine.epoch_scale": 0.005}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_files_hold_nothing_unknown(file: Path) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    for own in content["runs"].values():
        assert set(own) <= {"published", "configs", *ARGUMENTS, *GROUPS, *METHODS, *ADDONS}
    assert set(content) <= {*SHARED, *GROUPS, *METHODS, *ADDONS}
    named = [own.get("configs", {}) for own in (content, *content["runs"].values())]
    assert {part for configs in named for part in configs} <= {*METHODS, *ADDONS}


@pytest.mark.parametrize("name", sorted({*preset_names()} - {*SAMC, *FEW_SHOT, *DLCFT, MNIST}))
def test_a_preset_is_a_run(name: str) -> None:
    preset = read_preset(name)
    data, scenario, memory = preset.arguments.values()
    sizes = split_classes(scenario, CLASSES[data])
    protocol, tasks = re.fullmatch(r"(lfs|lfh)-(\d+)", scenario).groups()  # type: ignore[union-attr]
    assert len(sizes) == int(tasks) + (protocol == "lfh") and sum(sizes) == CLASSES[data]
    budget = Budget.parse(memory)
    # Luo et al. (2023), Sec. 5.1: fixed from scratch, growing from half.
    assert budget.unit == "images" and budget.growing == (protocol == "lfh")
    totals = {"food101": [2020], "imagenet": [20000, 5000]}.get(data, [2000])
    assert budget.amount in ([20] if budget.growing else totals)
    check_parts(preset)


def check_parts(preset: RunPreset) -> None:
    """Every method and addon takes what it sets."""
    names = [*METHODS, *(f"icarl+{addon}" for addon in ADDONS)]
    check_keys(preset.options_for(names), config_types(names))
    assert preset.images["train"] > preset.images["test"] and preset.title


@pytest.mark.parametrize("name", SAMC)
def test_the_samc_papers_protocol(name: str) -> None:
    """Bai et al. (2023), App. A, B and E; `run` is raw images a task."""
    preset = read_preset(name)
    data, scenario, memory = preset.arguments.values()
    sizes = split_classes(scenario, CLASSES[data])
    assert scenario.endswith("-online") and sizes == ([2] * 5 if data == "cifar10" else [5] * 20)
    budget = Budget.parse(memory)
    raw = re.search(r"-(\d+)(-[a-z]|$)", name)
    assert budget.growing and budget.amount * sizes[0] == int(raw[1])  # type: ignore[index]
    check_parts(preset)
    # Runs of a data set differ in memory and in what samc does.
    others = ("finetune", "ewc", "lwf", "icarl", "gem", "er", "mer", "ebm", "eec")
    for method in (*(others if name.endswith("-10") else ()), "gem+samc"):
        settings = make_settings(method, preset.options_for([method]))
        config, key = settings.groups[method.partition("+")[0]], name.split("-")[0].split("/")[1]
        assert config == lookup("method", method.partition("+")[0]).PRESETS[f"samc-{key}"]
        for recipe in (config.first, config.later):
            assert (recipe.epochs, recipe.batch_size, recipe.optimizer) == (1, 10, "sgd")
            assert (recipe.momentum, recipe.weight_decay, recipe.schedule) == (0, 0, "constant")
            large = method in ("finetune", "ewc", "icarl") and data != "cifar10"
            if method not in ("lwf", "ebm", "eec"):  # Not told.
                assert recipe.lr == (1.0 if large else 0.1)
        assert settings.engine.order_seed is None and settings.engine.forward_transfer
        augment, network = settings.groups["augment"], settings.groups["network"]
        assert (network.name, network.width, network.stem) == ("resnet18", 20, "cifar")
        made = make_augmentation(augment, augment.size, augment.crop, True)
        plain = Augmentation(
            size=84 if data == "mini-imagenet" else 32,
            crop="none",
            flip=False,
            brightness=0.0,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        )
        assert made == plain
    mu = re.search(r"mu-([\d.]+)$", name)
    told = float(mu[1]) if mu else 0.6 if data == "cifar10" else 0.7
    assert settings.groups["samc"].threshold == told
    completion = name.rpartition("-")[2]
    known = ("zero", "rule", "autoencoder")
    assert settings.groups["samc"].completion == (completion if completion in known else "both")


@pytest.mark.parametrize("name", [name for name in FEW_SHOT if name.startswith("lecnet/")])
def test_the_ablations_of_lecnet(name: str) -> None:
    """Yang et al. (2021), Tables 1 to 3; runs differ in what lecnet does."""
    preset = read_preset(name)
    assert list(preset.arguments.values()) == ["cub200", "few-100-10x5", "none"]
    check_parts(preset)
    (figure,) = preset.published
    settings = make_settings("lecnet", preset.options_for(["lecnet"]))
    published = LECNet.PRESETS["fscil-cub"]
    own = {k: v for k, v in vars(settings.groups["lecnet"]).items() if v != getattr(published, k)}
    told = name.removeprefix("lecnet/cub200-")
    last, changed = {
        "baseline": (24.31, {"expansion": "none"}),
        "ne": (28.41, {"expansion": "ne"}),
        "nc": (29.48, {"expansion": "nc"}),
        "sa": (31.96, {}),
        "conv1x1": (29.76, {"layer": "conv1x1"}),
        "conv3x3": (31.05, {"layer": "conv3x3"}),
        "gamma-0.8": (30.2, {}),
    }.get(told) or (figure.last, {"gamma": float(told.removeprefix("gamma-"))})
    assert (figure.last, own) == (last, changed)


def test_general_incremental_learning_without_memory() -> None:
    """Yang et al. (2021), Table 6 and App. A.4, with the Configs of Buzzega et al. (2020)."""
    preset = read_preset(MNIST)
    data, scenario, memory = preset.arguments.values()
    assert split_classes(scenario, CLASSES[data]) == [2] * 5 and memory == "none"
    check_parts(preset)
    figures = {figure.method: figure.last for figure in preset.published}
    assert figures == {"si": 19.27, "lwf": 19.62, "dark": 19.61, "dark+lec": 19.90}
    for method in figures:
        settings = make_settings(method, preset.options_for([method]))
        name, network = method.partition("+")[0], settings.groups["network"]
        assert settings.groups[name] == lookup("method", name).PRESETS["mnist"]
        recipe = settings.groups[name].later
        assert (recipe.epochs, recipe.batch_size) == (1, 10)
        assert (network.name, network.width, settings.engine.order_seed) == ("mlp", 100, None)


@pytest.mark.parametrize(
    ("data", "sessions", "published"),
    [("cifar100", 9, "Table 5"), ("mini-imagenet", 9, "Table 7"), ("cub200", 11, "Table 4")],
)
def test_the_few_shot_tables(data: str, sessions: int, published: str) -> None:
    """Yang et al. (2021), Tables 4, 5 and 7: every row, and one base session for all."""
    preset = read_preset(f"fscil/{data}-400")
    assert preset.arguments["data"] == data and preset.arguments["memory"] == "400 images"
    check_parts(preset)
    methods = [figure.method for figure in preset.published]
    assert methods == ["finetune", "joint", "icarl", "eeil", "ncm", "topic", "lecnet"]
    recipes = []
    for figure in preset.published:
        assert len(figure.sessions) == sessions and figure.source.endswith(published)
        assert figure.last == figure.sessions[-1] < figure.average < figure.sessions[0]  # type: ignore[operator]
        settings = make_settings(figure.method, preset.options_for([figure.method]))
        assert settings.engine.exemplars_of == "first" and settings.engine.order_seed is None
        config = settings.groups[figure.method]
        assert config.normalised
        recipes.append(config.recipe if figure.method == "joint" else config.first)
    assert all(recipe == recipes[0] for recipe in recipes)
    # As many anchors as the other methods have exemplars, 400 or what 400 leave each base class.
    base = int(preset.arguments["scenario"].split("-")[1])
    quota = Budget.parse(preset.arguments["memory"]).quota(base)
    gas = make_settings("topic", preset.options_for(["topic"])).groups["topic"]
    assert gas.nodes == quota * base
    topic = {"cifar100": 42.62, "mini-imagenet": 39.64, "cub200": 43.92}[data]
    assert next(f.average for f in preset.published if f.method == "topic") == topic


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_every_method_of_the_tables_composes(name: str, method: str) -> None:
    preset = read_preset(name)
    settings = make_settings(method, preset.options_for([method]))
    augment = settings.groups["augment"]
    budget = Budget.parse(preset.arguments["memory"])
    parts = Parts.build(settings, budget, torch.device("cpu"), augment.size, augment.crop, None)
    side = next((side for start, side in SIDES.items() if name.startswith(start)), 32)
    assert parts.augmentation.size == side
    told = parts.method.auto_augment and not name.startswith("samc/")
    assert (parts.augmentation.policy != "none") == told


@pytest.mark.parametrize("name", [name for name in preset_names() if name.endswith("10")])
def test_the_command_line_has_the_same_options(name: str) -> None:
    preset = read_preset(name)
    parsed = parse_run("train", ["--preset", name, "--method", "foster"])
    assert {key: parsed[key] for key in ARGUMENTS} == preset.arguments and parsed["preset"] == name
    settings = make_settings("foster", preset.options_for(["foster"]))
    mine = {key: value for key, value in parsed.items() if key in settings.groups}
    assert settings == make_settings("foster", mine)


@pytest.mark.parametrize(
    ("configs", "says"),
    [
        ({"icral": "pycil"}, "to 'icral', which is neither a method nor an addon; did you mean"),
        ({"icarl": ["pycil"]}, r"gives icarl the Config \['pycil'\]; it must be the name of one"),
        ({"icarl": "pycill"}, "gives icarl its Config 'pycill'; did you mean 'pycil'"),
        ({"er": "pycil"}, "gives er its Config 'pycil'; Known: finetuning, online"),
    ],
)
@pytest.mark.parametrize("place", ["file", "run"])
def test_configs_that_a_file_gets_wrong_are_a_sentence(
    configs: dict[str, object], says: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: dict[str, object] = {"scenario": "lfs-5"}
    content: dict[str, object] = {
        **{"title": "Mine", "data": "cifar100", "memory": "20 images", "runs": {"5": run}},
        "images": {"train": 2, "test": 1, "height": 8, "width": 8},
    }
    (content if place == "file" else run)["configs"] = configs
    monkeypatch.setattr(preset_files, "_files", lambda: (("my/own", content),))
    with pytest.raises(FastcilError, match=says) as caught:
        read_preset("my/own-5").options_for(configs)
    assert "\n" not in str(caught.value)


def test_what_is_said_outright_wins(tmp_path: Path) -> None:
    flags = ["--preset=cim/food101-lfs10", "--method=foster+cim", "--memory=64MiB"]
    parsed = parse_run("train", [*flags, "--foster.beta1=0.5", "--network.width=8"])
    assert (parsed["memory"], parsed["scenario"]) == ("64MiB", "lfs-10")
    assert parsed["foster"]["beta1"] == 0.5 and parsed["network"]["width"] == 8
    assert parsed["foster"]["boosting"]["batch_size"] == 256
    file = tmp_path / "run.yaml"
    file.write_text("methods: [foster, der]\npreset: cim/imagenet100-lfs20\nscenario: lfs-4\n")
    parsed = parse_run("compare", [f"--config={file}"])
    assert (parsed["scenario"], parsed["data"]) == ("lfs-4", "imagenet100:list=lucir")
    assert parsed["der"]["representation"]["epochs"] == 220
    assert parse_run("compare", [f"--config={file}", "--data=x"])["data"] == "x"


def test_a_run_keeps_the_name_of_its_preset(tmp_path: Path) -> None:
    run = {"data": TINY, "scenario": "lfs-2", **SHORT, "engine.progress": False}
    result = train("icarl", preset="cifar100/b0-5", run_dir=tmp_path / "a", **run)
    assert result.config["preset"] == "cifar100/b0-5" and result.config["memory"] == "2000 images"
    assert result.config["icarl"]["loss"] == "softmax"
    again = ["train", f"--config={tmp_path / 'a' / 'config.yaml'}", f"--run_dir={tmp_path / 'a'}"]
    assert main(again) == 0
    # The name is no part of what is computed: the same by other means goes on there.
    plain = train(
        "icarl",
        preset="pycil",
        run_dir=tmp_path / "a",
        memory="2000 images",
        **run,
        **{"network.stem": "cifar", "augment.size": 32, "augment.crop": "padded"},
    )
    assert plain.accuracy_matrix[1, 0] == result.accuracy_matrix[1, 0]
    compared = compare("er,icarl", preset="cifar100/b0-5", **run)
    assert compared.results["er"].config["preset"] == "cifar100/b0-5"
    assert compared.results["icarl"].config["icarl"]["loss"] == "softmax"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cim/food101-lfs11", r"did you mean 'cim/food101-lfs10'\?$"),
        ("none/at-all", r"'fastcil presets' lists them\.$"),
    ],
)
def test_an_unknown_one_is_answered_with_the_nearest(name: str, says: str) -> None:
    with pytest.raises(FastcilError, match=says) as caught:
        train("er", TINY, "lfs-2", preset=name)
    assert "\n" not in str(caught.value)
    assert main(["train", "--method=er", f"--preset={name}"]) == 2


def test_which_names_are_runs() -> None:
    assert all(is_run_preset(name) for name in preset_names())
    assert not any(map(is_run_preset, (None, "pycil", "my/own.yaml", Path("a/b"))))


def test_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    out = capsys.readouterr().out
    for name in preset_names():
        preset = read_preset(name).arguments
        assert re.search(rf"^{name} +{' +'.join(preset.values())}$", out, re.M)
    assert main(["presets", "cim/imagenet1000-lfs5-5k"]) == 0
    out = capsys.readouterr().out
    assert "memory: 5000 images" in out and "57.19 / 49.42" in out
    assert "pre-trained" not in out
    assert main(["presets", "dlcft/cifar100-task10"]) == 0
    out = capsys.readouterr().out
    assert "network.weights: to be passed, pre-trained on ImageNet32" in out
    assert "dlcft: finetuning-task" in out
    assert "- / 92.16, BWT 0.04" in out
    assert main(["presets", "cim/imagenet1000"]) == 2 and main(["presets", "a", "b"]) == 2
