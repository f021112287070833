"""The Learner in production: learns in one process, goes on in another, predicts in a third."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch

import fastcil
from fastcil.contract import evaluating
from fastcil.data import load
from fastcil.engine.state import load_state

OPTIONS = {
    "engine.epoch_scale": 0.006,
    "engine.batch_size": 16,
    "engine.progress": False,
    "engine.threads": 1,
    "network.name": "resnet20",
    "network.width": 4,
    "augment.size": 32,
}
BEGIN = """
import sys, fastcil
target, folder = sys.argv[1:]
learner = fastcil.Learner("foster+cim", memory="96KiB", seed=3, **{options!r})
learner.learn(folder).save(target)
"""
GO_ON = """
import sys, fastcil
target, source, folder = sys.argv[1:]
fastcil.Learner.load(source).learn(folder).save(target)
"""
PREDICT = """
import json, sys, cv2, fastcil
learner = fastcil.Learner.load(sys.argv[1])
images = [cv2.imread(p, cv2.IMREAD_COLOR_RGB) for p in sys.argv[2:]]
prediction = learner.predict(images)
print(json.dumps([list(prediction.names), prediction.scores.tolist()]))
"""


def python(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Path]]:
    """Two folders of three classes each, and some test images."""
    root = tmp_path_factory.mktemp("shelves")
    data = load("scenes", classes=6, size=40, train_per_class=6, test_per_class=2)
    for k in range(len(data.train)):
        label = int(data.train.labels[k])
        folder = root / f"shelf{label // 3}" / data.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        image = data.train.images.image(k).numpy()[: 40 - label % 3]
        cv2.imwrite(str(folder / f"{k:04}.png"), image[..., ::-1])
    tests = []
    for k in range(len(data.test)):
        tests.append(root / f"test{k:03}.png")
        cv2.imwrite(str(tests[-1]), data.test.images.image(k).numpy()[..., ::-1])
    return root / "shelf0", root / "shelf1", tests


@pytest.fixture(scope="module")
def saved(shelves, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same two shelves learned in two processes, and in this one."""
    folder = tmp_path_factory.mktemp("learners")
    first, second, _ = shelves
    files = {name: folder / f"{name}.safetensors" for name in ("half", "resumed", "whole")}
    python(BEGIN.format(options=OPTIONS), files["half"], first)
    python(GO_ON, files["resumed"], files["half"], second)
    learner = fastcil.Learner("foster+cim", memory="96KiB", seed=3, **OPTIONS)
    learner.learn(first).learn(second).save(files["whole"])
    return files


def test_three_processes_equal_one(saved, shelves, assert_same) -> None:
    resumed, whole = (load_state(saved[name]) for name in ("resumed", "whole"))
    assert resumed["class_names"] == whole["class_names"] and len(whole["class_names"]) == 6
    assert_same(resumed, whole)
    tests = shelves[2]
    names, scores = json.loads(python(PREDICT, saved["resumed"], *tests))
    images = [cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) for path in tests]
    here = fastcil.Learner.load(saved["whole"]).predict(images)
    assert names == list(here.names) and scores == here.scores.tolist()


def test_memory_keeps_its_budget_and_its_classes(saved) -> None:
    learner = fastcil.Learner.load(saved["whole"])
    counts = learner.memory.counts(6)
    assert min(counts) >= 1
    assert learner.nbytes()["budgeted"] <= 96 * 1024


def test_exported_onnx_gives_the_same_logits(saved, tmp_path) -> None:
    learner = fastcil.Learner.load(saved["whole"])
    path = learner.export(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad(), evaluating(learner.method):
            expected = learner.method.logits(images).numpy()
        (got,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_exported_program_gives_the_same_logits(saved, tmp_path) -> None:
    learner = fastcil.Learner.load(saved["whole"])
    program = torch.export.load(learner.export(tmp_path / "model.pt2", format="torch"))
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), evaluating(learner.method):
        expected = learner.method.logits(images)
    torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-4)


def test_predict_takes_images_in_every_form(saved) -> None:
    learner = fastcil.Learner.load(saved["whole"])
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 50, 3), dtype=np.uint8)
    batch = learner.predict(images)
    assert batch.scores.shape == (3, 6) and len(batch.names) == 3
    torch.testing.assert_close(batch.scores.sum(1), torch.ones(3))
    singly = [learner.predict(image) for image in images]
    listed = learner.predict(list(images))
    assert batch.names == listed.names == tuple(p.names[0] for p in singly)


