from __future__ import annotations

import base64
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from fastcil.contract import Record, Task
from fastcil.data import Examples, ImageStore
from fastcil.engine.records import collect_records, record_to_plain
from fastcil.memory import Memory


def decode(uri):
    kind, _, text = uri.partition(";base64,")
    image = cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_COLOR)
    return kind.removeprefix("data:image/"), image[:, :, ::-1]


def test_small_images_keep_their_bits():
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    record = Record("images", "grid", {"images": images, "captions": ["a", "b", "c"]})
    plain = json.loads(json.dumps(record_to_plain(record)))
    assert plain["payload"]["captions"] == ["a", "b", "c"]
    for uri, image in zip(plain["payload"]["images"], images, strict=True):
        kind, shown = decode(uri)
        assert kind == "png"
        assert (shown == image).all()


def test_captions_of_labelled_images_name_their_class():
    images, names = np.zeros((2, 4, 4, 3), dtype=np.uint8), ("gull", "tern")
    bare = Record("images", "birds", {"images": images, "labels": [1, 0]})
    assert record_to_plain(bare, names)["payload"]["captions"] == ["tern", "gull"]
    said = Record("images", "birds", {**bare.payload, "captions": ["before", "after"]})
    payload = record_to_plain(said, names)["payload"]
    assert payload["captions"] == ["tern: before", "gull: after"]
    assert "labels" not in payload


def test_large_images_are_kept_small():
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 256, (16, 32, 3), dtype=np.uint8), (260, 128))
    noisy = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    (uri,) = record_to_plain(Record("images", "x", {"images": [noisy]}))["payload"]["images"]
    kind, shown = decode(uri)
    assert kind == "jpeg"
    assert len(uri) < 30_000
    assert np.abs(shown.astype(int) - noisy).mean() < 6


@pytest.mark.parametrize(
    ("payload", "plain"),
    [
        (
            {"x": np.arange(3), "y": {1: torch.tensor([1.5, 2.0])}},
            {"x": [0, 1, 2], "y": {"1": [1.5, 2.0]}},
        ),
        (
            {"values": np.eye(2), "rows": ("a", "b")},
            {"values": [[1, 0], [0, 1]], "rows": ["a", "b"]},
        ),
        (
            {"columns": ["n"], "rows": [[np.float32(0.5)], [None]]},
            {"columns": ["n"], "rows": [[0.5], [None]]},
        ),
    ],
)
def test_payloads_become_plain(payload, plain):
    made = record_to_plain(Record("table", "t", payload))
    assert made == {"kind": "table", "title": "t", "payload": plain}
    assert json.loads(json.dumps(made)) == made


class Leaves:
    def __init__(self, *records):
        self._records = list(records)

    def records(self):
        return self._records


@pytest.mark.parametrize("budget", ["6 images", "none"])
@pytest.mark.parametrize("gallery", [True, False])
def test_the_gallery_comes_first_where_there_is_something_to_show(budget, gallery):
    store = ImageStore.from_batch(torch.zeros(4, 8, 8, 3, dtype=torch.uint8))
    examples = Examples(store, torch.tensor([0, 1, 0, 1]))
    task = Task(0, (0, 1), 0, examples, examples.select([]), "task 1")
    memory = Memory(budget)
    memory.update(task, lambda e: torch.ones(len(e), 1))
    parts = [Leaves(Record("table", "one")), Leaves(), Leaves(Record("table", "two"))]
    learner = SimpleNamespace(
        parts=SimpleNamespace(learners=parts), memory=memory, class_names=("a", "b")
    )
    titles = [record["title"] for record in collect_records(learner, task, gallery)]
    shown = ["Exemplars of task 1"] if gallery and budget != "none" else []
    assert titles == [*shown, "one", "two"]
