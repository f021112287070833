"""How many test images each readout gets right, class by class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastcil.contract import Method, evaluating
from fastcil.data import Examples
from fastcil.engine.context import EngineContext


def count_correct(
    method: Method, context: EngineContext, examples: Examples, classes: int
) -> dict[str, dict[str, list[int]]]:
    """Test images classified correctly, for each readout of a method.

    All readouts are computed from one pass over the images.

    Args:
        method: Put in evaluation mode meanwhile.
        context: Reads the images.
        examples: Test images of known classes, labels in learning order.
        classes: Known classes.

    Returns:
        readout -> {"top1": correct per class, "top5": correct per class, "count": images per
        class}; with five classes or fewer every image counts as correct in top-5.
    """
    readouts = method.readouts()
    with evaluating(method):
        hits = context.scan_labelled(_top5(list(readouts.values())), examples, look="centre")
    labels = examples.labels.to(context.device)
    count = torch.bincount(labels, minlength=classes).tolist()
    result = {}
    for number, name in enumerate(readouts):
        first, five = hits[2 * number], hits[2 * number + 1]
        result[name] = {
            "top1": torch.bincount(labels[first], minlength=classes).tolist(),
            "top5": torch.bincount(labels[five], minlength=classes).tolist(),
            "count": count,
        }
    return result


def _top5(
    readouts: list[Callable[[Tensor], Tensor]],
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """For each readout, whether the label is first and among the first five."""

    def judge(images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        columns: list[Tensor] = []
        for readout in readouts:
            scores = readout(images)
            best = scores.topk(min(5, scores.shape[1]), dim=1).indices
            right = best == labels[:, None]
            columns += [right[:, 0], right.any(1)]
        return tuple(columns)

    return judge
