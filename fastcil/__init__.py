"""A performance engine for class-incremental learning with exemplar memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastcil._version import __version__
from fastcil.errors import CompositionError, FastcilError

if TYPE_CHECKING:
    from fastcil.contract import register
    from fastcil.engine.compare import compare
    from fastcil.engine.learner import Learner
    from fastcil.engine.pretrain import pretrain
    from fastcil.engine.result import Result
    from fastcil.engine.run import train
    from fastcil.engine.scenario import Arrival, Scenario
    from fastcil.memory import Budget

__all__ = [
    "Arrival",
    "Budget",
    "CompositionError",
    "FastcilError",
    "Learner",
    "Result",
    "Scenario",
    "__version__",
    "compare",
    "pretrain",
    "register",
    "train",
]

# Loaded when first asked for, so that `import fastcil.ops` brings the ops and no more.
_LAZY = {
    "Arrival": "fastcil.engine.scenario",
    "Budget": "fastcil.memory",
    "Learner": "fastcil.engine.learner",
    "Result": "fastcil.engine.result",
    "Scenario": "fastcil.engine.scenario",
    "compare": "fastcil.engine.compare",
    "pretrain": "fastcil.engine.pretrain",
    "register": "fastcil.contract",
    "train": "fastcil.engine.run",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastcil' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