def test_a_known_class_is_refused_and_nothing_changes(saved, shelves) -> None:
    learner = fastcil.Learner.load(saved["half"])
    before = learner.memory.checksum()
    with pytest.raises(fastcil.FastcilError, match="is known already"):
        learner.learn(shelves[0])
    assert learner.memory.checksum() == before and len(learner.class_names) == 3


def test_an_untrained_learner_says_so(tmp_path) -> None:
    learner = fastcil.Learner("finetune", memory="none", **OPTIONS)
    for attempt in (
        lambda: learner.predict(np.zeros((4, 4, 3), np.uint8)),
        lambda: learner.export(tmp_path / "m.onnx"),
    ):
        with pytest.raises(fastcil.FastcilError, match="knows no class yet"):
            attempt()
    assert not list(tmp_path.iterdir())


def noise(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    shape = (count, height, width, 3)
    return np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)


class Convolution(torch.nn.Conv2d):
    """The least backbone there is."""

    def __init__(self) -> None:
        super().__init__(3, 6, 3, stride=4)


def test_icarl_exports_what_it_predicts_by(tmp_path) -> None:
    """The nearest mean of exemplars, which is its own readout, and not its linear head."""
    learner = fastcil.Learner("icarl", memory="8 images", backbone=Convolution, **OPTIONS)
    learner.learn({"a": noise(6), "b": noise(7)}).learn({"c": noise(8)})
    program = torch.export.load(learner.export(tmp_path / "icarl.pt2", format="torch"))
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), evaluating(learner.method):
        scores, linear = (readout(images) for readout in learner.method.readouts().values())
    got = program.module()(images)
    torch.testing.assert_close(got, scores, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, linear, atol=1e-2)


@pytest.mark.parametrize(
    "data, names, says",
    [
        ((noise(4), [0, 0, 3, 3]), ("a",), "names is ('a',) for data with 2 classes"),
        ((noise(4), [0, 0, 3, 3]), ("a", "b", "c"), "for data with 2 classes"),
        ((noise(4), [0, 0, 3, 3]), ("a", "a"), "give each class a name of its own"),
        ({"a": noise(4), "old": noise(4)}, None, "brings the class 'old', which is known already"),
        ({"a": noise(4, 30, 32)}, None, "image 0 is 30 x 32; 'resized' takes all sizes"),
    ],
)
def test_what_can_not_be_learned_leaves_the_learner_as_it_was(data, names, says) -> None:
    options = {**OPTIONS, "augment.size": None}
    learner = fastcil.Learner("finetune", memory="none", **options).learn({"old": noise(4)})
    assert learner.parts.augmentation.crop == "padded"
    with pytest.raises(fastcil.FastcilError) as caught:
        learner.learn(data, names=names)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert learner.class_names == ("old",)
    assert learner.learn((noise(4), [0, 0, 3, 3]), names=("x", "y")).class_names == (
        *("old", "x", "y"),
    )
    assert set(learner.predict(noise(3, 40, 50)).names) <= {"old", "x", "y"}


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"seed": -1}, "seed is -1"),
        ({"device": "tpu9"}, "device is 'tpu9'"),
        ({"memory": 64}, "memory is 64, without a unit"),
        (
            {"codec": "bbox"},
            "codec is 'bbox', which must be told what matters in each image, by boxes",
        ),
        ({"network.name": "resnet99"}, "backbone is 'resnet99'"),
        ({"augment.padding": -1}, "augment.padding is -1"),
    ],
)
def test_a_learner_that_can_not_be_is_refused_before_it_trains(arguments, says) -> None:
    options = {"memory": "8 images", **OPTIONS, **arguments}
    for _ in range(2):
        with pytest.raises(fastcil.FastcilError) as caught:
            fastcil.Learner("er", **options).learn({"a": noise(4)})
        assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_untrained_learner_is_saved_and_loaded(tmp_path) -> None:
    fastcil.Learner("er", memory="8 images", seed=5, **OPTIONS).save(tmp_path / "new")
    learner = fastcil.Learner.load(tmp_path / "new")
    assert (learner.seed, str(learner.budget), learner.class_names) == (5, "8 images", ())
    assert learner.learn({"a": noise(4)}).class_names == ("a",)
