"""Frozen extractors look once at images that never change, and learning is what it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet
from compositions import every_other
from torch import Tensor

import fastcil
from fastcil.contract import Stream
from fastcil.data import Augmentation, Examples, ImageStore
from fastcil.engine.learner import Learner
from fastcil.engine.loader import Loader
from fastcil.engine.trainer import Trainer
from fastcil.nn import LinearHead, Network
from fastcil.nn.recall import Recall

PLAIN = {"crop": "none", "flip": False, "brightness": 0.0, "policy": "none", "cutout": 0}
METHODS = ["der", "foster", "lwf", "icarl", "wa", "eeil", "icarl+mnemonics"]
# Their images are compressed at random, and so never the same.
DRAWN = ["der+cim", "foster+cam"]


class Counted(ConvNet):
    """Counts batches that a frozen one sees in a step."""

    seen = 0
    in_step = False

    def forward(self, images: Tensor) -> Tensor:
        frozen = not any(parameter.requires_grad for parameter in self.parameters())
        Counted.seen += Counted.in_step and frozen and not self.training
        return super().forward(images)


def learn(method: str, patch: pytest.MonkeyPatch, **options: Any) -> tuple[Learner, dict[str, int]]:
    """Two tasks, of the second of which batches are counted, by stage."""
    seen: dict[str, int] = {}
    run_step = Trainer._run_step

    def counted(trainer: Trainer, lane: Any, *rest: Any) -> int:
        Counted.in_step, before = True, Counted.seen
        try:
            return run_step(trainer, lane, *rest)
        finally:
            Counted.in_step = False
            name = lane.stage.name
            seen[name] = seen.get(name, 0) + Counted.seen - before

    rng = np.random.default_rng(0)
    with patch.context() as inner:
        inner.setattr(Trainer, "_run_step", counted)
        learner = Learner(
            method,
            memory="none" if method == "lwf" else "8 images",
            backbone=Counted,
            **{
                "engine.epoch_scale": 0.1,
                "engine.batch_size": 8,
                "engine.progress": False,
                **{f"augment.{name}": value for name, value in PLAIN.items()},
                **options,
            },
        )
        for task in range(2):
            seen.clear()
            classes = [f"{task}{k}" for k in range(2)]
            learner.learn({n: rng.integers(0, 256, (8, 12, 12, 3), np.uint8) for n in classes})
    return learner, seen


@pytest.mark.parametrize("method", [*every_other(METHODS), *DRAWN])
def test_learning_is_what_it_was(method: str, assert_same, monkeypatch) -> None:
    recalled, once = learn(method, monkeypatch)
    monkeypatch.setattr(Loader, "constant", None)
    computed, always = learn(method, monkeypatch)
    assert_same(recalled.parts.state(), computed.parts.state())
    assert (once == always) == (method in DRAWN)
    assert all(once[name] <= always[name] for name in always)


@pytest.mark.parametrize(
    ("method", "batches"),
    [
        ("lwf", {"warmup": 2, "lwf": 2}),
        ("icarl", {"icarl": 3}),
        ("der", {"representation": 3, "classifier": 4}),
    ],
)
def test_one_look_at_each_image(method: str, batches: dict[str, int], monkeypatch) -> None:
    """The first epoch alone looks at 16 new images, and 8 exemplars, in batches of 8."""
    assert learn(method, monkeypatch)[1] == batches
    drawn = learn(method, monkeypatch, **{"augment.flip": True})[1]
    assert all(drawn[name] >= 2 * batches[name] for name in batches)


def test_progress_says_so(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    learn("der", monkeypatch, **{"engine.progress": True})
    lines = [line for line in capsys.readouterr().err.splitlines() if "epochs" in line]
    said = [line.partition("images/s")[2] for line in lines]
    assert said == ["", ", 1 frozen extractor looked once at each image"] + [
        ", 2 frozen extractors looked once at each image"
    ]


def test_a_run_that_goes_on_has_the_same_bits(tmp_path, assert_same, monkeypatch) -> None:
    """What was kept is no part of a checkpoint."""
    rng = np.random.default_rng(0)
    labels = [k for k in range(4) for _ in range(9)]
    data = rng.integers(0, 256, (36, 12, 12, 3), np.uint8), labels
    options = {f"augment.{name}": value for name, value in PLAIN.items()}
    options |= {"engine.epoch_scale": 0.03, "engine.batch_size": 8, "engine.progress": False}
    options |= {"engine.checkpoint_seconds": 0}

    def run(folder: str | None) -> Any:
        return fastcil.train(
            "der", (data, data), "b2-inc2", "4 images", backbone=ConvNet,
            run_dir=None if folder is None else tmp_path / folder, **options,
        )  # fmt: skip

    whole, steps, run_step = run(None), [0], Trainer._run_step

    def stopped(trainer: Trainer, lane: Any, epoch: int, step: int) -> int:
        steps[0] += trainer.key[2] == 1
        if steps[0] == 9:
            raise KeyboardInterrupt
        return run_step(trainer, lane, epoch, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_run_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            run("run")
    assert_same(whole.learner.parts.state(), run("run").learner.parts.state())


# The recall itself


def network(frozen: bool = True) -> Network:
    found = Network([ConvNet(), ConvNet()], LinearHead(12, classes=3)).eval()
    if frozen:
        found.freeze(0)
    return found


def test_only_the_very_images_are_found() -> None:
    net, recall = network(), Recall(4, 2, 1 << 20)
    images, rows = torch.rand(2, 3, 8, 8), torch.tensor([3, 1])
    with recall.recalling(images, rows):
        first = net.features(images)
        composed = net.features(images * 1)
        again = net.features(images)
    assert recall.found == 1 and torch.equal(first, again)
    assert torch.allclose(first, composed) and recall.extractors == 1
    net.extractors[0].layers[0].weight.data.zero_()
    with recall.recalling(images.clone(), rows.flip(0)):
        pass
    with recall.recalling(images, rows):
        assert torch.equal(net.features(images), first)
    assert not torch.equal(net.features(images), first), "outside of a step all is computed"


@pytest.mark.parametrize("what", ["short", "gradient", "hook", "no room", "not frozen"])
def test_what_is_computed_anew(what: str) -> None:
    net, limit = network(frozen=what != "not frozen"), 95 if what == "no room" else 96
    recall = Recall(4, 2, limit)  # [4, 6] in single precision
    images = torch.rand(1 if what == "short" else 2, 3, 8, 8, requires_grad=what == "gradient")
    if what == "hook":
        net.extractors[0].register_forward_hook(lambda *_: None)
    for _ in range(2):
        with recall.recalling(images, torch.arange(len(images))):
            net.features(images)
    assert (recall.found, recall.extractors) == (0, 0)
    plain, fits = torch.rand(2, 3, 8, 8), Recall(4, 2, 96)
    with fits.recalling(plain, torch.arange(2)):
        network().features(plain)
    assert fits.extractors == 1


def test_half_of_a_batch_is_not_enough() -> None:
    net, recall, images = network(), Recall(4, 2, 1 << 20), torch.rand(4, 3, 8, 8)
    for rows in ([0, 1], [1, 2], [0, 2], [3, 1], [2, 3]):
        batch = images[rows]
        with recall.recalling(batch, torch.tensor(rows)):
            got = net.features(batch)
        assert torch.allclose(got, net.features(batch), atol=1e-6)
    assert recall.found == 2


@pytest.mark.parametrize(
    ("changes", "streams", "constant"),
    [
        ({}, 1, (5, 4)),
        ({"flip": True}, 1, None),
        ({"crop": "padded"}, 1, None),
        ({"brightness": 0.1}, 1, None),
        ({"policy": "cifar"}, 1, None),
        ({"cutout": 2}, 1, None),
        ({}, 2, None),
    ],
)
def test_where_images_are_always_the_same(changes, streams, constant) -> None:
    store = ImageStore.from_batch(torch.zeros(5, 8, 8, 3, dtype=torch.uint8))
    held = Examples(store, torch.arange(5))
    augmentation = Augmentation(8, **{**PLAIN, **changes})
    given = [Stream((held,), 4)] * streams
    assert Loader(given, augmentation, torch.device("cpu"), (0,)).constant == constant
    moving = Stream((held,), 4, subset=lambda: torch.arange(3))
    assert Loader([moving, moving], augmentation, torch.device("cpu"), (0,)).constant is None
