"""Options: one set of dataclasses for Python, YAML and the command line."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from torch import nn

import fastcil
from fastcil.contract import Recipe
from fastcil.contract.registry import METHODS
from fastcil.engine.arguments import parse_run
from fastcil.engine.options import Settings, make_settings, nest
from fastcil.engine.plan import make_plan
from fastcil.engine.run import train
from fastcil.errors import CompositionError, FastcilError
from fastcil.methods.foster import Foster

TINY = "scenes:classes=4,size=32,train_per_class=2,test_per_class=1"
# How a method's options may be written; each is the same.
SPELLINGS = [
    {"foster.boosting.lr": 0.03, "foster.boosting.milestones": (1, 2), "cim.threshold": 0.7},
    {"foster": {"boosting": {"lr": 0.03, "milestones": [1, 2]}}, "cim": {"threshold": 0.7}},
    {
        "foster.boosting": {"lr": 0.03},
        "foster": {"boosting.milestones": [1, 2]},
        "cim.threshold": 0.7,
    },
    {
        "foster": {"boosting": {"milestones": [1, 2]}},
        "foster.boosting.lr": 0.03,
        "cim.threshold": 0.7,
    },
    {"foster.boosting.lr": "3e-2", "foster.boosting.milestones": [1, 2], "cim.threshold": "0.7"},
]


@pytest.mark.parametrize("options", SPELLINGS)
def test_dotted_and_nested_options_are_the_same(options) -> None:
    settings = make_settings("foster+cim", options)
    default = make_settings("foster+cim")
    boosting = dataclasses.replace(Foster.Config().boosting, lr=0.03, milestones=(1, 2))
    assert settings.groups["foster"] == dataclasses.replace(Foster.Config(), boosting=boosting)
    assert settings.groups["cim"] == dataclasses.replace(default.groups["cim"], threshold=0.7)
    same = set(settings.groups) - {"foster", "cim"}
    assert all(settings.groups[name] == default.groups[name] for name in same)


def test_a_published_preset_is_passed_as_it_is() -> None:
    preset = Foster.PRESETS["cifar-b0"]
    settings = make_settings("foster", {"foster": preset, "foster.beta2": 0.5})
    assert settings.groups["foster"] == dataclasses.replace(preset, beta2=0.5)
    recipe = Recipe(epochs=3, lr=0.2)
    assert make_settings("er", {"er.first": recipe}).groups["er"].first == recipe


@pytest.mark.parametrize(
    "options, nested",
    [
        ({}, {}),
        ({"a.b.c": 1, "a.d": 2}, {"a": {"b": {"c": 1}, "d": 2}}),
        ({"a.b": {"c": 1}, "a": {"b": {"d": 2}}}, {"a": {"b": {"c": 1, "d": 2}}}),
        ({"a": {"b": 1}, "a.b": 2}, {"a": {"b": 2}}),
        ({"a.b": None}, {"a": {"b": None}}),
    ],
)
def test_nest(options, nested) -> None:
    before = repr(options)
    assert nest(options) == nested
    assert repr(options) == before


@pytest.mark.parametrize("options", [{"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}])
def test_a_group_and_a_value_of_one_name_are_refused(options) -> None:
    with pytest.raises(FastcilError, match="option 'a"):
        nest(options)


@pytest.mark.parametrize(
    "method, option, value, says",
    [
        ("foster+cim", "cim.treshold", 0.5, "did you mean 'cim.threshold'?"),
        ("foster+cim", "foster.bosting.lr", 0.5, "did you mean 'foster.boosting.lr'?"),
        ("foster", "lr", 0.1, "did you mean 'foster.first.lr'?"),
        ("er", "epochs", 5, "did you mean 'er.first.epochs'?"),
        ("er", "cim.threshold", 0.5, "option 'cim.threshold' is unknown"),
        ("er", "memroy", "2 images", "did you mean 'memory'?"),
        ("er", "memory", "2 images", "'memory' is no option but an argument of its own"),
        ("er", "er.first.epochs", 2.5, "option 'er.first.epochs' is '2.5'; it must be int."),
        ("er", "er.first.lr", "fast", "option 'er.first.lr' is 'fast'; it must be float."),
        ("er", "er.first.milestones", ["x"], "option 'er.first.milestones' is 'x'; it must be int"),
        ("er", "engine.precision", "fp8", "must be one of 'fp32', 'bf16', 'fp16'."),
        ("er", "engine.compile", 3, "option 'engine.compile' is '3'; it must be bool."),
        ("er", "network.width", "wide", "option 'network.width' is 'wide'; it must be int or None"),
        ("er", "augment.policy", None, "option 'augment.policy' is None; it must be one of 'auto'"),
        ("er", "er.first.lr", None, "option 'er.first.lr' is None; it must be float."),
        ("er", "engine", 5, "option 'engine' is 5, but it is a group"),
        ("er", "er.first", 5, "such as 'er.first.epochs'"),
        ("er", "er.first.schedule", "exp", "option 'er.first.schedule' is 'exp'"),
        ("er", "er.first.lr", 0, "lr is 0.0; it must be a positive number."),
        ("er", "er.first.weight_decay", -1, "weight_decay is -1.0; it must be at least 0."),
        ("er", "er.first.batch_size", 0, "batch_size is 0; it must be at least 1."),
        ("er", "engine.epoch_scale", 0, "engine.epoch_scale is 0.0"),
        ("er", "engine.init_seed", -1, "engine.init_seed is -1; it must be at least 0."),
        ("er", "engine.order_seed", 2**32, "engine.order_seed is 4294967296"),
        ("er", "engine.scan_batch", 0, "engine.scan_batch is 0; it must be at least 1."),
        ("foster+cim", "cim.threshold", 1.5, "threshold is 1.5"),
    ],
)
def test_bad_options_are_a_sentence(method, option, value, says) -> None:
    with pytest.raises(FastcilError) as caught:
        make_settings(method, {option: value})
    text = str(caught.value)
    assert says in text and "\n" not in text and "class '" not in text


def test_compositions_are_spelled_in_one_way() -> None:
    assert make_settings(" foster + cim ").method == "foster+cim"
    assert make_settings("ft-cnn").method == "finetune"


def test_a_codec_beside_an_addon_that_brings_its_own_is_refused() -> None:
    assert make_settings("er", codec="raw").codec == "raw"
    with pytest.raises(CompositionError, match="codec is 'raw'"):
        make_settings("er+cam", codec="raw")


ODD = [
    "--foster.boosting.lr=1e-4",
    "--foster.first.milestones=[3,5]",
    "--foster.nominal_memory=7",
    "--cim.mask.optimizer=sgd",
    "--cim.compress_all=true",
    "--engine.order_seed=null",
    "--engine.epoch_scale=0.013",
    "--engine.batch_size=33",
    "--augment.brightness=0.1",
    "--augment.crop=resized",
    "--network.width=24",
    "--load.skip_bad=true",
]


def plan_of(arguments: dict):
    """What `fastcil.train` makes of the command line's options."""
    named = ("method", "data", "scenario", "memory", "codec", "seeds", "device")
    options = {k: v for k, v in arguments.items() if k not in (*named, "run_dir")}
    return make_plan(*(arguments[k] for k in named), None, options)


