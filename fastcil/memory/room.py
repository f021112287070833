"""How much will fit, asked before a task is learned."""

from __future__ import annotations

import warnings

from fastcil.contract import Task
from fastcil.data import ImageStore
from fastcil.memory.budget import Budget
from fastcil.memory.memory import Memory

# Beside the pixels of a raw image: offset, geometry row and label.
_ROW_NBYTES = 28


def likely_room(memory: Memory, task: Task, beside: int = 0, other_nbytes: int = 0) -> int:
    """How many images memory can hold once a task is done, by what they cost on average.

    An image of the task is taken to be compressed as much as the exemplars are, and not at all
    while there are none. Memory itself keeps to its budget whatever this says.

    Args:
        memory: What is held now.
        task: The new data, and how many classes are known with it.
        beside: Bytes that come with each image and count towards a budget in bytes.
        other_nbytes: Bytes of everything else that counts.

    Returns:
        At most as many as there are: exemplars and new images.

    Warns:
        UserWarning: Not even one fits into a budget that is not zero.

    Example:
        >>> import torch
        >>> from fastcil.data import Examples
        >>> store = ImageStore.from_batch(torch.zeros(9, 8, 8, 3, dtype=torch.uint8))
        >>> new = Examples(store, torch.zeros(9, dtype=torch.int64))
        >>> task = Task(index=0, classes=(0,), known=0, examples=new, exemplars=new.select([]))
        >>> memory = Memory("1000B")  # an image costs 8 * 8 * 3 + 28
        >>> likely_room(memory, task), likely_room(memory, task, beside=40)
        (4, 3)
    """
    budget, there = memory.budget, len(memory) + len(task.examples)
    if memory.keeps != "exemplars" or budget.amount == 0 or there == 0:
        return 0
    in_bytes = budget.unit == "bytes"

    def raw(images: ImageStore) -> float:
        """What images cost in all if none is compressed."""
        pixels = images.sizes.double().prod(dim=1)
        return float((3 * pixels + _ROW_NBYTES).sum()) if in_bytes else float(len(images))

    held = float(memory.nbytes) if in_bytes else memory.units
    share = held / raw(memory.examples().images) if len(memory) else 1.0
    mean = (held + share * raw(task.examples.images)) / there + (beside if in_bytes else 0)
    left = budget.limit(task.total) - (other_nbytes if in_bytes else 0)
    if left >= mean * there:
        return there
    if left < mean:
        warnings.warn(
            f"memory is '{budget}', which has no room for an image and what is kept beside it; "
            f"'{budget.smallest(mean, 1, other_nbytes)}' would hold one.",
            stacklevel=2,
        )
    return max(0, int(left / mean + 1e-9))


def allowance(budget: Budget, task: Task) -> float:
    """Bytes that all that is kept may take once a task is done.

    Args:
        budget: Of what is kept.
        task: The new data, and how many classes are known with it.

    Returns:
        The budget's limit; one in images is worth as many raw images of the mean size of the
        task's, offset, geometry row and label included.

    Example:
        >>> import torch
        >>> from fastcil.data import Examples
        >>> store = ImageStore.from_batch(torch.zeros(9, 8, 8, 3, dtype=torch.uint8))
        >>> new = Examples(store, torch.zeros(9, dtype=torch.int64))
        >>> task = Task(index=0, classes=(0,), known=0, examples=new, exemplars=new.select([]))
        >>> allowance(Budget.parse("10 images"), task)  # 10 * (8 * 8 * 3 + 28)
        2200.0
    """
    limit = budget.limit(task.total)
    if budget.unit == "bytes" or not len(task.examples):
        return limit
    pixels = task.examples.images.sizes.double().prod(dim=1).mean()
    return limit * (3 * float(pixels) + _ROW_NBYTES)
