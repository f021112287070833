"""Classifiers on top of features; they grow as classes come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.nn.unit import unit_vectors

_DEVIATION = 0.001  # of a normalised head's fresh weights


def fresh_entries(shape: tuple[int, ...], in_features: int) -> Tensor:
    """Entries as ``nn.Linear`` draws them, on the CPU: a seed means the same on every device.

    Args:
        shape: Of the tensor.
        in_features: Length D of a feature vector; entries are uniform in ±1/sqrt(D).

    Example:
        >>> fresh_entries((3, 4), in_features=4).abs().max() <= 0.5
        tensor(True)
    """
    bound = 1 / math.sqrt(in_features)
    return torch.empty(shape, device="cpu").uniform_(-bound, bound)


def check_sizes(**sizes: int) -> None:
    """Raises unless every size of a head is at least 1.

    Example:
        >>> check_sizes(in_features=8, classes=5)
    """
    for name, value in sizes.items():
        if value < 1:
            raise FastcilError(f"{name} is {value}; a head needs at least 1.")


def check_grows(name: str, before: int, after: int) -> None:
    """Raises if a head would lose classes or features.

    Example:
        >>> check_grows("classes", 5, 7)
    """
    if after < before:
        raise FastcilError(f"{name} is {after}; a head of {before} can only grow.")


class LinearHead(nn.Module):
    """A linear classifier, logits = W f + b, to which classes and features can be added.

    Weights and biases start uniform in ±1/sqrt(in_features), drawn from torch's global generator.

    With ``normalised`` it is the classifier of Tao et al. (2020, TOPIC), as their code has it:
    logits = W f / ||f||, without a bias, and with weights that start normal with mean 0 and
    deviation 0.001.

    Args:
        in_features: Length D of a feature vector.
        classes: Number K of classes.
        bias: Whether there is a bias; never with ``normalised``.
        normalised: Whether feature vectors, and they alone, are brought to unit length first.

    Attributes:
        weight: W.  # [K, D]
        bias: b, or None.  # [K]

    Raises:
        FastcilError: If a size is below 1.

    Example:
        >>> head = LinearHead(8, classes=5)
        >>> head.grow(7)
        >>> head(torch.zeros(2, 8)).shape
        torch.Size([2, 7])
    """

    kind = "linear"
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, classes: int, bias: bool = True, normalised: bool = False
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, classes=classes)
        self.normalised = normalised
        bias = bias and not normalised
        like = torch.empty(0)
        self.weight = nn.Parameter(self._fresh_rows(classes, in_features).to(like))
        offset = nn.Parameter(fresh_entries((classes,), in_features).to(like)) if bias else None
        self.register_parameter("bias", offset)

    @property
    def in_features(self) -> int:
        """Length of a feature vector."""
        return self.weight.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.weight.shape[0]

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] -> logits [B, K]."""
        if self.normalised:
            features = unit_vectors(features).to(features.dtype)
        return functional.linear(features, self.weight, self.bias)

    def cam_weights(self, labels: Tensor) -> Tensor:
        """The row of W of each label, [B] -> [B, D]: how features add up to its class.

        A normalised head divides what they add up to by one number for each image.
        """
        return self.weight[labels]

    def grow(self, classes: int, in_features: int | None = None) -> None:
        """Adds classes, and features after the ones there are, in place.

        What is known keeps its entries; new ones start as in a new head. The Parameters are new
        objects, so an optimiser that held the old ones must be made again.

        Args:
            classes: Number of classes afterwards.
            in_features: Length of a feature vector afterwards; None leaves it.

        Raises:
            FastcilError: If there would be fewer classes or features than now.
        """
        wide = self.in_features if in_features is None else in_features
        check_grows("classes", self.classes, classes)
        check_grows("in_features", self.in_features, wide)
        weight = self._fresh_rows(classes, wide).to(self.weight)
        weight[: self.classes, : self.in_features] = self.weight.detach()
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            bias = fresh_entries((classes,), wide).to(self.bias)
            bias[: len(self.bias)] = self.bias.detach()
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)

    def _fresh_rows(self, classes: int, in_features: int) -> Tensor:
        """Rows of W as they start."""  # [K, D]
        if self.normalised:
            return torch.empty(classes, in_features, device="cpu").normal_(0.0, _DEVIATION)
        return fresh_entries((classes, in_features), in_features)

    def structure(self) -> dict[str, Any]:
        """What ``build_head`` needs to make a head of the same shape; JSON-able."""
        kind = {"normalised": True} if self.normalised else {}
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "classes": self.classes,
            "bias": self.bias is not None,
            **kind,
        }

    @classmethod
    def build(cls, structure: Mapping[str, Any]) -> LinearHead:
        """A head of that structure with arbitrary weights, to be loaded."""
        sizes = structure["in_features"], structure["classes"]
        return cls(*sizes, structure["bias"], structure.get("normalised", False))

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        kind = ", normalised=True" if self.normalised else ""
        return f"{self.in_features}, {self.classes}, bias={self.bias is not None}{kind}"


def aligning_factor(weight: Tensor, known: int) -> Tensor:
    """Mean length of the first rows over that of the others (Zhao et al. 2020, weight aligning).

    Args:
        weight: A head's rows.  # [K, D]
        known: How many of them are of old classes.

    Returns:
        gamma; 1 if the rows of the new classes are all zero.  # []

    Example:
        >>> aligning_factor(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), known=1)
        tensor(2.5000)
    """
    lengths = weight.norm(dim=1)  # [K]
    old, new = lengths[:known].mean(), lengths[known:].mean()
    return torch.where(new > 0, old / new, torch.ones_like(old))