@pytest.mark.parametrize("odd", [[], ODD])
def test_a_runs_config_read_back_is_the_same_run(tmp_path: Path, odd: list[str]) -> None:
    flags = [f"--data={TINY}", "--scenario=lfs-2", "--memory=30KiB", "--seeds=4,2", "--device=cpu"]
    first = plan_of(parse_run("train", ["--method=foster+cim", *flags, *odd]))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(first.config(), sort_keys=False))
    again = plan_of(parse_run("train", [f"--config={file}"]))
    assert again.settings == first.settings
    assert again.config() == first.config() and again.identity() == first.identity()
    assert again.seeds == (4, 2) and again.budget == first.budget
    # A flag after the file wins over it, and one before does not.
    later = plan_of(parse_run("train", [f"--config={file}", "--cim.threshold=0.9"]))
    assert later.settings.groups["cim"].threshold == 0.9
    assert later.settings.groups["foster"] == first.settings.groups["foster"]
    told = ["--cim.threshold=0.9", "--method=er", f"--config={file}"]
    earlier = plan_of(parse_run("train", told))
    assert earlier.settings == first.settings


def test_flags_may_be_written_with_dashes() -> None:
    arguments = ["--method=er", "--run-dir", "there", "--engine.epoch-scale=0.5"]
    parsed = parse_run("train", arguments)
    assert parsed["run_dir"] == "there" and parsed["engine"]["epoch_scale"] == 0.5


@dataclass(frozen=True)
class Inner:
    recipe: Recipe = Recipe(epochs=50, lr=1.0)  # noqa: RUF009
    period: int = field(default=30, metadata={"epochs": True})


