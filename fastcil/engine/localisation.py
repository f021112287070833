"""How well boxes fit the objects, and how accuracy depends on how large objects are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcil.contract import Record
from fastcil.data import Dataset
from fastcil.engine.learner import Learner
from fastcil.engine.scenario import Arrival, places, positions
from fastcil.memory import Memory
from fastcil.memory.boxes import box_shares, whole_boxes

QUALITY = "Boxes against the objects' true boxes"
SIZES = "Accuracy by object size"
_GOOD = 0.5
_OUTER = 0.3


def localisation_records(
    learner: Learner,
    dataset: Dataset,
    arrival: Arrival,
    order: Sequence[int],
    correct: Mapping[str, Sequence[int]],
    before: Sequence[Mapping[str, Any]],
) -> list[Record]:
    """What there is to say of boxes after a task: `quality_record` and `size_record`.

    Args:
        learner: It has learned the task.
        dataset: Its ``train_boxes`` are the objects' true boxes, where they are known; images
            whose box is empty are left out.
        arrival: The task.
        order: Classes learned, in learning order.
        correct: ``top1`` and ``count`` of each of them.
        before: Records of the task before, in plain form.
    """
    train, true, classes = dataset.train, dataset.train_boxes, len(order)
    found = learner.parts.offered if learner.memory.codec.marks == "boxes" else None
    records = []
    if true is not None and found is not None:
        index = positions(train, arrival)
        boxes, sizes = true.cpu()[index], train.images.sizes.cpu()[index]
        known = not_empty(boxes)
        if known.any():
            found = found[known.to(found.device)]
            records.append(quality_record(found, boxes[known], sizes[known], before))
    whose, shares = "the boxes of exemplars", held_shares(learner.memory, classes)
    if true is not None:
        labels = places(order, train.labels).cpu()
        labels = torch.where(not_empty(true.cpu()), labels, -1)
        whose, shares = "true boxes", class_shares(labels, true, train.images.sizes, classes)
    if shares is not None:
        table = size_record(shares, correct, learner.memory.counts(classes), whose)
        records += [] if table is None else [table]
    return records


def not_empty(boxes: Tensor) -> Tensor:
    """Which boxes, [N, 4], have an area, bool [N]."""
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


def overlaps(found: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of two boxes of each image, and the part of the second inside.

    Args:
        found: [N, 4], (y0, x0, y1, x1) with exclusive ends.
        true: [N, 4], none of them empty.

    Returns:
        float64 [N] each.

    Example:
        >>> overlaps(torch.tensor([[0, 0, 2, 4]]), torch.tensor([[0, 0, 4, 4]]))
        (tensor([0.5000], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    found, true = found.cpu().double(), true.cpu().double()

    def area(boxes: Tensor) -> Tensor:
        return (boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(1)

    common = torch.cat([found[:, :2].maximum(true[:, :2]), found[:, 2:].minimum(true[:, 2:])], 1)
    shared, whole = area(common), area(true)
    return shared / (area(found) + whole - shared), shared / whole


def quality_record(
    found: Tensor, true: Tensor, sizes: Tensor, before: Sequence[Mapping[str, Any]]
) -> Record:
    """How well a task's boxes fit its objects, after what earlier tasks' did.

    Args:
        found: Boxes by which the task's images were offered to memory, [N, 4].
        true: The objects' boxes, [N, 4].
        sizes: Heights and widths of the images, [N, 2].
        before: Records of the task before, in plain form.

    Returns:
        Over tasks, the mean intersection over union, the share of images where it is at least
        1/2, the mean share of the object that is inside, and what the whole image would have as
        its intersection over union: the least that a box should beat.
    """
    fit, inside = overlaps(found, true)
    measured = {
        "mean intersection over union (IoU)": fit.mean(),
        "images with an IoU of 1/2 or more": (fit >= _GOOD).double().mean(),
        "share of the object inside": inside.mean(),
        "IoU of the whole image": overlaps(whole_boxes(sizes), true)[0].mean(),
    }
    past = [record["payload"] for record in before if record["title"] == QUALITY]
    x = list(past[-1]["x"]) if past else []
    y = {name: [*(past[-1]["y"][name] if past else ()), float(v)] for name, v in measured.items()}
    x.append(x[-1] + 1 if x else 0)
    return Record("curve", QUALITY, {"x": x, "y": y, "xlabel": "task", "ylabel": "share"})


def class_shares(labels: Tensor, boxes: Tensor, sizes: Tensor, classes: int) -> Tensor:
    """The mean share of an image that is inside its box, of each class.

    Args:
        labels: int64 [N]; those outside 0 ... classes - 1 are left out.
        boxes: [N, 4].
        sizes: Heights and widths, [N, 2].
        classes: K.

    Returns:
        float64 [K], NaN for a class without images.
    """
    labels, shares = labels.cpu(), box_shares(boxes.cpu(), sizes.cpu())
    known = (labels >= 0) & (labels < classes)
    count = torch.bincount(labels[known], minlength=classes)
    return torch.bincount(labels[known], shares[known], minlength=classes) / count


def held_shares(memory: Memory, classes: int) -> Tensor | None:
    """`class_shares` by the boxes of exemplars; None where these say nothing of objects."""
    if memory.codec.marks != "boxes" or not len(memory):
        return None
    held = memory.examples()
    shares = class_shares(held.labels, held.images.boxes, held.images.sizes, classes)
    low, high = shares.nan_to_num(0.0).aminmax()
    return None if low == high else shares


def size_record(
    shares: Tensor, correct: Mapping[str, Sequence[int]], exemplars: Sequence[int], whose: str
) -> Record | None:
    """Accuracy on the classes of small, middle and large objects (Luo et al. 2023, Table 5).

    As there, the 30 % of classes whose boxes cover most of their images are large, the 30 % with
    the least cover are small, and the rest middle.

    Args:
        shares: `class_shares`, [K].
        correct: ``top1`` and ``count``, a number for each class.
        exemplars: How many are kept of each class.
        whose: Whose boxes these are.

    Returns:
        A record of kind ``table``; None for fewer than 3 classes, or classes without boxes.

    Example:
        >>> correct = {"top1": [1, 2, 3], "count": [4, 4, 4]}
        >>> record = size_record(torch.tensor([0.1, 0.5, 0.3]), correct, [7, 8, 9], "true boxes")
        >>> record.payload["rows"][0], record.payload["rows"][2]
        (['small', 1, '10.0 %', '25.00', '7.0'], ['large', 1, '50.0 %', '50.00', '8.0'])
    """
    classes = len(shares)
    if classes < 3 or bool(shares.isnan().any()):
        return None
    outer = max(1, round(_OUTER * classes))
    groups = shares.argsort(stable=True).split([outer, classes - 2 * outer, outer])
    top1, count = (torch.tensor(correct[name], dtype=torch.float64) for name in ("top1", "count"))
    kept = torch.tensor(exemplars, dtype=torch.float64)
    rows = [
        [
            name,
            len(group),
            f"{100 * shares[group].mean():.1f} %",
            f"{100 * top1[group].sum() / count[group].sum().clamp_min(1):.2f}",
            f"{kept[group].mean():.1f}",
        ]
        for name, group in zip(("small", "middle", "large"), groups, strict=True)
    ]
    columns = ["objects", "classes", "mean share of the image", "accuracy %", "exemplars per class"]
    return Record("table", f"{SIZES}, by {whose}", {"columns": columns, "rows": rows})
