"""What arrives together: the classes and data of one task, as a method sees them."""

from __future__ import annotations

from dataclasses import dataclass

from fastcil.data import Examples


@dataclass(frozen=True)
class Task:
    """The classes and the data that arrive together, beside what memory kept of earlier ones.

    Labels are positions in learning order: the first class ever learned is 0, and a class keeps
    its label for good. A class-incremental task brings labels ``known .. total - 1``; a
    data-incremental one brings labels that are already known and leaves ``total == known``.

    Args:
        index: Number of the task, from 0.
        classes: Labels that occur in ``examples``, ascending.
        known: Classes learned before this task.
        examples: The new training data.
        exemplars: What memory holds of earlier tasks, readable as images; empty in the first.
        name: What a progress line calls the task.
        room: How many images memory is likely to hold once the task is done, for a method that
            chooses its exemplars itself (``selection = "own"``); no more than there are images.
        allowance: Bytes that all that is kept may take once the task is done, for a method that
            keeps something else than exemplars; a budget in images allows what as many raw images
            of the task's mean size take.
        online: Whether every stage that trains on ``examples`` passes over them once.
        few_shot: Whether this is a session of a few-shot stream after its base session, so that
            ``examples`` holds a few images ("shots") of each class.

    Example:
        >>> import numpy as np, torch
        >>> from fastcil.data import Examples, ImageStore
        >>> store = ImageStore.from_batch(np.zeros((4, 8, 8, 3), dtype=np.uint8))
        >>> new = Examples(store, torch.tensor([2, 2, 3, 3]))
        >>> task = Task(index=1, classes=(2, 3), known=2, examples=new, exemplars=new.select([]))
        >>> task.total, task.new_classes, task.first
        (4, (2, 3), False)
    """

    index: int
    classes: tuple[int, ...]
    known: int
    examples: Examples
    exemplars: Examples
    name: str = ""
    room: int = 0
    allowance: float = 0.0
    online: bool = False
    few_shot: bool = False

    @property
    def total(self) -> int:
        """Classes known once this task is learned."""
        return max(self.known, max(self.classes, default=-1) + 1)

    @property
    def new_classes(self) -> tuple[int, ...]:
        """Labels never seen before this task."""
        return tuple(range(self.known, self.total))

    @property
    def first(self) -> bool:
        """Whether nothing was learned before."""
        return self.known == 0
