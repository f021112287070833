"""What composes with what, and runs so small that all of it can be run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from fastcil.contract.registry import ADDONS, METHODS

KEEP_NOTHING = ("finetune", "lwf", "ebm", "eec", "lecnet", "ewc", "online-ewc", "mas", "osla", "si")
CHOOSE = ("mer", "dark", "darkpp", "topic")  # their exemplars themselves
MANY = ("der", "foster")  # extractors
MEASURE = ("ewc", "online-ewc", "mas", "osla", "si", "dlcft")  # how much their weights matter
NEED_NOTHING = ("fisher", "lec")  # in memory
NOTHING, EVERYTHING = "keeps nothing", "keeps everything"
# What can't be composed, and words of the reason.
REFUSED: dict[tuple[str, str], str] = {
    **{(m, a): NOTHING for m in KEEP_NOTHING for a in ADDONS if a not in NEED_NOTHING},
    **{("joint", a): EVERYTHING for a in ADDONS if a != "fisher"},
    **{(m, "mnemonics"): "chooses its own" for m in CHOOSE},
    **{(m, a): "has several" for m in MANY for a in ("aanets", "lec")},
    **{(m, "lec"): "how much" for m in MEASURE},
    **{(m, "lec"): "LinearHead" for m in ("ebm", "lucir", "podnet")},
    ("lecnet", "lec"): "'expanded'",
    ("dlcft", "aanets"): "two branches",
    ("dlcft", "cim"): "nn.ReLU",
}
ALONE = [(method, None) for method in METHODS]
# So that refreshes of boxes, warm-ups and milestones fall within few epochs.
SHORT = {
    "cam.refresh": 1,
    "cim.refresh": 1,
    "aanets.gradients": "summed",
    "cim.steps_per_class": 1.0,
    "der.representation.warmup": 100,
    "eec.width": 4,
    "lecnet.later.epochs": 200,
    "lecnet.analyse": True,
    "samc.first.batch_size": 3,
    "samc.later.batch_size": 3,
    "samc.analyse": True,
}
# Every method, and every addon on one or two that it asks most of.
SAMPLE = [
    *METHODS,
    "icarl+cam",
    "icarl+mrdc",
    "darkpp+cam",
    "dark+lec",
    "icarl+mnemonics",
    "er+samc",
    "gem+samc",
    "der+cim",
    "podnet+cim",
    "icarl+aanets",
    "lucir+aanets",
    "foster+cim",
]
COMPOSED = [(m, a) for m in METHODS for a in ADDONS if (m, a) not in REFUSED]
OPTIONS = {
    "engine.epoch_scale": 0.005,
    "engine.batch_size": 16,
    "engine.progress": False,
    "engine.checkpoint_seconds": 0,
    "augment.size": 12,
}
# So little memory has no room for a decoder of the published width.
OWN = {"eec": {"eec.width": 4}}


def every_other(cases: Iterable[Any], start: int = 0) -> list[Any]:
    """Cases of a test of which half will do; the others are slow tests."""
    return [
        case if k % 2 == start else pytest.param(case, marks=pytest.mark.slow)
        for k, case in enumerate(cases)
    ]


def draw(per_class: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    labels = [label for label in range(4) for _ in range(per_class)]
    return rng.integers(0, 256, (len(labels), 16, 14, 3), np.uint8), labels


DATA = draw(6, 0), draw(2, 1)
