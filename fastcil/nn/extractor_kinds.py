"""The kinds of extractors there are, and how one is made again from its description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from fastcil.errors import FastcilError
from fastcil.nn.aggregation import AggregatedBackbone
from fastcil.nn.channel_masks import MaskedResNet
from fastcil.nn.expanded import ExpandedBackbone
from fastcil.nn.pruning import PrunedResNet
from fastcil.nn.scaling import has_scales, scale_convolutions

MakeBackbone = Callable[[], nn.Module]

EXTRACTORS: dict[str, Callable[[Mapping[str, Any], MakeBackbone], nn.Module]] = {
    "backbone": lambda structure, make_backbone: make_backbone(),
    "scaled": lambda structure, make_backbone: scale_convolutions(make_backbone()),
    AggregatedBackbone.kind: AggregatedBackbone.build,
    MaskedResNet.kind: MaskedResNet.build,
    PrunedResNet.kind: PrunedResNet.build,
    ExpandedBackbone.kind: ExpandedBackbone.build,
}
"""For each ``kind`` of extractor: structure and what makes a backbone -> extractor.

An extractor that is more than a backbone names its kind in an attribute ``kind`` and describes
itself by ``structure()``, which answers that ``kind`` and whatever its builder here needs.
"""


def extractor_structure(extractor: nn.Module) -> dict[str, Any]:
    """What `build_extractor` needs to make an extractor of the same shape; JSON-able.

    Args:
        extractor: A backbone as the run's builder makes it, one whose convolutions were scaled,
            or one of another of the ``EXTRACTORS``.

    Example:
        >>> from fastcil.nn import resnet20
        >>> extractor_structure(scale_convolutions(resnet20(width=4)))
        {'kind': 'scaled'}
    """
    if getattr(extractor, "kind", None) in EXTRACTORS:
        described: dict[str, Any] = extractor.structure()  # type: ignore[operator]
        return described
    return {"kind": "scaled" if has_scales(extractor) else "backbone"}


def build_extractor(structure: Mapping[str, Any], make_backbone: MakeBackbone) -> nn.Module:
    """An extractor as `extractor_structure` described it, with arbitrary weights.

    Args:
        structure: Has ``kind``, a key of ``EXTRACTORS``, and what that kind needs.
        make_backbone: Makes one backbone.

    Raises:
        FastcilError: If the kind is unknown.

    Example:
        >>> from fastcil.nn import resnet20
        >>> type(build_extractor({"kind": "aggregated"}, lambda: resnet20(width=4))).__name__
        'AggregatedBackbone'
    """
    kind = structure.get("kind")
    if kind not in EXTRACTORS:
        near = get_close_matches(str(kind), EXTRACTORS, 1, 0.0)
        raise FastcilError(f"extractor kind is {kind!r}; the nearest known one is {near[0]!r}.")
    return EXTRACTORS[kind](structure, make_backbone)
