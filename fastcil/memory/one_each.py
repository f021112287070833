"""An exemplar of each class, drawn anew in every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastcil.contract import Stream, Task
from fastcil.data.ranks import rank_in_class


class OneEach(nn.Module):
    """Draws one exemplar of each class, uniformly, as often as it is told to go on.

    A part of a method, which tells it when a task begins and when a step is done. It is kept on
    the host whatever device its method is on: the loader asks it between steps.

    Attributes:
        state: Seeds the draw of the moment, int64 [].

    Example:
        >>> draw = OneEach()
        >>> draw.pool(torch.tensor([0, 0, 1, 1, 1]), first=10).shape
        torch.Size([2])
    """

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Stays where it is: on the host."""
        return self

    def begin(self) -> None:
        """Starts a task, from torch's global generator."""
        self.state = torch.randint(2**48, ())

    def go_on(self) -> None:
        """Ends a step: the next draw is another."""
        self.state = self.state + 1

    def pool(self, labels: Tensor, first: int) -> Tensor:
        """The exemplars drawn now, the same ones until `go_on`.

        Args:
            labels: Of all exemplars, int64 [M], on the CPU.
            first: Position of the first exemplar.

        Returns:
            int64, one position for each label that occurs.
        """
        generator = torch.Generator().manual_seed(int(self.state))
        order = torch.randperm(len(labels), generator=generator)
        return first + order[rank_in_class(labels[order]) == 0]

    def stream(self, task: Task) -> Stream:
        """The stream of a task's exemplars, part 1 in every batch; they may not be none."""
        labels = task.exemplars.labels.cpu()
        return Stream(
            (task.examples, task.exemplars),
            batch_size=len(labels.unique()),
            subset=partial(self.pool, labels, len(task.examples)),
        )
