"""The nearest mean of exemplars: a classifier made of what memory holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastcil.contract import Method, Retained, Task, evaluating
from fastcil.data import Examples
from fastcil.nn import Network
from fastcil.nn.nearest_mean import class_means, nearest_mean_scores


class NearestMean(nn.Module):
    """Classifies by the nearest class mean of exemplars (Rebuffi et al. 2017, Alg. 1).

    A part of a method, which tells it when a task begins and when memory is updated. Its weights
    are made anew from the exemplars in each task.

    Args:
        flip: Whether mirrored exemplars count too, as in the paper's released CIFAR code.

    Attributes:
        means: Unit-norm means of the classes; none without exemplars.  # [K, D]

    Example:
        >>> nearest = NearestMean()
        >>> nearest.readouts(lambda images: images)
        {}
    """

    means: Tensor

    def __init__(self, flip: bool = False) -> None:
        super().__init__()
        self.flip = flip
        self.register_buffer("means", torch.empty(0, 0))

    def reserve(self, network: Network, classes: int) -> None:
        """Makes room for means as a task begins.

        The budget is applied before the means are taken: their place is counted from then on.

        Args:
            network: Whose features are averaged.
            classes: Classes known once the task is learned.
        """
        head = network.head
        width: int = head.in_features  # type: ignore[assignment]
        self.means = next(head.parameters()).new_zeros(classes, width)

    def take(self, method: Method, task: Task) -> None:
        """Takes the means of the exemplars that memory holds now."""
        self.means = exemplar_means(method, task.exemplars, task.total, self.flip)

    def retained(self) -> Retained:
        """The means."""
        return Retained("class means", "network", {"means": self.means})

    def readouts(
        self, features: Callable[[Tensor], Tensor]
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        """``nme``: images -> minus the squared distance to each mean [B, K], if there are means.

        Args:
            features: Images -> features [B, D].
        """
        if not len(self.means):
            return {}
        return {"nme": lambda images: nearest_mean_scores(features(images), self.means)}


def exemplar_means(method: Method, exemplars: Examples, classes: int, flip: bool) -> Tensor:
    """Unit-norm mean of each class's exemplars, by the method's features in evaluation mode.

    (Rebuffi et al. 2017, Alg. 1; `fastcil.nn.nearest_mean.class_means`.)

    Args:
        method: Whose ``embed`` gives the features; its modes are left as they were.
        exemplars: What memory holds.
        classes: Number of rows K of the result.
        flip: Whether mirrored exemplars count too.

    Returns:
        float32 or better, on the network's device; the row of a class without exemplars is zero,
        and without any exemplar there is no row.  # [K, D], or [0, 0]
    """
    if not len(exemplars):
        return next(method.network.parameters()).new_empty(0, 0)
    with evaluating(method):
        features = [method.context.scan(method.embed, exemplars)]
        if flip:
            features.append(method.context.scan(method.embed, exemplars, flip=True))
    labels = exemplars.labels.repeat(len(features))
    return class_means(torch.cat(features), labels, classes)
