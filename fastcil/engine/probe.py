"""How well a method's features tell classes apart, whatever its classifier makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastcil.contract import Method, evaluating
from fastcil.data import Examples
from fastcil.engine.context import EngineContext
from fastcil.engine.evaluate import Readout
from fastcil.errors import FastcilError

KNN = "knn"
_CHUNK = 16384


class NearestNeighbours:
    """Votes of the k training images whose features are most similar, by their cosine.

    The score of a class is its number of votes; of classes with as many votes, also with none,
    the one that has the more similar training image comes first.

    Args:
        features: Of the training images.  # [N, D]
        labels: Their classes, from 0 on.  # int64 [N]
        k: How many vote; all where there are fewer.
        tasks: New classes of each task. The classes of a task vote among themselves, on k images
            of theirs, as when the task is known; a single number stands for all classes.
        chunk: Training images compared at a time.

    Raises:
        FastcilError: k below 1.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.1, 1.0]])
        >>> nearest = NearestNeighbours(features, torch.tensor([0, 1, 1]), k=3, tasks=[2])
        >>> nearest(torch.tensor([[5.0, 1.0], [0.0, 1.0]])).argmax(1)
        tensor([1, 1])
    """

    def __init__(
        self, features: Tensor, labels: Tensor, k: int, tasks: Sequence[int], chunk: int = _CHUNK
    ) -> None:
        if k < 1:
            raise FastcilError(f"k is {k}; at least 1 neighbour must vote.")
        self.k, self.chunk, self.classes = k, chunk, sum(tasks)
        task = torch.arange(len(tasks)).repeat_interleave(torch.tensor(tasks)).to(labels.device)
        order = task[labels].argsort(stable=True)
        sizes = torch.bincount(task[labels], minlength=len(tasks)).tolist()
        directions = functional.normalize(features[order], dim=1)
        self._groups = list(zip(directions.split(sizes), labels[order].split(sizes), strict=True))

    def __call__(self, features: Tensor) -> Tensor:
        """Features [B, D] -> scores float64 [B, K], the whole part of which are votes."""
        directions = functional.normalize(features, dim=1)
        votes = torch.zeros(len(features), self.classes, device=features.device)
        closest = torch.full_like(votes, -1.0)
        for group, labels in self._groups:
            best = features.new_empty(len(features), 0)
            voters = labels.new_empty(len(features), 0)
            for others, classes in zip(
                group.split(self.chunk), labels.split(self.chunk), strict=True
            ):
                similar = directions @ others.T  # [B, chunk]
                whose = classes.expand(len(features), -1)
                closest.scatter_reduce_(1, whose, similar.float(), "amax")
                near = similar.topk(min(self.k, len(others)), dim=1)
                best = torch.cat([best, near.values], 1)
                voters = torch.cat([voters, classes[near.indices]], 1)
                best, kept = best.topk(min(self.k, best.shape[1]), dim=1)
                voters = voters.gather(1, kept)
            votes.scatter_add_(1, voters, torch.ones_like(voters, dtype=votes.dtype))
        # A similarity from -1 to 1 settles what votes leave open, and no more.
        return votes.double() + (closest.double() + 1) / 4


def probes(
    method: Method,
    context: EngineContext,
    examples: Callable[[], Examples],
    tasks: Sequence[int],
    k: int,
) -> dict[str, Readout]:
    """The k-nearest-neighbour readout of a method's features (Shon et al. 2022, Sec. 4.3, Fig. 6).

    A test image is compared with the features (`fastcil.contract.Method.embed`) that the method
    now gives all training images of the classes known, also those that a data-incremental stream
    still has to bring: "all training samples were used", so that the curve is of the features
    alone. The paper tells neither k nor how features are compared; here by their cosine.

    Args:
        method: Put in evaluation mode meanwhile.
        context: Reads the images.
        examples: Gives the training images, labels in learning order; not asked without a probe.
        tasks: New classes of each task; those of one are compared with each other alone.
        k: Neighbours; 0 for no probe.

    Returns:
        ``knn`` -> the readout; nothing if k is 0.
    """
    if not k:
        return {}
    known = examples()
    with evaluating(method):
        features = context.scan(method.embed, known)
    nearest = NearestNeighbours(features, known.labels.to(features.device), k, tasks)
    return {KNN: lambda images: nearest(method.embed(images))}
