"""Boxes against true boxes, and accuracy by the size of objects, computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import train
from fastcil.data.scenes import make_scenes
from fastcil.engine.localisation import (
    QUALITY,
    SIZES,
    class_shares,
    overlaps,
    quality_record,
    size_record,
)
from fastcil.engine.result import Result

OPTIONS = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 12,
    "engine.progress": False,
    "augment.size": 16,
    "augment.crop": "resized",
    "cam.refresh": 1,
}


def random_boxes(count: int, side: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.integers(0, side + 1, (count, 2, 2)), axis=1)
    ends[:, 1] = np.maximum(ends[:, 1], ends[:, 0] + 1)
    return torch.from_numpy(ends.reshape(count, 4)).to(torch.int16)


def drawn(box: torch.Tensor, side: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    y0, x0, y1, x1 = box.tolist()
    mask[y0:y1, x0:x1] = True
    return mask


def test_overlaps_are_those_of_the_pixels() -> None:
    found, true = random_boxes(200, 12, 0), random_boxes(200, 12, 1)
    found[:5] = 0  # nothing found
    found[5:10] = true[5:10]
    fit, inside = overlaps(found, true)
    for k in range(200):
        a, b = drawn(found[k], 14), drawn(true[k], 14)
        assert float(fit[k]) == pytest.approx((a & b).sum() / (a | b).sum())
        assert float(inside[k]) == pytest.approx((a & b).sum() / b.sum())
    assert fit[:5].tolist() == [0.0] * 5 and fit[5:10].tolist() == [1.0] * 5


def test_quality_grows_by_a_point_a_task() -> None:
    true = torch.tensor([[0, 0, 4, 4], [2, 2, 6, 6]])
    sizes = torch.tensor([[8, 8], [8, 8]])
    first = quality_record(torch.tensor([[0, 0, 4, 4], [4, 4, 8, 8]]), true, sizes, [])
    assert list(first.payload["y"].values()) == [
        [pytest.approx((1 + 4 / 28) / 2)],
        [0.5],
        [pytest.approx((1 + 4 / 16) / 2)],
        [0.25],
    ]
    plain = [{"title": "other", "payload": {}}, {"title": QUALITY, "payload": first.payload}]
    second = quality_record(true, true, sizes, plain)
    assert second.payload["x"] == [0, 1]
    assert [values[1] for values in second.payload["y"].values()] == [1.0, 1.0, 1.0, 0.25]


def test_shares_of_classes_are_means_over_their_images() -> None:
    labels = torch.tensor([1, 0, 1, -1, 3])
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 8, 8], [0, 0, 0, 0], [0, 0, 8, 8], [0, 0, 1, 8]])
    shares = class_shares(labels, boxes, torch.tensor([[8, 8]]).expand(5, 2), 3).tolist()
    assert shares[:2] == [1.0, 0.125] and math.isnan(shares[2])


def test_groups_are_thirty_forty_and_thirty_percent() -> None:
    rng = np.random.default_rng(0)
    shares = torch.from_numpy(rng.permutation(np.linspace(0.05, 0.95, 20)))
    top1, count = rng.integers(0, 9, 20), rng.integers(9, 20, 20)
    kept = rng.integers(0, 30, 20)
    correct = {"top1": top1.tolist(), "count": count.tolist()}
    record = size_record(shares, correct, kept.tolist(), "true boxes")
    assert record is not None and record.title == f"{SIZES}, by true boxes"
    order = shares.argsort().numpy()
    groups = {"small": order[:6], "middle": order[6:14], "large": order[14:]}
    assert record.payload["rows"] == [
        [
            name,
            len(group),
            f"{100 * float(shares[group].mean()):.1f} %",
            f"{100 * top1[group].sum() / count[group].sum():.2f}",
            f"{kept[group].mean():.1f}",
        ]
        for name, group in groups.items()
    ]


def test_few_classes_or_unknown_ones_have_no_groups() -> None:
    correct = {"top1": [1, 1, 1], "count": [2, 2, 2]}
    assert size_record(torch.tensor([0.1, 0.2]), correct, [1, 1], "x") is None
    assert size_record(torch.tensor([0.1, math.nan, 0.2]), correct, [1, 1, 1], "x") is None


def records(result: Result, task: int, title: str) -> list[dict[str, Any]]:
    found = result.outcomes[0].tasks[task].records
    return [record for record in found if record["title"].startswith(title)]


def test_a_run_on_data_with_true_boxes_measures_its_own() -> None:
    data = make_scenes(classes=4, size=32, train_per_class=8, test_per_class=2)
    result = train("er+cam", data, "lfs-2", "8 images", backbone=ConvNet, **OPTIONS)
    (quality,) = records(result, 1, QUALITY)
    assert quality["payload"]["x"] == [0, 1]
    # The last task's boxes were kept: its images are those whose true box it was measured by.
    found = result.learner.parts.offered
    order = result.learner.class_names[2:]
    labels = data.train.labels
    wanted = [k for k in range(len(labels)) if data.class_names[labels[k]] in order]
    fit = overlaps(found, data.train_boxes[wanted])[0].mean()
    assert quality["payload"]["y"]["mean intersection over union (IoU)"][1] == pytest.approx(
        float(fit)
    )
    (by_size,) = records(result, 1, SIZES)
    assert by_size["title"].endswith("by true boxes")
    true = class_shares(labels, data.train_boxes, data.train.images.sizes, 4).sort().values
    shown = [row[2] for row in by_size["payload"]["rows"]]
    assert shown[0] == f"{100 * float(true[0]):.1f} %"
    assert shown[2] == f"{100 * float(true[3]):.1f} %"


def test_images_whose_box_is_not_known_are_left_out() -> None:
    data = make_scenes(classes=4, size=32, train_per_class=8, test_per_class=2)
    boxes = data.train_boxes.clone()
    gone = torch.arange(len(boxes)) % 8 >= 3
    boxes[gone] = 0
    some = replace(data, train_boxes=boxes)
    result = train("er+cam", some, "lfs-2", "8 images", backbone=ConvNet, **OPTIONS)
    order, labels = result.learner.class_names, data.train.labels
    wanted = torch.tensor([data.class_names[label] in order[2:] for label in labels.tolist()])
    known = wanted & ~gone
    found = result.learner.parts.offered[~gone[wanted]]
    fit = overlaps(found, data.train_boxes[known])[0].mean()
    (quality,) = records(result, 1, QUALITY)
    shown = quality["payload"]["y"]["mean intersection over union (IoU)"][1]
    assert shown == pytest.approx(float(fit))
    sizes = data.train.images.sizes
    true = class_shares(labels[~gone], boxes[~gone], sizes[~gone], 4).sort().values
    (by_size,) = records(result, 1, SIZES)
    assert by_size["payload"]["rows"][0][2] == f"{100 * float(true[0]):.1f} %"


def test_without_boxes_of_any_kind_there_is_nothing_to_say() -> None:
    data = make_scenes(classes=4, size=32, train_per_class=8, test_per_class=2)
    bare = replace(data, train_boxes=None, test_boxes=None)
    options = {k: v for k, v in OPTIONS.items() if not k.startswith("cam")}
    plain = train("er", bare, "lfs-2", "8 images", backbone=ConvNet, **options)
    assert not records(plain, 1, QUALITY) and not records(plain, 1, SIZES)
    boxed = train("er+cam", bare, "lfs-2", "8 images", backbone=ConvNet, **OPTIONS)
    assert not records(boxed, 1, QUALITY)
    (by_size,) = records(boxed, 1, SIZES)
    assert by_size["title"].endswith("by the boxes of exemplars")
    held = boxed.learner.memory.examples()
    shares = class_shares(held.labels, held.images.boxes, held.images.sizes, 4).sort().values
    assert by_size["payload"]["rows"][0][2] == f"{100 * float(shares[0]):.1f} %"
