"""The published runs of continual fine-tuning: the paper's protocol and its figures."""

from __future__ import annotations

import re

import pytest

from fastcil.data import Augmentation
from fastcil.engine.options import make_settings
from fastcil.engine.preset_files import preset_names, read_preset
from fastcil.engine.resolve import make_augmentation
from fastcil.engine.scenario import split_classes

DLCFT = [name for name in preset_names() if name.startswith("dlcft/")]
# Shon et al. (2022), Tables 1, 2, 3, 5 and 6: preset, method, tables, last accuracy, transfer.
FINETUNING = [
    ("cifar100-data10", "finetune", "1", 78.74, None),
    ("cifar100-data10", "osla", "15", 79.23, None),
    ("cifar100-data10", "dlcft", "135", 82.70, None),
    ("cifar100-data10-kfac", "dlcft", "135", 81.95, None),
    ("cifar100-data10-diagonal", "dlcft", "5", 82.17, None),
    ("cifar100-data10-softmax", "dlcft", "3", 79.58, None),
    ("cifar100-data100", "mas", "1", 52.50, None),
    ("cifar100-data100", "joint", "1", 83.57, None),
    ("cifar100-data100-kfac", "dlcft", "13", 75.92, None),
    ("cifar100-data100-softmax-kfac", "dlcft", "3", 73.51, None),
    ("cifar100-task10", "lwf", "26", 92.16, 0.04),
    ("cifar100-task10", "dlcft", "26", 95.79, -0.58),
    ("cifar100-task10-replay", "darkpp", "2", 91.56, None),
    ("cifar100-class10", "dark", "2", 58.07, None),
    ("cifar100-class10", "dlcft", "23", 59.98, None),
    ("cifar100-class10-softmax", "dlcft", "3", 44.66, None),
    ("mit67-data4", "lwf", "1", 67.21, None),
    ("mit67-data4-kfac", "dlcft", "1", 70.55, None),
]


@pytest.mark.parametrize("name", DLCFT)
def test_the_dlcft_papers_protocol(name: str) -> None:
    """Shon et al. (2022), Sec. 4.1, for every method of a run."""
    preset = read_preset(name)
    data, scenario, memory = preset.arguments.values()
    protocol, tasks, changed = re.fullmatch(  # type: ignore[union-attr]
        r"dlcft/[a-z\d]+-(data|task|class)(\d+)-?(.*)", name
    ).groups()
    asked = {"data": "data-{}", "task": "task-{}", "class": "b0-inc{}"}[protocol].format(tasks)
    assert scenario == asked
    if protocol != "data":
        assert split_classes(scenario, 100) == [10] * 10
    replays = protocol == "class" or changed == "replay"
    assert memory == ("500 images" if replays else "none")
    assert preset.pretrained == {"cifar100": "ImageNet32", "mit67": "ImageNet"}[data]
    assert preset.published
    for method in (figure.method for figure in preset.published):
        settings = make_settings(method, preset.options_for([method]))
        network, augment = settings.groups["network"], settings.groups["augment"]
        assert (network.name, network.width, network.activation) == ("resnet18", 64, "leaky")
        assert network.stem == ("cifar" if data == "cifar100" else "imagenet")
        assert network.norms == ("train" if protocol == "class" else "first")
        made = make_augmentation(augment, augment.size, augment.crop, False)
        if data == "cifar100":
            assert made == Augmentation.cifar(brightness=0.0)
        else:
            assert made == Augmentation(224, "window", resize=256, brightness=0.0)
        config = settings.groups[method]
        heads = protocol == "task" and not replays
        assert getattr(config, "head", "all") == ("task" if heads else "all")
        for recipe in [config.recipe] if method == "joint" else [config.first, config.later]:
            linear = method == "dlcft" and not changed.startswith("softmax")
            told = ("adam", 1e-4) if linear else ("sgd", 1e-3)
            assert (recipe.optimizer, recipe.lr, recipe.weight_decay) == (*told, 1e-5)
            assert linear or recipe.momentum == 0.9
        if method == "dlcft":
            curvature = {"kfac": "kfac", "softmax-kfac": "kfac", "diagonal": "diagonal"}
            assert config.curvature == curvature.get(changed, "tkfac")
            assert (config.linear, config.loss == "squared") == (linear, linear)
            assert config.lam == 0.5 and config.alpha == 15.0


@pytest.mark.parametrize(("name", "method", "tables", "last", "bwt"), FINETUNING)
def test_published_finetuning(
    name: str, method: str, tables: str, last: float, bwt: float | None
) -> None:
    (figure,) = [f for f in read_preset(f"dlcft/{name}").published if f.method == method]
    assert (figure.average, figure.last, figure.bwt) == (None, last, bwt)
    assert re.findall(r"\d", figure.source.partition("Table")[2]) == list(tables)
