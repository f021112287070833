"""A classifier by energies: one function of features and label, and an embedding for each label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.nn.heads import check_grows, check_sizes, fresh_entries
from fastcil.nn.unit import unit_vectors

Gate = Literal["softmax", "normalised"]
"""How a label's embedding gates hidden units."""

GATES: tuple[Gate, ...] = ("softmax", "normalised")


class EnergyHead(nn.Module):
    r"""Energies E(x, y) of features f and labels y (Li et al. 2020), to which labels can be added.

    With H hidden units, h = V f + c, an embedding :math:`e_y` for each label, and weights w that
    all labels share,

    .. math:: -E(x, y) = \sum_d w_d \, g_{yd} \, h_d, \quad
        g_y = H \, \mathrm{softmax}(e_y) \qquad \text{or} \qquad
        -E(x, y) = \sum_d w_d \, \mathrm{relu}(h_d + g_{yd} h_d), \quad
        g_y = e_y / \lVert e_y \rVert

    (``gate`` "softmax": the released network for CIFAR-10; "normalised": that for MNIST). What the
    head gives is -E: the label of least energy has the highest score. Entries of a unit vector are
    at least -1, so that the second form is :math:`\sum_d w_d (1 + g_{yd}) \, \mathrm{relu}(h_d)`:
    both are one matrix product over all labels. The released last layer has a bias, the same for
    all labels; no comparison of energies sees it, and it is left out.

    V, c and w start as in ``nn.Linear``, embeddings standard normal as in ``nn.Embedding``, drawn
    from torch's global generator.

    Args:
        in_features: Length D of a feature vector.
        classes: Number K of labels.
        gate: ``softmax`` or ``normalised``.
        width: Hidden units H; 0 for D of them.

    Attributes:
        hidden: V.  # [H, D]
        offset: c.  # [H]
        embedding: The rows e_y.  # [K, H]
        readout: w.  # [H]

    Raises:
        FastcilError: If a size is below 1 or the gate is unknown.

    Example:
        >>> head = EnergyHead(8, classes=5)
        >>> head.grow(7)
        >>> head(torch.ones(2, 8)).shape
        torch.Size([2, 7])
    """

    kind = "energy"

    def __init__(
        self, in_features: int, classes: int, gate: Gate = "softmax", width: int = 0
    ) -> None:
        super().__init__()
        width = width or in_features
        check_sizes(in_features=in_features, classes=classes, width=width)
        if gate not in GATES:
            raise FastcilError(f"gate is {gate!r}; it must be one of {', '.join(GATES)}.")
        self.gate = gate
        like = torch.empty(0)
        self.hidden = nn.Parameter(fresh_entries((width, in_features), in_features).to(like))
        self.offset = nn.Parameter(fresh_entries((width,), in_features).to(like))
        self.embedding = nn.Parameter(_fresh_embeddings(classes, width).to(like))
        self.readout = nn.Parameter(fresh_entries((width,), width).to(like))

    @property
    def in_features(self) -> int:
        """Length of a feature vector."""
        return self.hidden.shape[1]

    @property
    def classes(self) -> int:
        """Number of labels."""
        return self.embedding.shape[0]

    @property
    def width(self) -> int:
        """Number of hidden units."""
        return self.embedding.shape[1]

    def rows(self) -> Tensor:
        """What each label makes of the hidden units: w times its gate, [K, H]."""
        if self.gate == "softmax":
            return self.readout * (self.width * self.embedding.softmax(1))
        return self.readout * (1 + unit_vectors(self.embedding))

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] -> minus the energy of every label, [B, K]."""
        units = functional.linear(features, self.hidden, self.offset)  # [B, H]
        if self.gate == "normalised":
            units = units.relu()
        return functional.linear(units, self.rows())

    def cam_weights(self, labels: Tensor) -> Tensor:
        """V^T (w g_y) of each label, [B] -> [B, D]: how features add up to its score, but for c.

        Raises:
            FastcilError: The gate is ``normalised``, whose ReLU follows the sum over features.
        """
        if self.gate != "softmax":
            raise FastcilError(
                "gate is 'normalised', whose hidden units are cut by a ReLU, so that no vector "
                "says how features add up to an energy; take gate 'softmax' for activation maps."
            )
        return self.rows()[labels] @ self.hidden

    def grow(self, classes: int) -> None:
        """Adds labels, in place: what is known keeps its embedding, new ones are drawn.

        The Parameter of the embeddings is a new object, so an optimiser that held the old one must
        be made again.

        Args:
            classes: Number of labels afterwards.

        Raises:
            FastcilError: If there would be fewer labels than now.
        """
        check_grows("classes", self.classes, classes)
        fresh = _fresh_embeddings(classes - self.classes, self.width).to(self.embedding)
        self.embedding = nn.Parameter(
            torch.cat([self.embedding.detach(), fresh]), requires_grad=self.embedding.requires_grad
        )

    def structure(self) -> dict[str, Any]:
        """What ``build_head`` needs to make a head of the same shape; JSON-able."""
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "classes": self.classes,
            "gate": self.gate,
            "width": self.width,
        }

    @classmethod
    def build(cls, structure: Mapping[str, Any]) -> EnergyHead:
        """A head of that structure with arbitrary weights, to be loaded."""
        names = ("in_features", "classes", "gate", "width")
        return cls(*(structure[name] for name in names))

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.in_features}, {self.classes}, gate={self.gate}, width={self.width}"


def _fresh_embeddings(classes: int, width: int) -> Tensor:
    """Standard normal rows, on the CPU: a seed means the same on every device."""
    return torch.empty(classes, width, device="cpu").normal_()
