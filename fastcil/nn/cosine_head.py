"""A classifier by cosines, whose rows of known classes can be held while new ones train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.nn.heads import check_grows, check_sizes, fresh_entries
from fastcil.nn.unit import unit_vectors


class CosineHead(nn.Module):
    r"""A classifier by cosines, to which classes can be added.

    .. math:: z_k = \sigma \, \langle w_k / \lVert w_k \rVert, \; f / \lVert f \rVert \rangle

    (Hou et al. 2019, LUCIR, Eq. 4, there :math:`\eta`), with one learnable scale sigma that starts
    at 1. The rows are in two blocks: those of the classes known before the last ``grow`` and those
    that it added. A method that holds what is known trains ``new`` and ``sigma`` and leaves out
    ``old``: not even weight decay moves it then. Rows start uniform in ±1/sqrt(in_features), drawn
    from torch's global generator.

    Args:
        in_features: Length D of a feature vector.
        classes: Number K of classes.

    Attributes:
        old: Rows of the classes known before; none in a new head.  # [K_o, D]
        new: Rows of the others.  # [K - K_o, D]
        sigma: The scale.  # []

    Raises:
        FastcilError: If a size is below 1.

    Example:
        >>> head = CosineHead(8, classes=5)
        >>> head.grow(7)
        >>> head(torch.ones(2, 8)).shape, tuple(head.old.shape), tuple(head.new.shape)
        (torch.Size([2, 7]), (5, 8), (2, 8))
    """

    kind = "cosine"

    def __init__(self, in_features: int, classes: int) -> None:
        super().__init__()
        check_sizes(in_features=in_features, classes=classes)
        like = torch.empty(0)
        self.old = nn.Parameter(like.new_empty(0, in_features))
        self.new = nn.Parameter(fresh_entries((classes, in_features), in_features).to(like))
        self.sigma = nn.Parameter(like.new_ones(()))

    @property
    def in_features(self) -> int:
        """Length of a feature vector."""
        return self.new.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.old) + len(self.new)

    @property
    def weight(self) -> Tensor:
        """The rows of both blocks, [K, D]."""
        return torch.cat([self.old, self.new])

    def cosines(self, features: Tensor) -> Tensor:
        """Cosines of features with the rows, without the scale.

        Args:
            features: f.  # [B, D]

        Returns:
            Between -1 and 1, float32 or better outside autocast; 0 for a vector of zeros.  # [B, K]
        """
        return functional.linear(unit_vectors(features), unit_vectors(self.weight))

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] -> logits [B, K]."""
        return self.sigma * self.cosines(features)

    def cam_weights(self, labels: Tensor) -> Tensor:
        """The unit row w/‖w‖ of each label, [B] -> [B, D]: how features add up to its class.

        The map A = <w/‖w‖, F(p)> over positions p has ‖f‖ cos(w, f) as its mean, f being the mean
        of F: a class speaks through the direction of its row alone, and the remaining factor
        sigma/‖f‖ is one for all positions of an image, so that scaling A to [0, 1] removes it.
        """
        return unit_vectors(self.weight[labels])

    def grow(self, classes: int) -> None:
        """Adds classes, in place, and makes ``old`` of all rows there were.

        The Parameters of the rows are new objects, so an optimiser that held the old ones must be
        made again; sigma stays.

        Args:
            classes: Number of classes afterwards; as many as now, and ``new`` has no rows.

        Raises:
            FastcilError: If there would be fewer classes than now.
        """
        check_grows("classes", self.classes, classes)
        wide, trains = self.in_features, self.new.requires_grad
        rows = fresh_entries((classes - self.classes, wide), wide).to(self.new)
        self.old = nn.Parameter(self.weight.detach(), requires_grad=trains)
        self.new = nn.Parameter(rows, requires_grad=trains)

    @torch.no_grad()
    def imprint(self, means: Tensor) -> None:
        r"""Starts the new rows at the mean features of their classes, in place.

        .. math:: w_k = \mu_k \; \frac{1}{K_o} \sum_{j \le K_o} \lVert w_j \rVert

        with :math:`\mu_k` the mean direction of a class (Hou et al.'s released code; the paper
        leaves it unsaid).

        Args:
            means: Unit-norm mean of each new class's unit-norm features, as
                `fastcil.nn.nearest_mean.class_means` has them; the row of a class whose mean is
                zero, having no image, stays as it is.  # [K - K_o, D]

        Raises:
            FastcilError: If there are not as many means as new rows, or no old rows.
        """
        if means.shape != self.new.shape or not len(self.old):
            raise FastcilError(
                f"means is {tuple(means.shape)} for {len(self.old)} old rows and new ones of "
                f"{tuple(self.new.shape)}; it must be as the new ones, and there must be old ones."
            )
        rows = (means.to(self.old.device) * self.old.norm(dim=1).mean()).to(self.new.dtype)
        self.new.copy_(torch.where(rows.any(1, keepdim=True), rows, self.new))

    def structure(self) -> dict[str, Any]:
        """What ``build_head`` needs to make a head of the same shape; JSON-able."""
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "classes": self.classes,
            "old": len(self.old),
        }

    @classmethod
    def build(cls, structure: Mapping[str, Any]) -> CosineHead:
        """A head of that structure with arbitrary weights, to be loaded."""
        classes, old = structure["classes"], structure["old"]
        head = cls(structure["in_features"], classes)
        rows = head.new.detach()
        head.old, head.new = nn.Parameter(rows[:old].clone()), nn.Parameter(rows[old:].clone())
        return head

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.in_features}, {self.classes}, old={len(self.old)}"
