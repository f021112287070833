"""The face of all curvatures: measured task by task, kept, made a penalty."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcil.curvature.penalty import Product, half_quadratic

Scan = Callable[[Callable[[Tensor, Tensor], None]], None]
"""Calls a function with images and labels of every batch of a task, once."""

Displacements = Mapping[str, Tensor]
"""Parameters less where they were, by name."""


class Curvature(ABC):
    """A symmetric form on the displacement of a model's parameters, kept over tasks.

    Args:
        model: The network, whose outputs are [N, K].
        names: Parameters it is about.
    """

    # Whether it is of batches rather than samples: batch norms then measure in training mode.
    of_batches = False

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = tuple(names)

    @abstractmethod
    def measure(
        self, scan: Scan, generator: torch.Generator, old: float = 0.0, new: float = 1.0
    ) -> None:
        """Becomes old * H + new * H', as far as its form can hold the sum.

        A diagonal can, for any weights, and so can the classifier of which the output factor is
        the identity. Of Kronecker factors each is averaged by itself (`KroneckerFactors.merge`),
        which is the sum where tasks are alike, and the weights must sum to 1. Eigenvalues are
        summed in the basis of factors averaged so: it becomes the sum's diagonal there.

        Tensors that it was loaded with stay as they are.

        Args:
            scan: Goes through a task's images, once or twice.
            generator: Of draws.
            old: Weight of H, what it holds; with 0 it need hold nothing.
            new: Weight of H', that of the model as it is now on the images of ``scan``.

        Raises:
            FastcilError: Kronecker factors and weights that do not sum to 1.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""

    @abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what another's `tensors` gave."""

    @abstractmethod
    def products(self) -> list[tuple[tuple[str, ...], Product]]:
        """Parameters and the map of their displacement, block by block.

        A block of two parameters is that of a layer: the weight as a matrix, the bias as its last
        column.
        """


class Penalty:
    r"""1/2 <D, H D> of a curvature, D being the displacement from an anchor.

    Args:
        curvature: H; dense matrices are made of it once, here.
    """

    def __init__(self, curvature: Curvature) -> None:
        self._blocks = curvature.products()

    def __call__(self, displacements: Displacements) -> Tensor:
        """The value, of which the gradient costs nothing more (`half_quadratic`).

        Args:
            displacements: Of all parameters that the curvature is about.
        """
        matrices = [_matrix([displacements[n] for n in names]) for names, _ in self._blocks]
        return half_quadratic(matrices, [product for _, product in self._blocks])


def _matrix(parts: Sequence[Tensor]) -> Tensor:
    """A weight with its bias as the last column, [m, n + 1]; a single tensor as it is."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([parts[0].flatten(1), parts[1][:, None]], 1)


def grown(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros behind, up to a shape: of units that came later nothing is known.

    Example:
        >>> grown(torch.ones(2), (3,))
        tensor([1., 1., 0.])
    """
    if tuple(value.shape) == tuple(shape):
        return value
    pad = [side for old, new in zip(value.shape, shape, strict=True) for side in (new - old, 0)]
    return functional.pad(value, pad[::-1])
