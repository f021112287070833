"""Online learning: stages that read a task's new images once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastcil.contract import Stage, Stream, Task


def see_once(stages: Sequence[Stage], task: Task) -> None:
    """Lets every stage that trains on a task's new images pass over them once.

    A stage trains on new images if the stream that sets the length of its epochs takes some of
    ``task.examples``, alone or together with exemplars. It keeps its optimiser and its peak
    learning rate for a single epoch, without warm-up, in the loader's shuffle; companions that
    read new images take no more steps than one pass over them has. Stages on exemplars alone stay
    as they are: what memory holds may be seen again. So do those that stand behind the stream
    (`Stage.behind`). A method of several such stages, such as a
    warm-up before the training proper, passes once in each.

    Nothing is done unless ``task.online``.

    Args:
        stages: Changed in place.
        task: The task that they train.
    """
    for stage in stages if task.online else ():
        for part in (stage, *stage.companions):
            lead = leading(part)
            if lead is not None and not stage.behind and _takes_new(lead, task):
                part.recipe = replace(part.recipe, epochs=min(1, part.recipe.epochs), warmup=0)
                part.steps = min(part.steps, lead.steps)


def leading(stage: Stage) -> Stream | None:
    """The stream that sets the length of an epoch: the first that has any image."""
    return next((stream for stream in stage.streams if len(stream)), None)


def taken(stream: Stream) -> Tensor:
    """Images that a stream takes of each of its parts, int64; all where it is asked anew.

    Example:
        >>> from fastcil.data import Examples, ImageStore
        >>> store = ImageStore.from_batch(torch.zeros(3, 4, 4, 3, dtype=torch.uint8))
        >>> some = Examples(store, torch.tensor([0, 1, 1]))
        >>> taken(Stream((some, some), 2, subset=torch.tensor([1, 3, 4, 5])))
        tensor([1, 3])
    """
    lengths = torch.tensor([len(part) for part in stream.parts])
    if not isinstance(stream.subset, Tensor):
        return lengths
    part = torch.bucketize(stream.subset.cpu(), lengths.cumsum(0), right=True)
    return torch.bincount(part, minlength=len(lengths))


def _takes_new(stream: Stream, task: Task) -> bool:
    """Whether some of the images are the task's new ones."""
    pairs = zip(stream.parts, taken(stream).tolist(), strict=True)
    return any(count and part is task.examples for part, count in pairs)
