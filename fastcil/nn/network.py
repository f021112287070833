"""Networks for class-incremental learning: feature extractors side by side, and one head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastcil.errors import FastcilError
from fastcil.nn.extractor_kinds import build_extractor, extractor_structure
from fastcil.nn.head_kinds import build_head
from fastcil.nn.recall import recalled
from fastcil.nn.shares import in_shares
from fastcil.nn.tensors import Tensors


class Network(nn.Module):
    """One or several feature extractors, whose features are concatenated, and a head.

    An extractor is any module that turns images into feature maps [B, C, h, w] and says how many
    channels they have in ``out_channels``; a head turns features [B, sum of C] into logits.

    Args:
        extractors: At least one; several must give maps of the same height and width.
        head: A classifier, such as ``LinearHead``.

    Attributes:
        extractors: The extractors; more may be appended.
        head: The head.

    Raises:
        FastcilError: If there is no extractor, one lacks ``out_channels``, or the head reads
            another number of features.

    Example:
        >>> from fastcil.nn import LinearHead, resnet20
        >>> network = Network([resnet20(width=4)], LinearHead(16, classes=5))
        >>> images = torch.zeros(2, 3, 32, 32)
        >>> network(images).shape, network.maps(images).shape
        (torch.Size([2, 5]), torch.Size([2, 16, 8, 8]))
    """

    kind = "network"

    def __init__(self, extractors: Iterable[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.extractors = nn.ModuleList(extractors)
        self.head = head
        self._frozen: set[int] = set()
        self.norms_frozen = False
        if not self.extractors:
            raise FastcilError("extractors is empty; a network needs at least one.")
        for extractor in self.extractors:
            if not hasattr(extractor, "out_channels"):
                raise FastcilError(
                    f"extractor {type(extractor).__name__} has no out_channels; set it to the "
                    "number of channels of its feature maps."
                )
        expected = getattr(head, "in_features", self.out_channels)
        if expected != self.out_channels:
            raise FastcilError(
                f"head reads {expected} features; the extractors give {self.out_channels}."
            )

    @property
    def out_channels(self) -> int:
        """Number of features: channels of all extractors together."""
        channels: list[Any] = [extractor.out_channels for extractor in self.extractors]
        return sum(channels)

    @property
    def frozen(self) -> tuple[int, ...]:
        """Positions of the frozen extractors."""
        return tuple(sorted(self._frozen))

    def maps(self, images: Tensor) -> Tensor:
        """Feature maps before pooling, of all extractors.

        Args:
            images: Normalised images.  # [B, 3, H, W]

        Returns:
            [B, C, h, w]
        """
        return _joined([in_shares(e, e, images) for e in self.extractors])

    def features(self, images: Tensor) -> Tensor:
        """Feature vectors: the mean of the maps over all positions.

        Args:
            images: Normalised images.  # [B, 3, H, W]

        Returns:
            [B, C]
        """
        return _joined([self._pooled(k, images) for k in range(len(self.extractors))])

    def _pooled(self, position: int, images: Tensor) -> Tensor:
        """Feature vectors of one extractor; see `fastcil.nn.recall`."""
        extractor = self.extractors[position]

        def look() -> Tensor:
            pooled: Tensor = in_shares(extractor, partial(_pooled, extractor), images)
            return pooled

        return recalled(extractor, images, look) if position in self._frozen else look()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, K]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def levels(self, images: Tensor) -> list[Tensor]:
        """The map after each stage of the last extractor, the last one being its output.

        Raises:
            FastcilError: If that extractor has no ``levels``.
        """
        extractor = self.extractors[-1]
        if not hasattr(extractor, "levels"):
            raise FastcilError(
                f"extractor {type(extractor).__name__} has no levels(images); a method that "
                "compares intermediate maps needs it."
            )
        levels: list[Tensor] = in_shares(extractor, extractor.levels, images)  # type: ignore[arg-type]
        return levels

    def cam_weights(self, labels: Tensor) -> Tensor:
        """The classifier's row of each label, the w of a class activation map.

        Args:
            labels: int64.  # [B]

        Returns:
            [B, C]
        """
        rows: Tensor = self.head.cam_weights(labels)  # type: ignore[operator]
        return rows

    def freeze(self, *extractors: int) -> None:
        """Stops extractors from changing.

        Their parameters require no gradient, and they stay in evaluation mode, keeping their
        batch-norm statistics, whatever ``train()`` says later.

        Args:
            *extractors: Positions, negative ones from the end.

        Raises:
            FastcilError: If there is no such extractor.
        """
        for position in self._positions(extractors):
            self._frozen.add(position)
            self.extractors[position].requires_grad_(False).eval()

    def thaw(self, *extractors: int) -> None:
        """Lets extractors train again, in the mode the network is in.

        Args:
            *extractors: Positions, negative ones from the end.

        Raises:
            FastcilError: If there is no such extractor.
        """
        for position in self._positions(extractors):
            self._frozen.discard(position)
            self.extractors[position].requires_grad_(True).train(self.training)
        if self.norms_frozen:
            self.freeze_norms()

    def freeze_norms(self) -> None:
        """Stops all batch norms from changing: statistics, and scale and shift.

        They stay in evaluation mode, whatever ``train()`` says later; `trained_parameters` leaves
        theirs out.
        """
        self.norms_frozen = True
        for norm in self._norms():
            norm.requires_grad_(False).eval()

    def trained_parameters(self) -> list[nn.Parameter]:
        """All parameters but those of frozen batch norms."""
        left_out = {p for norm in self._norms() for p in norm.parameters()}
        if not self.norms_frozen:
            left_out = set()
        return [p for p in self.parameters() if p not in left_out]

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def _positions(self, extractors: tuple[int, ...]) -> list[int]:
        count = len(self.extractors)
        for position in extractors:
            if not -count <= position < count:
                raise FastcilError(f"extractor {position} does not exist; there are {count}.")
        return [position % count for position in extractors]

    def train(self, mode: bool = True) -> Network:
        """Sets training or evaluation mode everywhere but in frozen extractors."""
        super().train(mode)
        for position in self._frozen:
            self.extractors[position].eval()
        if self.norms_frozen:
            for norm in self._norms():
                norm.eval()
        return self

    def structure(self) -> dict[str, Any]:
        """What ``build`` needs to make a network of the same shape; JSON-able."""
        return {
            "kind": self.kind,
            "extractors": [extractor_structure(extractor) for extractor in self.extractors],
            "frozen": list(self.frozen),
            "norms_frozen": self.norms_frozen,
            "head": self.head.structure(),  # type: ignore[operator]
        }

    @classmethod
    def build(cls, structure: Mapping[str, Any], make_backbone: Callable[[], nn.Module]) -> Network:
        """A network of that structure with arbitrary weights, to be loaded.

        Args:
            structure: As ``structure()`` returns it.
            make_backbone: Makes one backbone, of which an extractor has one or, such as
                `fastcil.nn.AggregatedBackbone`, several; the head is moved to its device.

        Raises:
            FastcilError: If the parts do not fit together.
        """
        extractors = [build_extractor(s, make_backbone) for s in structure["extractors"]]
        head = build_head(structure["head"])
        parameter = next((p for extractor in extractors for p in extractor.parameters()), None)
        network = cls(extractors, head if parameter is None else head.to(parameter.device))
        network.freeze(*structure["frozen"])
        if structure["norms_frozen"]:
            network.freeze_norms()
        return network


def _pooled(extractor: nn.Module, images: Tensor) -> Tensor:
    """Feature vectors of one extractor."""
    pooled: Tensor = extractor(images).mean((2, 3))
    return pooled


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def build_module(structure: Mapping[str, Any], make_backbone: Callable[[], nn.Module]) -> nn.Module:
    """A network, a head or tensors as its ``structure()`` described it, with arbitrary values.

    Args:
        structure: As ``structure()`` returned it.
        make_backbone: Makes one backbone of a network.

    Raises:
        FastcilError: If the kind is unknown.

    Example:
        >>> from fastcil.nn import LinearHead, resnet20
        >>> network = Network([resnet20(width=4)], LinearHead(16, classes=5))
        >>> again = build_module(network.structure(), lambda: resnet20(width=4))
        >>> again.structure() == network.structure()
        True
    """
    if structure.get("kind") == Network.kind:
        return Network.build(structure, make_backbone)
    if structure.get("kind") == Tensors.kind:
        return Tensors.build(structure)
    return build_head(structure)
