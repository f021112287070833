"""A backbone with the nodes that tasks have added to it, fused with its own features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcil.nn.expansion import Expansion, Indicator, Layer
from fastcil.nn.shares import in_shares

Fuse = Literal["sum", "concat"]
GammaOf = Literal["all", "backbone"]


class ExpandedBackbone(nn.Module):
    r"""A backbone and the nodes that tasks after the first have added to it.

    With f_0 the backbone's maps, and :math:`\oplus` the sum or the concatenation of channels,

    .. math:: f_t = (\alpha_t \odot f'_t(f_0)) \oplus \gamma f_{t-1}

    (Yang et al. 2021, Eq. 4). Every expansion reads the backbone's maps, side by side with the
    others, as the old and the new nodes of Fig. 2 do. With gamma of all that was there before, as
    Eq. 4 has it, what a task added counts gamma^k after k more, and the backbone gamma^t; with that
    of the backbone alone, every task's nodes count 1 and the backbone gamma, however many tasks
    there were. After one task the two are the same. A node that was removed adds nothing to its
    channel of a sum, and is no channel of a concatenation.

    Args:
        backbone: Makes the maps f_0.
        fuse: ``sum`` or ``concat``.
        gamma: Weight of the features there were.
        gamma_of: Which these are: ``all``, or those of the ``backbone``.

    Attributes:
        backbone: The backbone.
        expansions: One `Expansion` for each task after the first, of as many nodes as f_0 has
            channels at first.
        frozen: Whether the backbone stays in evaluation mode.

    Example:
        >>> from fastcil.nn import resnet20
        >>> expanded = ExpandedBackbone(resnet20(width=4), "concat")
        >>> _ = expanded.expand()
        >>> expanded(torch.zeros(2, 3, 8, 8)).shape, expanded.out_channels
        (torch.Size([2, 32, 2, 2]), 32)
    """

    kind = "expanded"

    def __init__(
        self,
        backbone: nn.Module,
        fuse: Fuse = "sum",
        gamma: float = 0.8,
        gamma_of: GammaOf = "all",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fusing = fuse
        self.gamma = gamma
        self.gamma_of = gamma_of
        self.frozen = False
        self.expansions = nn.ModuleList()

    @property
    def out_channels(self) -> int:
        """Channels of the maps."""
        own: Any = self.backbone.out_channels
        more = [e.nodes for e in self.each()] if self.fusing == "concat" else []
        return int(own) + sum(more)

    def each(self) -> list[Expansion]:
        """The expansions, as such."""
        return [e for e in self.expansions if isinstance(e, Expansion)]

    @property
    def newest(self) -> Expansion:
        """What the last task added."""
        return self.each()[-1]

    def expand(
        self, layer: Layer = "fc", indicator: Indicator = "sa", tau: float = 0.5
    ) -> Expansion:
        """Adds nodes, as many as the backbone has channels; see `Expansion`.

        The weights are drawn on the CPU, so that a seed means the same on every device.
        """
        channels: Any = self.backbone.out_channels
        expansion = Expansion(channels, channels, layer=layer, indicator=indicator, tau=tau)
        like = next(self.backbone.parameters(), torch.empty(0))
        self.expansions.append(expansion.to(like.device, like.dtype).train(self.training))
        return expansion

    def freeze(self) -> None:
        """Keeps the backbone in evaluation mode from now on, and its parameters still."""
        self.frozen = True
        self.backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ExpandedBackbone:
        """Sets training or evaluation mode everywhere but in a frozen backbone."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def own_maps(self, images: Tensor) -> Tensor:
        """The backbone's maps f_0, [B, C, h, w]."""
        maps: Tensor = in_shares(self.backbone, self.backbone, images)
        return maps

    def fuse(self, maps: Tensor) -> Tensor:
        """The backbone's maps f_0 [B, C, h, w] -> f_t, all that was added fused in."""
        fused = maps
        for number, expansion in enumerate(self.each()):
            new = expansion(maps)
            old = fused if number and self.gamma_of == "backbone" else self.gamma * fused
            if self.fusing == "concat":
                fused = torch.cat([old, new], 1)
                continue
            if expansion.nodes < len(expansion.place):
                new = functional.pad(new, (0, 0, 0, 0, 0, 1)).index_select(1, expansion.place)
            fused = old + new
        return fused

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> feature maps [B, C', h, w]."""
        return self.fuse(self.own_maps(images))

    def levels(self, images: Tensor) -> list[Tensor]:
        """The map after each of the backbone's stages, the last one being ``forward``'s."""
        levels: list[Tensor] = self.backbone.levels(images)  # type: ignore[operator]
        return [*levels[:-1], self.fuse(levels[-1])]

    def added(self) -> dict[str, Tensor]:
        """Everything that tasks have added, by name."""
        return dict(self.expansions.state_dict())

    def structure(self) -> dict[str, Any]:
        """What ``build`` needs beside a backbone, the nodes that remain included; JSON-able."""
        return {
            "kind": self.kind,
            "fuse": self.fusing,
            "gamma": self.gamma,
            "gamma_of": self.gamma_of,
            "frozen": self.frozen,
            "expansions": [expansion.structure() for expansion in self.each()],
        }

    @classmethod
    def build(
        cls, structure: Mapping[str, Any], make_backbone: Callable[[], nn.Module]
    ) -> ExpandedBackbone:
        """A backbone with expansions of that structure and arbitrary values, to be loaded."""
        backbone = make_backbone()
        # Learners that were saved before there was a choice say nothing of it.
        gamma_of = structure.get("gamma_of", "all")
        expanded = cls(backbone, structure["fuse"], structure["gamma"], gamma_of)
        like = next(backbone.parameters(), torch.empty(0))
        expanded.expansions.extend(
            Expansion.build(described).to(like.device, like.dtype)
            for described in structure["expansions"]
        )
        if structure["frozen"]:
            expanded.freeze()
        return expanded
