"""PODNet's classifier: several proxies for each class, compared by their direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.nn.heads import check_grows, check_sizes
from fastcil.nn.unit import unit_vectors


class ProxyHead(nn.Module):
    r"""Local similarity classifier (Douillard et al. 2020, Sec. 3.2), to which classes are added.

    With the directions of the features f and of each class's proxies w_{c,1..P},

    .. math:: s_{c,p} = -\Big\| \frac{f}{\|f\|} - \frac{w_{c,p}}{\|w_{c,p}\|} \Big\|^2, \qquad
        z_c = \eta \sum_p s_{c,p} \, \mathrm{softmax}_p(s_{c, \cdot})

    where the paper has the cosine for s; the released code has this distance, 2 cos - 2, which
    doubles what the softmax sees. The scale eta is learned. The released code applies it in the
    loss alone; here scores have it too, which ranks classes alike, so that whatever reads them as
    logits sees what is trained.

    The proxies are in two blocks: those of the classes known before the last ``grow`` and those
    that it added. A stage that holds what is known leaves ``old`` out of its parameters: not even
    weight decay moves it then. Proxies start normal with variance 1 / D, drawn from torch's global
    generator, eta at 1.

    Args:
        in_features: Length D of a feature vector.
        classes: Number K of classes.
        proxies: Number P of proxies per class.

    Attributes:
        old: Proxies of the classes known before; none in a new head.  # [O, P, D]
        new: Proxies of the others.  # [K - O, P, D]
        scale: eta.  # []

    Raises:
        FastcilError: If a size is below 1.

    Example:
        >>> head = ProxyHead(8, classes=5)
        >>> head.grow(7)
        >>> head.old.shape, head.new.shape, head(torch.ones(2, 8)).shape
        (torch.Size([5, 10, 8]), torch.Size([2, 10, 8]), torch.Size([2, 7]))
    """

    kind = "proxy"
    old: nn.Parameter
    new: nn.Parameter

    def __init__(self, in_features: int, classes: int, proxies: int = 10) -> None:
        super().__init__()
        check_sizes(in_features=in_features, classes=classes, proxies=proxies)
        like = torch.empty(0)
        self.old = nn.Parameter(like.new_empty(0, proxies, in_features))
        self.new = nn.Parameter(_fresh(classes, proxies, in_features).to(like))
        self.scale = nn.Parameter(like.new_ones(()))

    @property
    def in_features(self) -> int:
        """Length of a feature vector."""
        return self.new.shape[2]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.old) + len(self.new)

    @property
    def proxies(self) -> int:
        """Proxies of each class."""
        return self.new.shape[1]

    @property
    def weight(self) -> Tensor:
        """All proxies, [K, P, D]."""
        return torch.cat([self.old, self.new])

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] -> scores z [B, K]."""
        directions = unit_vectors(self.weight).flatten(0, 1)  # [K P, D]
        cosines = functional.linear(unit_vectors(features), directions)
        similarities = 2 * cosines.unflatten(1, (-1, self.proxies)) - 2  # [B, K, P]
        return self.scale * (similarities * similarities.softmax(2)).sum(2)

    def cam_weights(self, labels: Tensor) -> Tensor:
        """The mean direction of each label's proxies, [B] -> [B, D].

        A class activation map wants one vector by which features add up to the class. Which proxy
        an image is near to is told by the whole image, so that no such vector is exact; with this
        one they add up to the score that has every proxy of the class weigh the same:
        ‖f‖ mean_p (s_p / 2 + 1) = f · mean_p w_p / ‖w_p‖.
        """
        return unit_vectors(self.weight[labels]).mean(1)

    def grow(self, classes: int) -> None:
        """Adds classes, in place, and makes ``old`` of all proxies there were.

        The Parameters of the proxies are new objects, so an optimiser that held the old ones must
        be made again; eta stays.

        Args:
            classes: Number of classes afterwards; as many as now, and ``new`` has no proxies.

        Raises:
            FastcilError: If there would be fewer classes than now.
        """
        check_grows("classes", self.classes, classes)
        fresh = _fresh(classes - self.classes, self.proxies, self.in_features)
        self._set_blocks(self.weight.detach(), fresh.to(self.new))

    @torch.no_grad()
    def imprint(self, centres: Tensor) -> None:
        """Starts the new proxies at clusters of their classes' features, in place.

        As in the released code, a proxy is a centre times the mean norm of the old proxies.

        Args:
            centres: Of each new class, P centres of its unit-norm features, such as
                `fastcil.nn.clusters.cluster_centres` gives them; a class all of whose centres are
                zero, having no image, stays as it is.  # [K - O, P, D]

        Raises:
            FastcilError: If the shape is not that of ``new``, or there are no old proxies.
        """
        if centres.shape != self.new.shape or not len(self.old):
            raise FastcilError(
                f"centres is {tuple(centres.shape)} for {len(self.old)} old classes and new "
                f"proxies of {tuple(self.new.shape)}; it must be as the new ones, and there must "
                f"be old ones."
            )
        starts = centres.to(self.new) * self.old.norm(dim=2).mean()
        some = starts.flatten(1).any(1)[:, None, None]  # [K - O, 1, 1]
        self.new.copy_(torch.where(some, starts, self.new))

    def _set_blocks(self, old: Tensor, new: Tensor) -> None:
        """Puts other proxies in place, which want gradients as those before did."""
        trains = self.new.requires_grad
        self.old = nn.Parameter(old, requires_grad=trains)
        self.new = nn.Parameter(new, requires_grad=trains)

    def structure(self) -> dict[str, Any]:
        """What ``build_head`` needs to make a head of the same shape; JSON-able."""
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "classes": self.classes,
            "proxies": self.proxies,
            "old": len(self.old),
        }

    @classmethod
    def build(cls, structure: Mapping[str, Any]) -> ProxyHead:
        """A head of that structure with arbitrary weights, to be loaded."""
        head = cls(structure["in_features"], structure["classes"], structure["proxies"])
        proxies, old = head.new.detach(), structure["old"]
        head._set_blocks(proxies[:old].clone(), proxies[old:].clone())
        return head

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        sizes = f"{self.in_features}, {self.classes}"
        return f"{sizes}, proxies={self.proxies}, old={len(self.old)}"


def _fresh(classes: int, proxies: int, in_features: int) -> Tensor:
    """Normal entries of variance 1 / D, on the CPU: a seed means the same on every device."""
    shape = (classes, proxies, in_features)
    return torch.empty(shape, device="cpu").normal_(std=in_features**-0.5)