@dataclass(frozen=True)
class Outer:
    long: Recipe = Recipe(epochs=200, lr=1.0, milestones=(60, 120), warmup=10)  # noqa: RUF009
    none: Recipe = Recipe(epochs=0, lr=1.0)  # noqa: RUF009
    small: Recipe = field(
        default=Recipe(epochs=100, lr=1.0, batch_size=16), metadata={"own_batch": True}
    )
    inner: Inner = Inner()
    other: int = 40


def test_epoch_scale_and_batch_size_reach_every_recipe() -> None:
    settings = make_settings("er", {"engine.epoch_scale": 0.1, "engine.batch_size": 7})
    config = Settings("er", {**settings.groups, "x": Outer()}).config("x")
    assert config.long == Recipe(epochs=20, lr=1.0, milestones=(6, 12), warmup=1, batch_size=7)
    assert config.none.epochs == 0 and config.none.batch_size == 7
    assert config.small == Recipe(epochs=10, lr=1.0, batch_size=16)
    assert config.inner == Inner(Recipe(epochs=5, lr=1.0, batch_size=7), 3)
    assert config.other == 40
    untouched = Settings("er", {**make_settings("er").groups, "x": Outer()}).config("x")
    assert untouched == Outer()


@pytest.mark.parametrize(
    "method", [*(name for name, where in METHODS.items() if isinstance(where, str)), "foster+cim"]
)
def test_epoch_scale_and_batch_size_reach_every_methods_stages(method: str) -> None:
    """No recipe is short only on paper: nothing that trains has more epochs than asked for."""
    scaled = make_settings(method, {"engine.epoch_scale": 1e-6, "engine.batch_size": 5})
    plain = make_settings(method)
    name, addons = scaled.parts
    found = 0
    for part in (name, *addons):
        for option in dataclasses.fields(scaled.config(part)):
            recipe = getattr(scaled.config(part), option.name)
            if isinstance(recipe, Recipe):
                own = option.metadata.get("own_batch")
                # Without epochs it stands for another recipe.
                asked = min(1, getattr(plain.config(part), option.name).epochs)
                assert recipe.epochs == asked and (own or recipe.batch_size == 5)
                found += 1
    assert found >= len((name, *addons))


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"seeds": ()}, "seeds is"),
        ({"seeds": (0, 0)}, "seeds is"),
        ({"seeds": (0, -1)}, "seeds is"),
        ({"seeds": "0,1"}, "seeds is"),
        ({"seeds": 1.5}, "seeds is"),
        (
            {"method": "finetune+cim"},
            "addon 'cim' compresses exemplars, and Finetune keeps nothing",
        ),
        ({"method": "joint+cam"}, "Joint keeps everything"),
        ({"method": "er+cam+cim"}, "has 'cam' and 'cim', and each stores exemplars its own way"),
        (
            {"codec": "bbox"},
            "codec is 'bbox', which must be told what matters in each image, by boxes",
        ),
        ({"engine.tensorboard": True}, "pip install 'fastcil"),
        ({"network.name": "resnet99"}, "backbone is 'resnet99'"),
        ({"augment.size": 0}, "augment.size is 0"),
        ({"augment.min_scale": 3}, "augment.min_scale is 3"),
        ({"augment.resize": 64}, "augment.resize is 64, and crop 'padded' has no use for it"),
        ({"augment.resize": 8, "augment.crop": "window"}, "augment.resize is 8; pass a side"),
        ({"augment.crop": "padded", "augment.size": 16}, "augment.crop is 'padded'"),
        ({"backbone": nn.Identity}, "backbone makes a module of type Identity, which has no out"),
        ({"backbone": nn.Identity()}, "backbone is a network; pass what builds one"),
    ],
)
def test_a_run_that_can_not_be_is_refused_before_anything_is_written(
    arguments, says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name)
    )
    options = {"method": "er", "data": TINY, "scenario": "lfs-2", **arguments}
    with pytest.raises(FastcilError) as caught:
        train(**options, run_dir=tmp_path / "run")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_one_seed_may_be_a_number() -> None:
    assert make_plan("er", TINY, "lfs-2", "none", None, 3, "cpu", None, {}).seeds == (3,)


def test_a_learner_takes_the_same_options() -> None:
    learner = fastcil.Learner("foster+cim", **{"cim.threshold": 0.7, "foster": {"beta2": 0.5}})
    assert learner.settings.groups["cim"].threshold == 0.7
    assert learner.settings.groups["foster"].beta2 == 0.5
    with pytest.raises(FastcilError, match="did you mean 'cim"):
        fastcil.Learner("foster+cim", **{"cim.treshold": 0.7})
