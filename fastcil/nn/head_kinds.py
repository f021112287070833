"""The kinds of heads there are, and how one is made again from its description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from fastcil.errors import FastcilError
from fastcil.nn.cosine_head import CosineHead
from fastcil.nn.energy_head import EnergyHead
from fastcil.nn.heads import LinearHead
from fastcil.nn.proxy_head import ProxyHead

HEADS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    LinearHead.kind: LinearHead.build,
    CosineHead.kind: CosineHead.build,
    ProxyHead.kind: ProxyHead.build,
    EnergyHead.kind: EnergyHead.build,
}
"""For each ``kind`` of head: structure -> head."""


def build_head(structure: Mapping[str, Any]) -> nn.Module:
    """A head as its ``structure()`` described it, with arbitrary weights.

    Args:
        structure: Has ``kind``, a key of ``HEADS``, and what that kind needs.

    Raises:
        FastcilError: If the kind is unknown.

    Example:
        >>> build_head({"kind": "linear", "in_features": 4, "classes": 3, "bias": False})
        LinearHead(4, 3, bias=False)
    """
    kind = structure.get("kind")
    if kind not in HEADS:
        near = get_close_matches(str(kind), HEADS, 1, 0.0)
        raise FastcilError(f"head kind is {kind!r}; the nearest known one is {near[0]!r}.")
    return HEADS[kind](structure)
