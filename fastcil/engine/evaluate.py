"""How many test images each readout gets right, class by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastcil.contract import Method, evaluating
from fastcil.data import Examples
from fastcil.engine.context import EngineContext

Readout = Callable[[Tensor], Tensor]
"""Images [B, 3, h, w] -> scores [B, K]."""


def count_correct(
    method: Method,
    context: EngineContext,
    examples: Examples,
    classes: int,
    tasks: Sequence[int] | None = None,
    further: Mapping[str, Readout] | None = None,
) -> dict[str, dict[str, list[int]]]:
    """Test images classified correctly, for each readout of a method.

    All readouts are computed from one pass over the images.

    Args:
        method: Put in evaluation mode meanwhile.
        context: Reads the images.
        examples: Test images of known classes, labels in learning order.
        classes: Known classes.
        tasks: New classes of each task so far, ``classes`` in all: the scores of an image are
            compared only among the classes of its own task (task-incremental learning). None:
            among all known classes.
        further: Readouts beside the method's, by name.

    Returns:
        readout -> {"top1": correct per class, "top5": correct per class, "count": images per
        class}; where an image is compared among five classes or fewer it counts as correct in
        top-5.
    """
    readouts = {**method.readouts(), **(further or {})}
    own = None if tasks is None else same_task(tasks).to(context.device)
    with evaluating(method):
        hits = context.scan_labelled(_top5(list(readouts.values()), own), examples, look="centre")
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


def count_ahead(
    method: Method,
    context: EngineContext,
    examples: Examples,
    classes: int,
    tasks: Sequence[int] | None = None,
) -> dict[str, int]:
    """A task's test images classified correctly before the method has trained on the task.

    Judged by `Method.logits`, the classifier that training goes on with: other readouts, such as
    nearest means, know nothing of classes of which nothing was learned.

    Args:
        method: It has made room for the task's classes.
        context: Reads the images.
        examples: Test images of the task, labels in learning order.
        classes: Known classes, the task's among them.
        tasks: As `count_correct` takes them, the new task the last.

    Returns:
        ``correct`` images of ``count``, compared ``among`` so many classes.
    """
    own = None if tasks is None else same_task(tasks).to(context.device)
    with evaluating(method):
        first, _ = context.scan_labelled(_top5([method.logits], own), examples, look="centre")
    among = classes if tasks is None else tasks[-1]
    return {"correct": int(first.sum()), "count": len(examples), "among": among}


def same_task(tasks: Sequence[int]) -> Tensor:
    """Which classes arrived together, bool [K, K].

    Args:
        tasks: New classes of each task, K in all.

    Example:
        >>> same_task([1, 0, 2]).int().tolist()
        [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    """
    task = torch.arange(len(tasks)).repeat_interleave(torch.tensor(tasks))  # [K]
    return task[:, None] == task


def _top5(
    readouts: list[Readout], own: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """For each readout, whether the label is first and among the first five."""

    def judge(images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        columns: list[Tensor] = []
        for readout in readouts:
            scores = readout(images)  # [B, K]
            if own is None:
                best = scores.topk(min(5, scores.shape[1]), dim=1).indices
            else:
                best = _rank_within(scores, own[labels])[:, :5]
            right = best == labels[:, None]
            columns += [right[:, 0], right.any(1)]
        return tuple(columns)

    return judge


def _rank_within(scores: Tensor, own: Tensor) -> Tensor:
    """Classes by descending score, the image's own ones before all others, int64 [B, K].

    Masking the others' scores would not do: a class of which no exemplar is kept may score -inf
    itself.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    others_last = (~own.gather(1, order)).int().argsort(dim=1, stable=True)
    return order.gather(1, others_last)
