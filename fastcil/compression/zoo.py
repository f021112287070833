"""The learned codecs by name, with weights still to be learned or loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from fastcil.compression.gma import MixtureConfig, MixtureHyperprior
from fastcil.compression.hierarchical import Hierarchical, HierarchicalConfig
from fastcil.compression.hyperprior import Hyperprior, HyperpriorConfig
from fastcil.compression.model import CodecModel
from fastcil.errors import FastcilError

_KINDS: Mapping[str, tuple[Callable[[Any], CodecModel], type]] = MappingProxyType(
    {
        "hierarchical": (Hierarchical, HierarchicalConfig),
        "hyperprior": (Hyperprior, HyperpriorConfig),
        "mixture": (MixtureHyperprior, MixtureConfig),
    }
)

# Of these channels and blocks, whatever the latents.
_TINY = {
    "kind": "hierarchical",
    "channels": (16, 24, 32, 24, 16),
    "kernels": (5, 5, 5, 3, 3),
    "encoder_blocks": (1, 1, 1, 1, 1),
    "decoder_blocks": ((0, 1), (1, 1), (1, 1), (1, 1)),
    "last_blocks": 1,
    "embedding": 32,
}

CODECS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "hierarchical": {"kind": "hierarchical"},
        "hierarchical-small": {
            "kind": "hierarchical",
            "channels": (40, 80, 120, 80, 40),
            "latents": (40, 40, 80, 16),
            "embedding": 64,
        },
        "hierarchical-mini": {**_TINY, "latents": (16, 16, 32, 32)},
        "hierarchical-tiny": {**_TINY, "latents": (16, 16, 16, 8)},
        "msh-vr": {"kind": "hyperprior"},
        "msh": {"kind": "hyperprior", "embedding": 0},
        "gma-vr": {"kind": "mixture"},
        "gma": {"kind": "mixture", "embedding": 0},
    }
)
"""Structures by name: 35.5 M, 3.5 M and twice 0.2 M parameters; baselines of many rates and of one.

``hierarchical-tiny`` has 0.2 numbers a pixel; of so many, principal components of blocks of 16 x 16
rebuild Kodak at 28 dB. Its streams are small, and hardly better at the rates above.
``hierarchical-mini`` has 0.6 (35 dB).
"""


def build_codec(name: str, **changes: Any) -> CodecModel:
    """A codec by name, with torch's initial weights.

    Args:
        name: One of `CODECS`.
        **changes: Settings of its config that differ, such as ``lambda_range``.

    Raises:
        FastcilError: No codec of that name, or no such setting.

    Example:
        >>> model = build_codec("hierarchical-tiny", lambda_range=(4.0, 1024.0))
        >>> sum(p.numel() for p in model.parameters())
        209464
    """
    if name not in CODECS:
        raise FastcilError(f"name is {name!r}; the codecs are {', '.join(CODECS)}.")
    return build_model({**CODECS[name], **changes})


def build_model(structure: Mapping[str, Any]) -> CodecModel:
    """A codec of a `CodecModel.structure`, which may have been through JSON.

    Raises:
        FastcilError: A kind or setting that isn't known.

    Example:
        >>> model = build_codec("hierarchical-tiny")
        >>> build_model(model.structure()).config == model.config
        True
    """
    kind = str(structure.get("kind"))
    if kind not in _KINDS:
        raise FastcilError(f"kind is {kind!r}; it must be one of {', '.join(_KINDS)}.")
    build, config = _KINDS[kind]
    known = [field.name for field in fields(config)]
    for name in structure:
        if name != "kind" and name not in known:
            raise FastcilError(f"{name} is no setting of {kind}; those are {', '.join(known)}.")
    settings = {name: _tuples(value) for name, value in structure.items() if name != "kind"}
    return build(config(**settings))


def _tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples again."""
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
