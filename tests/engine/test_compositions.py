"""Every method, alone and with every addon: it learns, stops, goes on and is measured, or says why.

What each computes is tested elsewhere; here it is that nothing which may be composed falls apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet
from compositions import ALONE, COMPOSED, DATA, OPTIONS, OWN, REFUSED

from fastcil import Learner, Result, train
from fastcil.contract.registry import ADDONS, METHODS
from fastcil.engine.result import Result as Outcome
from fastcil.engine.seed_run import SeedRun
from fastcil.errors import CompositionError


def run(composition: str, run_dir: Path) -> Result:
    options = {**OPTIONS, **OWN.get(composition.partition("+")[0], {})}
    return train(
        composition, DATA, "lfs-2", "8 images", run_dir=run_dir, backbone=ConvNet, **options
    )


def quick_ones() -> Iterator[Any]:
    """Every method alone, and with about a third of its addons; the rest is slow."""
    methods, addons = list(METHODS), list(ADDONS)
    for method, addon in [*ALONE, *COMPOSED]:
        quick = addon is None or (methods.index(method) + addons.index(addon)) % 3 == 0
        yield pytest.param(method, addon, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize("method, addon", list(quick_ones()))
def test_two_tasks(method: str, addon: str | None, tmp_path: Path, monkeypatch) -> None:
    composition = method if addon is None else f"{method}+{addon}"
    save = SeedRun._save_between_steps

    def stop_in_the_second_task(seed_run: SeedRun, trainer: Any) -> None:
        save(seed_run, trainer)
        if len(seed_run.outcome.tasks) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SeedRun, "_save_between_steps", stop_in_the_second_task)
        with pytest.raises(KeyboardInterrupt):
            run(composition, tmp_path)
    result = run(composition, tmp_path)
    assert [task.classes for task in result.outcomes[0].tasks] == [2, 2]
    assert result.accuracy_matrix.shape == (2, 2)
    assert np.isfinite(result.average_accuracy)
    read = Outcome.load(tmp_path, backbone=ConvNet)
    assert read.outcomes == result.outcomes
    learner: Learner = read.learner
    said = learner.predict(DATA[1][0])
    own = next(iter(result.outcomes[0].tasks[-1].correct.values()))
    labels = torch.tensor([learner.class_names.index(str(label)) for label in DATA[1][1]])
    mine = said.scores.gather(1, labels[:, None])
    others = said.scores.scatter(1, labels[:, None], 0.0).amax(1, keepdim=True)
    # So short a run may leave classes equal but for rounding.
    surely, maybe = (int((mine > others + slack).sum()) for slack in (1e-4, -1e-4))
    assert surely <= sum(own["top1"]) <= maybe, "what was saved says what was measured"


@pytest.mark.parametrize("method, addon", REFUSED)
def test_what_does_not_go_together_says_why(method: str, addon: str, tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=REFUSED[method, addon]) as caught:
        run(f"{method}+{addon}", tmp_path)
    assert f"'{addon}'" in str(caught.value) and "\n" not in str(caught.value)
