"""What a memory's codec keeps beside exemplars, and whether it and they fit."""

from __future__ import annotations

from fastcil.contract import Retained
from fastcil.data import ImageStore
from fastcil.memory.limits import check_others
from fastcil.memory.memory import Memory


def codec_overhead(memory: Memory) -> list[Retained]:
    """What the codec of a memory that holds exemplars keeps to read them.

    Example:
        >>> codec_overhead(Memory("8 images", codec="jpeg"))
        []
    """
    return memory.codec.retained() if memory.keeps == "exemplars" and memory.budget.amount else []


def check_codec(memory: Memory, images: ImageStore, classes: int | None = None) -> None:
    """Makes sure, before any training, that memory can encode these images and read them again.

    Args:
        memory: What will keep some of them.
        images: The new data.
        classes: Classes that will be known; None where that isn't known yet, nor then what a
            growing budget comes to.

    Raises:
        FastcilError: The codec can't encode them, or needs more than the budget to read them.
    """
    if memory.keeps != "exemplars" or not memory.budget.amount:
        return
    memory.codec.check(images)
    if classes is not None or not memory.budget.growing:
        counted = [e.nbytes for e in codec_overhead(memory) if memory.budget.counts(e.kind)]
        check_others(memory.budget, classes or 1, sum(counted))
