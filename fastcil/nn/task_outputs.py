"""Heads of their own for tasks, as slices of one: which outputs arrived together."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcil.nn.heads import LinearHead


def rows_of_others(head: LinearHead, own: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameters of a head, with masks of what belongs to other outputs than ``own`` [K].

    Example:
        >>> head = LinearHead(2, 3)
        >>> [mask.flatten().tolist() for _, mask in rows_of_others(head, torch.arange(3) == 1)]
        [[True, False, True], [True, False, True]]
    """
    rows: list[tuple[nn.Parameter, Tensor]] = [(head.weight, ~own[:, None])]
    return rows if head.bias is None else [*rows, (head.bias, ~own)]


class TaskOutputs(nn.Module):
    """Which of a growing head's outputs each task brought.

    Where the task of an image is known, a softmax is taken over the outputs of that task alone
    (the "multi-head" setting of Lopez-Paz and Ranzato 2017): one linear layer serves, of which
    every image sees a slice. The outputs of other tasks get no gradient from it.

    Args:
        head: ``task`` for that; ``all`` for one softmax over all outputs, whoever brought them.

    Attributes:
        brought: New classes of each task, int64 [T].

    Example:
        >>> outputs = TaskOutputs()
        >>> outputs.add(2), outputs.add(1)
        (None, None)
        >>> outputs.own(torch.tensor([0, 2]), 3).int().tolist()
        [[1, 1, 0], [0, 0, 1]]
    """

    brought: Tensor

    def __init__(self, head: Literal["all", "task"] = "task") -> None:
        super().__init__()
        self.head = head
        self.register_buffer("brought", torch.empty(0, dtype=torch.int64))

    def add(self, classes: int) -> None:
        """Notes that a task brings ``classes`` new ones, 0 for one that brings none."""
        self.brought = torch.cat([self.brought, self.brought.new_tensor([classes])])

    def own(self, labels: Tensor, outputs: int) -> Tensor:
        """Which outputs arrived with each label, bool [B, K].

        Args:
            labels: int64 [B], in learning order.
            outputs: Their number K.
        """
        ends = self.brought.cumsum(0).to(labels.device)  # [T]
        every = torch.arange(outputs, device=labels.device)
        task = torch.bucketize(every, ends, right=True)  # [K]
        return task == torch.bucketize(labels, ends, right=True)[:, None]

    def masked(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, K], -inf for the outputs that an image's label is not compared with."""
        if self.head == "all":
            return logits
        return logits.masked_fill(~self.own(labels, logits.shape[1]), -torch.inf)

    def cross_entropy(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        r"""Cross-entropy over the outputs that each label is compared with.

        .. math:: L = -\log \frac{e^{z_y}}{\sum_{c \in C(y)} e^{z_c}}

        with C(y) the classes of y's task (Lopez-Paz and Ranzato 2017, Sec. 5), or all of them.

        Args:
            logits: Of all outputs.  # [B, K]
            labels: int64.  # [B]
            reduction: ``mean``, or ``none``.

        Returns:
            The mean over the batch, or the terms [B].
        """
        return functional.cross_entropy(self.masked(logits, labels), labels, reduction=reduction)
