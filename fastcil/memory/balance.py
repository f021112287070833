"""Subsets in which every class is as frequent as any other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastcil.contract import Method, Stream, Task, evaluating
from fastcil.data import Examples
from fastcil.data.ranks import rank_in_class
from fastcil.memory.selection import herding


def balanced_subset(labels: Tensor, seed: int) -> Tensor:
    """Positions of a random subset in which all classes are as frequent as the rarest.

    Args:
        labels: int64 [N], on the CPU; classes that do not occur don't count.
        seed: Of the generator that draws it.

    Returns:
        int64 [k * number of classes], ascending, k being the size of the smallest class.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
        >>> labels[balanced_subset(labels, seed=1)]
        tensor([0, 0, 1, 1, 2, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)  # [N]
    counts = labels.bincount()
    smallest = counts[counts > 0].min() if len(labels) else 0
    return shuffled[rank_in_class(labels[shuffled]) < smallest].sort().values


def drawn_subset(task: Task, per_class: int = 0) -> Tensor:
    """Positions of all exemplars and of some new images of each class, drawn by chance.

    Args:
        task: Its classes' images, and what memory holds, at least one exemplar.
        per_class: Images of each new class, all if it has no more; 0: as many as the old class
            with the most exemplars has.

    Returns:
        int64 [n] on the CPU, ascending, positions in ``task.examples`` followed by
        ``task.exemplars``; the same ones for a task of the same index.

    Example:
        >>> from fastcil.data import ImageStore
        >>> store = ImageStore.from_batch(torch.zeros(4, 8, 8, 3, dtype=torch.uint8))
        >>> new = Examples(store, torch.tensor([1, 1, 2, 2]))
        >>> old = Examples(store.select([0]), torch.tensor([0]))
        >>> task = Task(index=1, classes=(1, 2), known=1, examples=new, exemplars=old)
        >>> drawn_subset(task), len(drawn_subset(task, per_class=2))
        (tensor([1, 3, 4]), 5)
    """
    labels, held = task.examples.labels.cpu(), task.exemplars.labels.cpu()
    wanted = per_class or int(held.bincount().max())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(task.index))
    chosen = order[rank_in_class(labels[order]) < wanted]
    kept = torch.arange(len(labels), len(labels) + len(held))
    return torch.cat([chosen, kept]).sort().values


def herded_subset(task: Task, embed: Callable[[Examples], Tensor]) -> Tensor:
    """Positions of all exemplars and of as many new images per class, the first that herding picks.

    What a network is finetuned on once it has learned a task, all classes being equally frequent
    (Castro et al. 2018, Sec. 3.3). A new class gets as many images as the old class with the most
    exemplars has; all, if it has no more, and in the first task.

    Args:
        task: Its classes' images, and what memory holds.
        embed: Features [N, D] of some of its examples, by which herding picks; one class a call.

    Returns:
        int64 [n] on the CPU, ascending, positions in ``task.examples`` followed by
        ``task.exemplars``.

    Example:
        >>> from fastcil.data import ImageStore
        >>> store = ImageStore.from_batch(torch.zeros(4, 8, 8, 3, dtype=torch.uint8))
        >>> new = Examples(store, torch.tensor([1, 1, 2, 2]))
        >>> old = Examples(store.select([0]), torch.tensor([0]))
        >>> task = Task(index=1, classes=(1, 2), known=1, examples=new, exemplars=old)
        >>> herded_subset(task, lambda examples: torch.ones(len(examples), 3))
        tensor([0, 2, 4])
    """
    held = task.exemplars.labels.cpu()
    most = int(held.bincount().max()) if len(held) else len(task.examples)
    labels = task.examples.labels.cpu()
    chosen = [torch.arange(len(labels), len(labels) + len(held))]
    for label in task.classes:
        mine = (labels == label).nonzero().flatten()
        if len(mine) > most:
            images = task.examples.select(mine.to(task.examples.labels.device))
            mine = mine[herding(embed(images), most).cpu()]
        chosen.append(mine)
    return torch.cat(chosen).sort().values


class BalancedSet(nn.Module):
    """What a method finetunes on once it has learned a task: `herded_subset`, by its features.

    A part of the method, whose saved state it belongs to: a run that stops in the middle of the
    finetuning goes on with the same images.

    Attributes:
        positions: In ``task.examples`` followed by ``task.exemplars``; none between tasks.
            # int64 [n]

    Example:
        >>> len(BalancedSet().positions)
        0
    """

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.empty(0, dtype=torch.int64))

    def choose(self, method: Method, task: Task) -> None:
        """Chooses by the features that the method has now, in evaluation mode."""
        with evaluating(method):
            chosen = herded_subset(task, lambda new: method.context.scan(method.embed, new))
        self.positions = chosen.to(self.positions.device)

    def stream(self, task: Task, batch_size: int) -> Stream:
        """The stream of a stage whose ``begin`` chooses."""
        everything = (task.examples, task.exemplars)
        return Stream(everything, batch_size, subset=lambda: self.positions.cpu())

    def forget(self) -> None:
        """Lets the choice go."""
        self.positions = self.positions.new_empty(0)
