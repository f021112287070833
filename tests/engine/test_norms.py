"""Batch norms that train in the first task only (``network.norms``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compositions import every_other
from torch import Tensor, nn

from fastcil import FastcilError, Learner
from fastcil.contract import lookup
from fastcil.contract.registry import METHODS

OPTIONS = {
    "network.name": "resnet20",
    "network.width": 4,
    "network.norms": "first",
    "engine.epoch_scale": 0.005,
    "engine.batch_size": 8,
    "engine.progress": False,
    "engine.threads": 1,
}
ADDING = [name for name in METHODS if lookup("method", name).adds_extractors]
LINEAR = ["dlcft"]  # which has none left
# By default joint begins anew in every task, eec's decoder needs more memory, and these train no
# convolution but the last ones.
OWN = {
    "joint": {"joint.fresh": False},
    "eec": {"eec.width": 4},
    "ncm": {"ncm.trains": "all"},
    "topic": {"topic.trains": "all"},
}


def some(*names: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(names[0]))
    return {name: rng.integers(0, 256, (6, 16, 16, 3), np.uint8) for name in names}


def norms(learner: Learner) -> dict[str, Tensor]:
    found = {}
    for name, module in learner.method.network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            for key, value in module.state_dict().items():
                found[plain(f"{name}.{key}")] = value.clone()
    return found


def plain(name: str) -> str:
    """A name within a backbone, whatever tasks have put around it."""
    return name.replace("backbone.", "")


@pytest.mark.parametrize("method", every_other(m for m in METHODS if m not in (*ADDING, *LINEAR)))
def test_norms_stay_after_the_first_task(tmp_path: Path, method: str) -> None:
    learner = Learner(method, memory="4 images", **OPTIONS, **OWN.get(method, {}))
    learner.learn(some("a", "b"))
    before = norms(learner)
    assert any(value.any() for name, value in before.items() if name.endswith("running_mean"))
    learner.save(tmp_path / "learner.safetensors")
    again = Learner.load(tmp_path / "learner.safetensors").learn(some("cc", "dd"))
    after = norms(again)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    weight = "extractors.0.stages.0.0.conv1.weight"
    states = [
        {plain(name): value for name, value in one.method.network.state_dict().items()}
        for one in (learner, again)
    ]
    name = weight if weight in states[0] else next(n for n in states[0] if "conv" in n)
    assert not torch.equal(states[0][name], states[1][name])


@pytest.mark.parametrize("method", ADDING)
def test_norms_of_extractors_to_come_must_train(method: str) -> None:
    learner = Learner(method, memory="4 images", **OPTIONS)
    with pytest.raises(FastcilError, match=f"network.norms is 'first', but {method} adds"):
        learner.learn(some("a", "b"))
