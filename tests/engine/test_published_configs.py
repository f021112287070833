"""The Configs by which published runs are made: each cell runs what its cited figure ran."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastcil.contract import lookup
from fastcil.contract.registry import METHODS
from fastcil.data import ImageStore, load
from fastcil.engine.options import make_settings
from fastcil.engine.parts import Parts
from fastcil.engine.preset_files import (
    preset_names,
    read_preset,
)
from fastcil.memory import Budget, make_codec
from fastcil.methods.lucir import LUCIR

MNIST = "lecnet/mnist-5"
_LUOS = {
    **{"icarl": "pycil", "wa": "pycil", "podnet": "imagenet", "aanets": "pod", "der": "imagenet"},
    **{"foster": "imagenet", "lucir": "imagenet", "mnemonics": None},
}
_PYCILS = {"icarl": "pycil", "wa": "pycil", "podnet": "pycil", "der": "pycil"}
_FINE = ("finetune", "lwf", "ewc", "mas", "osla", "er", "dark", "darkpp", "joint")
_SHONS = {**dict.fromkeys(_FINE, "finetuning"), "dlcft": None}
# File or, over it, run -> part with named Configs -> the one it takes, None for the defaults.
PUBLISHED_CONFIGS: dict[str, dict[str, str | None]] = {
    "cifar100/b0": {**_PYCILS, "foster": "cifar-b0"},
    **{f"cifar100/b0-{tasks}-resnet18": {"der": None} for tasks in (5, 10, 20)},
    # PyCIL's plot has five tasks; PODNet's own paper is cited for ten.
    "cifar100/b50": {**_PYCILS, "foster": "cifar-b50"},
    "cifar100/b50-10": {"podnet": None},
    **{f"cifar100/b50-{tasks}-resnet18": {"der": None} for tasks in (5, 10)},
    "cim/food101": {**_LUOS, "foster": "food101"},
    "cim/imagenet100": _LUOS,
    "cim/imagenet1000": {**_LUOS, "lucir": "imagenet-1000"},
    "dlcft/": _SHONS,
    "dlcft/cifar100-task10": dict.fromkeys(("lwf", "ewc", "osla", "dlcft"), "finetuning-task"),
    "dlcft/cifar100-task10-replay": _SHONS,
    **{
        f"dlcft/{run}-{form}": {"dlcft": form}
        for run in ("cifar100-data10", "cifar100-data100", "cifar100-class10", "mit67-data4")
        for form in ("kfac", "diagonal", "softmax", "softmax-kfac")
    },
    "fscil/cifar100": dict.fromkeys(METHODS, "fscil-cifar100"),
    "fscil/cub200": dict.fromkeys(METHODS, "fscil-cub"),
    "fscil/mini-imagenet": dict.fromkeys(METHODS, "fscil-mini"),
    "lecnet/cub200": {"lecnet": "fscil-cub"},
    MNIST: {"dark": "mnist", "si": "mnist", "lwf": "mnist"},
    "samc/cifar10": {**dict.fromkeys((*METHODS, "samc"), "samc-cifar10"), "a-gem": "online"},
    "samc/cifar100": {**dict.fromkeys((*METHODS, "samc"), "samc-cifar100"), "a-gem": "online"},
    "samc/mini-imagenet": {**dict.fromkeys((*METHODS, "samc"), "samc-mini"), "a-gem": "online"},
}


def configs_of(name: str) -> dict[str, str | None]:
    """Of the file, and over it of the run."""
    found: dict[str, str | None] = {}
    for start in sorted(filter(name.startswith, PUBLISHED_CONFIGS), key=len):
        found |= PUBLISHED_CONFIGS[start]
    return found


@pytest.mark.parametrize("name", preset_names())
def test_methods_take_their_published_configs(name: str) -> None:
    """Every part of every cell that has named Configs, but for what the file says beside them."""
    preset = read_preset(name)
    told = [figure.method for figure in preset.published]
    for text in dict.fromkeys([*told, *(part for part in preset.configs if part in METHODS)]):
        method, *addons = text.split("+")
        settings = make_settings(text, preset.options_for([text]))
        for kind, part in (("method", method), *(("addon", addon) for addon in addons)):
            named = getattr(lookup(kind, part), "PRESETS", {})
            if not named:
                assert part not in preset.configs
                continue
            wanted = configs_of(name)[part]
            published = lookup(kind, part).Config() if wanted is None else named[wanted]  # type: ignore[attr-defined]
            said = preset.options.get(part, {})
            assert settings.groups[part] == replace(published, **said), part
            assert preset.configs.get(part) == wanted


def test_parameters_that_depend_on_the_number_of_tasks() -> None:
    def config(name: str, method: str) -> object:
        return make_settings(method, read_preset(name).options_for([method])).groups[method]

    five = config("cifar100/b0-5", "foster")
    assert [five.beta1_at(k) for k in range(1, 5)] == [0.97, 0.96, 0.95, 0.94]  # type: ignore[attr-defined]
    twenty = config("cifar100/b0-20", "foster")
    assert {twenty.beta1_at(k) for k in range(1, 20)} == {0.96}  # type: ignore[attr-defined]
    lucir = config("cim/imagenet1000-lfh5", "lucir")
    assert lucir.finetune and lucir.transfer  # type: ignore[attr-defined]
    assert not LUCIR.PRESETS["imagenet-1000"].transfer
    # One that a preset does not speak of keeps its defaults.
    assert config("cim/food101-lfs10", "er") == make_settings("er").groups["er"]


@pytest.mark.parametrize(
    ("method", "rectified"), [("icarl", True), ("der", True), ("wa", True), ("podnet", False)]
)
def test_networks_of_pycils_figures_end_as_pycils(method: str, rectified: bool) -> None:
    """With a ReLU, but for PODNet's; no residual branch starts at zero."""
    preset = read_preset("cifar100/b0-10")
    settings = make_settings(method, preset.options_for([method]))
    parts = Parts.build(settings, Budget(10, "images"), torch.device("cpu"), 32, "padded", None)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = parts.context.make_backbone().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
    with torch.no_grad():
        assert bool((network(images) < 0).any()) != rectified


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("cim/")])
def test_foster_counts_as_in_the_code_of_cim(name: str) -> None:
    """By the budget in raw images, whatever there are of compressed ones."""
    preset = read_preset(name)
    foster = make_settings("foster+cim", preset.options_for(["foster+cim"])).groups["foster"]
    budget = Budget.parse(preset.arguments["memory"])
    counted = (0, budget.amount) if budget.growing else (budget.amount, 0)
    assert (foster.nominal_memory, foster.nominal_per_class) == counted


@pytest.mark.parametrize("name", ["cim/imagenet100-lfh10", "cim/imagenet1000-lfh5"])
def test_files_of_mrdc_are_as_many_as_published(name: str, photos: ImageStore) -> None:
    """Wang et al. (2022): at quality 50, 37 of a class in the room of 20 images."""
    preset = read_preset(name)
    mrdc = make_settings("lucir+mrdc", preset.options_for(["lucir+mrdc"])).groups["mrdc"]
    codec = make_codec("jpeg", quality=mrdc.quality, bits_per_pixel=mrdc.bits_per_pixel)
    assert mrdc.quality == 50
    room = Budget.parse(preset.arguments["memory"]).quota(classes=100)
    units = codec.units(codec.encode(photos, None))
    assert room / float(units.mean()) == pytest.approx(37, rel=0.1)


@pytest.fixture(scope="module")
def photos() -> ImageStore:
    """Three images of each of fifty classes of Caltech-101."""
    name = "caltech101-50c.tar"
    if not Path(os.environ.get("FASTCIL_DATA", "."), name).is_file():
        pytest.skip(f"FASTCIL_DATA has no {name}")
    return load(f"{name}:train_per_class=3,test_per_class=1").train.images
