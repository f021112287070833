"""The figures that preset files cite: every cell of the papers' tables, some number by number."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from fastcil.engine.preset_files import (
    Published,
    preset_names,
    read_preset,
)
from fastcil.memory import Budget

SAMC = [name for name in preset_names() if name.startswith("samc/")]
DLCFT = [name for name in preset_names() if name.startswith("dlcft/")]
FEW_SHOT = [n for n in preset_names() if read_preset(n).arguments["scenario"].startswith("few-")]
MNIST = "lecnet/mnist-5"
FIGURES = [
    # Table, method, average, last
    ("cim/food101-lfs10", "foster+cim", 74.85, None),
    ("cim/food101-lfh25", "podnet+aanets", 66.93, None),
    ("cim/imagenet100-lfs5", "der+cim", 79.63, None),
    ("cim/imagenet100-lfs10", "foster+cim", 77.94, 71.12),
    ("cim/imagenet100-lfh10", "lucir+mrdc", 72.81, None),
    ("cim/imagenet1000-lfs10-20k", "foster+cim", 69.53, 62.07),
    ("cim/imagenet1000-lfs10-5k", "foster", 54.72, 44.96),
    ("cim/imagenet1000-lfh25", "lucir+mnemonics", 63.08, None),
    ("cifar100/b0-10", "foster", 72.90, None),
    ("cifar100/b50-10-resnet18", "der", 72.81, 65.64),
]


# Bai et al. (2023), Tables 1, 2 and 4: preset, method, last accuracy, backward transfer, exemplars.
TRANSFERS = [
    ("samc/cifar10-10", "finetune", 63.24, -17.91, None),
    ("samc/cifar10-10", "gem+samc", 75.37, -11.12, None),
    ("samc/cifar100-10", "eec", 53.03, -10.69, None),
    ("samc/cifar100-10", "gem+samc", 56.16, -8.24, 870),
    ("samc/cifar100-10-zero", "gem+samc", 47.91, -14.32, None),
    ("samc/cifar100-10-mu-0.9", "gem+samc", None, None, 2250),
    ("samc/mini-imagenet-10", "gem", 40.78, -9.87, None),
    ("samc/mini-imagenet-10-rule", "gem+samc", 44.10, -6.72, None),
    ("samc/mini-imagenet-50", "gem", None, None, None),
]


@pytest.mark.parametrize(("name", "method", "last", "bwt", "exemplars"), TRANSFERS)
def test_published_transfers(name, method, last, bwt, exemplars) -> None:
    (figure,) = [f for f in read_preset(name).published if f.method == method]
    assert (figure.average, figure.last, figure.bwt) == (None, last, bwt)
    assert figure.exemplars == exemplars and "Bai et al. (2023)" in figure.source


def test_published_costs() -> None:
    """Bai et al. (2023), Table 3: MB of images and autoencoder, seconds of two tasks."""
    figures = {}
    for name in ("samc/mini-imagenet-255", "samc/mini-imagenet-85-mu-0.6"):
        preset = read_preset(name)
        ((figure,), room) = preset.published, Budget.parse(preset.arguments["memory"]).amount
        figures[figure.method] = (figure.mebibytes, figure.seconds, room)
        assert figure.source.endswith("Table 3") and figure.last is None
    gem, samc = figures["gem"], figures["gem+samc"]
    assert gem[:2] == (413, 133) and samc[1] == 133 + 7 + 3
    assert samc[0] == pytest.approx(413 / 3 + 0.5, abs=0.05) and gem[2] == 3 * samc[2]
    # 413 MB: 5,120 images of 84 x 84 in four bytes a value, 256 for each of 20 tasks of 5 classes.
    images = 413 * 2**20 / (84 * 84 * 3 * 4)
    assert round(images / 20) == 256 and gem[2] == 256 // 5


def test_figures_as_text() -> None:
    figure = Published("gem", None, 50.28, "")
    full = replace(figure, bwt=-13.56, exemplars=2250)
    assert full.text == "- / 50.28, BWT -13.56, 2,250 exemplars"
    assert replace(figure, average=9.0).text == "9.00 / 50.28"
    cost = Published("gem", None, None, "", mebibytes=413, seconds=133)
    assert cost.text == "413 MiB, two tasks in 133 s"
    nothing = replace(figure, last=None)
    assert nothing.text == "" and replace(nothing, exemplars=3).text == "3 exemplars"


@pytest.mark.parametrize(("name", "method", "average", "last"), FIGURES)
def test_published_figures(name: str, method: str, average: float, last: float | None) -> None:
    (figure,) = [f for f in read_preset(name).published if f.method == method]
    assert (figure.average, figure.last) == (average, last) and figure.source


def test_every_cell_of_the_tables_is_there() -> None:
    counts = dict.fromkeys(("Table 1", "Table 2", "Table 4"), 0)
    for name in {*preset_names()} - {*SAMC, *FEW_SHOT, *DLCFT, MNIST}:
        for figure in read_preset(name).published:
            for table in counts:
                counts[table] += figure.source.replace("Tables 1 and 5", "Table 1").endswith(table)
    # Table 1: 8 methods in 12 columns, but for DER and DER + CIM at N=25 (LFH), twice.
    assert counts == {"Table 1": 8 * 12 - 4, "Table 2": 2 * 5 + 2 * 2, "Table 4": 4 * 6}
    figures = [figure for name in SAMC for figure in read_preset(name).published]
    # Bai et al. (2023), Table 1: ten methods on three data sets; Table 2: three more rows.
    assert sum(figure.bwt is not None for figure in figures) == 3 * 10 + 3 * 3
    assert sum(figure.exemplars is not None for figure in figures) == 10
    figures = [figure for name in DLCFT for figure in read_preset(name).published]
    counts = dict.fromkeys("12356", 0)
    for figure in figures:
        named = re.fullmatch(r"Shon et al. \(2022\), Tables? (\d[, and\d]*)", figure.source)
        for table in re.findall(r"\d", named[1]):  # type: ignore[index]
            counts[table] += 1
    # Table 1: eight rows in three columns, joint training's figure for both lengths of CIFAR-100;
    # 2: seven task- and four class-incremental ones; 3: four rows in three; 5: one empty; 6: four.
    assert counts == {"1": 8 * 3, "2": 7 + 4, "3": 4 * 3, "5": 2 * 3 - 1, "6": 4}
    assert len(figures) == len({(n, f.method) for n in DLCFT for f in read_preset(n).published})
    assert sum(figure.bwt is not None for figure in figures) == counts["6"]
    assert all(figure.last is not None and figure.average is None for figure in figures)
