"""Networks to which tasks add nodes: what of them is trained, and what is removed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastcil.nn.expanded import ExpandedBackbone
from fastcil.nn.heads import LinearHead
from fastcil.nn.network import Network


def expanded_backbone(network: Network | None) -> ExpandedBackbone | None:
    """The extractor of a network, if something was added to it.

    Example:
        >>> from fastcil.nn import resnet20
        >>> network = Network([resnet20(width=4)], LinearHead(16, classes=5))
        >>> expanded_backbone(network) is None
        True
    """
    extractor = None if network is None else network.extractors[0]
    return extractor if isinstance(extractor, ExpandedBackbone) else None


def without_settled(
    parameters: Iterable[nn.Parameter], expanded: ExpandedBackbone, learn_tau: bool
) -> list[nn.Parameter]:
    """Parameters but for those of earlier tasks' expansions, which stay as they were learned.

    Args:
        parameters: Of a network that has ``expanded`` for its extractor.
        expanded: Of which the newest expansion is being learned.
        learn_tau: Whether the newest one's tau is; that of ``nc`` never is.
    """
    *earlier, newest = expanded.each()
    settled = {p for expansion in earlier for p in expansion.parameters()}
    if newest.indicator == "nc" or (newest.indicator == "sa" and not learn_tau):
        settled.add(newest.level)
    return [parameter for parameter in parameters if parameter not in settled]


def compress(network: Network, keep: Tensor) -> None:
    """Removes nodes of the newest expansion, and what the head has for their channels.

    The network then computes what it computed with alpha of these nodes forced to 0.

    Args:
        network: Of one `ExpandedBackbone` and a linear head; changed in place.
        keep: Which of the newest expansion's nodes stay.  # bool [n]
    """
    expanded, head = expanded_backbone(network), network.head
    assert expanded is not None and isinstance(head, LinearHead)
    if expanded.fusing == "concat":
        older = torch.ones(head.in_features - len(keep), dtype=torch.bool, device=keep.device)
        weight = head.weight.detach()[:, torch.cat([older, keep])].contiguous()
        head.weight = nn.Parameter(weight, requires_grad=head.weight.requires_grad)
    expanded.newest.remove(keep)
