"""What a run says of itself where there is no terminal: whose line it is, and what came of it."""

import re

from backbones import ConvNet
from compositions import DATA, OPTIONS

from fastcil import compare, train


def lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "images in host" not in line]


def test_every_line_names_its_run_and_seed(capsys):
    methods = {"plain": {"method": "finetune"}, "mu [low]": {"method": "finetune"}}
    options = {**OPTIONS, "engine.progress": True}
    compare(methods, DATA, "lfs-2", "none", seeds=[0, 3], backbone=ConvNet, **options)
    said = lines(capsys)
    runs = [f"{label}, seed {seed}:" for label in methods for seed in (0, 3)]
    expected = [f"{run} task {task}/2" for run in runs for task in (1, 2) for _ in range(2)]
    assert [line[: len(own)] for line, own in zip(said, expected, strict=True)] == expected
    for trained, measured in zip(said[::2], said[1::2], strict=True):
        assert re.search(r" finetune: \d+ epochs, classification [\d.]+, [\d,]+ images/s$", trained)
        assert re.search(r": linear [\d.]+ % on [24] classes; 0 exemplars, 0 bytes$", measured)


def test_one_seed_is_not_named(capsys):
    options = {**OPTIONS, "engine.progress": True}
    train("er", DATA, "lfs-2", "4 images", backbone=ConvNet, **options)
    assert all(line.startswith(("er task 1/2", "er task 2/2")) for line in lines(capsys))


def test_silent_if_asked(capsys):
    train("er", DATA, "lfs-2", "4 images", backbone=ConvNet, **OPTIONS)
    assert lines(capsys) == []
