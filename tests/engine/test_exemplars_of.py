"""Memory that keeps exemplars of the first task alone."""

from __future__ import annotations

import numpy as np
import pytest
from backbones import ConvNet

from fastcil import FastcilError, train

OPTIONS = {
    "engine.epoch_scale": 0.01,
    "engine.progress": False,
    "engine.exemplars_of": "first",
    "augment.size": 12,
}


def data() -> tuple[tuple[np.ndarray, list[int]], ...]:
    rng = np.random.default_rng(0)
    labels = [label for label in range(6) for _ in range(5)]
    images = rng.integers(0, 256, (30, 12, 12, 3), np.uint8)
    return (images, labels), (images, labels)


@pytest.mark.parametrize(
    ("method", "memory", "first"),
    [
        ("icarl", "6 images", [3, 3]),
        ("icarl", "2 images/class", [2, 2]),
        ("eeil", "6KiB", [5, 5]),
        ("icarl+cam", "6 images", None),
        ("ncm", "4 images", [2, 2]),
        ("darkpp", "4 images", None),
        ("finetune", "4 images", [0, 0]),
    ],
)
def test_exemplars_of_the_first_task_stay(method: str, memory: str, first: list | None) -> None:
    result = train(method, data(), "b2-inc2", memory, backbone=ConvNet, **OPTIONS)
    held = [task.exemplars for task in result.outcomes[0].tasks]
    assert all(counts[:2] == held[0] for counts in held)
    assert not any(sum(counts[2:]) for counts in held)
    assert first is None or held[0] == first
    store = result.learner.memory.examples()
    assert set(store.labels.tolist()) <= {0, 1}
    # Class means of classes without exemplars score nothing; the linear readout knows them all.
    for readout in result.readouts:
        assert np.isfinite(result.curve(readout)).all()


def test_a_method_that_keeps_everything_does() -> None:
    options = {**OPTIONS, "joint.normalised": True}
    result = train("joint", data(), "b2-inc2", "4 images", backbone=ConvNet, **options)
    assert result.outcomes[0].tasks[-1].exemplars == [5] * 6


def test_another_value_is_refused() -> None:
    with pytest.raises(FastcilError, match=r"engine\.exemplars_of"):
        train("er", data(), "b2-inc2", **{**OPTIONS, "engine.exemplars_of": "last"})
