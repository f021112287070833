"""The nearest mean of exemplars' logits, among the classes that arrived together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcil.contract import Method, Retained, Task, evaluating
from fastcil.nn import Network, TaskOutputs


class TaskMeans(nn.Module):
    r"""Classifies by the nearest mean of exemplars' logits, each task by its own outputs.

    .. math:: s_y(x) = -\lVert z_{C(y)}(x) - \mu_y \rVert^2, \qquad
        \mu_y = \frac{1}{|P_y|} \sum_{p \in P_y} z_{C(y)}(p)

    with z the logits, C(y) the classes of y's task and P_y the exemplars of y: iCaRL as the
    released code of Lopez-Paz and Ranzato (2017) has it where tasks have heads of their own.
    Scores are comparable within a task. A part of a method, as `fastcil.memory.means.NearestMean`.

    Args:
        outputs: Which outputs each task brought.

    Attributes:
        means: 0 for the outputs of other tasks; a row of zeros for a class without exemplars; none
            without exemplars.  # [K, K]

    Example:
        >>> TaskMeans(TaskOutputs()).readouts(lambda images: images)
        {}
    """

    means: Tensor

    def __init__(self, outputs: TaskOutputs) -> None:
        super().__init__()
        # A tuple hides the method's own part, which would be saved twice.
        self._outputs = (outputs,)
        self.register_buffer("means", torch.empty(0, 0))

    def _own(self, like: Tensor) -> Tensor:
        """Which outputs arrived with each class, bool [K, K]."""
        classes = len(like)
        return self._outputs[0].own(torch.arange(classes, device=like.device), classes)

    def reserve(self, network: Network, classes: int) -> None:
        """Makes room for the means of ``classes`` as a task begins, so that it is counted."""
        self.means = next(network.head.parameters()).new_zeros(classes, classes)

    def take(self, method: Method, task: Task) -> None:
        """Takes the means of the exemplars that memory holds now."""
        if not len(task.exemplars):
            self.means = self.means.new_empty(0, 0)
            return
        with evaluating(method):
            logits = method.context.scan(method.logits, task.exemplars).to(self.means.dtype)
        member = F.one_hot(task.exemplars.labels.to(logits.device), task.total).to(logits)
        counts = member.sum(0)[:, None].clamp(min=1)
        means = member.T @ logits / counts  # [K, K]
        self.means = means.masked_fill(~self._own(means), 0.0)

    def retained(self) -> Retained:
        """The means."""
        return Retained("class means", "network", {"means": self.means})

    def readouts(self, logits: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
        """``nme``: images -> minus the squared distance to each mean [B, K], if there are means.

        Args:
            logits: Images -> logits of all known classes [B, K].
        """
        return {"nme": lambda images: self._scores(logits(images))} if len(self.means) else {}

    def _scores(self, logits: Tensor) -> Tensor:
        """Scores [B, K] of logits [B, K]; -inf for a class without a mean."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits, means = logits.to(wide), self.means.to(wide)
        own = self._own(means).to(wide)
        norms = means.square().sum(1)
        scores = 2 * logits @ means.T - logits.square() @ own.T - norms  # [B, K]
        return scores.masked_fill(norms == 0, -torch.inf)
