"""AANets with methods of ours, from learning to loading; what each part does is tested apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import Learner
from fastcil.errors import CompositionError
from fastcil.nn import AggregatedBackbone


def shelf(*names):
    rng = np.random.default_rng(len(names[0]))
    return {name: rng.integers(0, 256, (7, 16, 18, 3), np.uint8) for name in names}


@pytest.mark.parametrize(
    "composition",
    [
        "icarl+aanets",
        pytest.param("lucir+aanets", marks=pytest.mark.slow),
        pytest.param("podnet+aanets", marks=pytest.mark.slow),
        "icarl+aanets+cim",
    ],
)
def test_compositions_learn_save_and_load(composition, tmp_path):
    options = {
        "engine.epoch_scale": 0.01,
        "engine.batch_size": 8,
        "engine.progress": False,
        "aanets.lr": 0.01,
        **({"cim.refresh": 1} if "cim" in composition else {}),
    }
    learner = Learner(composition, memory="8 images", backbone=ConvNet, **options)
    learner.learn(shelf("a", "b")).learn(shelf("cc", "dd"))
    made = learner.method.network.extractors[0]
    frozen = {n: v.clone() for n, v in made.stable.state_dict().items() if n.endswith("0.weight")}
    scales = {n: v.clone() for n, v in made.stable.named_parameters() if n.endswith("scale")}
    assert isinstance(made, AggregatedBackbone) and frozen and scales
    learner.save(tmp_path / "learner.safetensors")
    again = Learner.load(tmp_path / "learner.safetensors", backbone=ConvNet)
    images = shelf("a")["a"]
    assert torch.equal(again.predict(images).scores, learner.predict(images).scores)
    for one in (learner, again):
        one.learn(shelf("eee"))
        now = one.method.network.extractors[0].stable.state_dict()
        convolutions = {n: v for n, v in frozen.items() if v.ndim == 4}
        assert all(torch.equal(now[name], value) for name, value in convolutions.items())
        assert all(not torch.equal(now[name], value) for name, value in scales.items())
    assert torch.equal(again.predict(images).scores, learner.predict(images).scores)
    records = {record.title: record for part in again.parts.learners for record in part.records()}
    assert records["Aggregation weights"].payload["x"] == [1, 2]
    alphas = again.method.network.extractors[0].alphas
    assert not torch.equal(alphas, torch.full_like(alphas, 0.5))
    kept = again.nbytes()["stable branch"]
    assert kept > sum(v.nbytes for v in frozen.values())


def test_weight_transfer_beside_it_is_refused():
    options = {"engine.epoch_scale": 0.01, "engine.progress": False, "lucir.transfer": True}
    learner = Learner("lucir+aanets", memory="8 images", backbone=ConvNet, **options)
    learner.learn(shelf("a", "b"))
    with pytest.raises(CompositionError, match="LUCIR has frozen the convolutions"):
        learner.learn(shelf("cc", "dd"))
