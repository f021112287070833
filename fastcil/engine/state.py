"""Nested state in one safetensors file: tensors as tensors, everything else as JSON.

safetensors is used because it can't execute anything on loading, keeps exact bits, and maps
memory; its header carries the JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fastcil.contract.files import write_atomically as write_atomically
from fastcil.errors import FastcilError
from fastcil.files.lock import locked as locked
from fastcil.nn.ranks import current

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_ITEMS = "__items__"


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON-able skeleton of ``value``; its tensors are put into ``tensors`` under numbers."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: key}
    if isinstance(value, dict):
        if all(isinstance(k, str) for k in value):
            return {k: _flatten(v, tensors) for k, v in value.items()}
        return {_ITEMS: [[k, _flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_flatten(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_flatten(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"state holds a {type(value).__name__}; only tensors and plain data are saved.")


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unflatten(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors[value[_TENSOR]]
    if value.keys() == {_TUPLE}:
        return tuple(_unflatten(v, tensors) for v in value[_TUPLE])
    if value.keys() == {_ITEMS}:
        return {k: _unflatten(v, tensors) for k, v in value[_ITEMS]}
    return {k: _unflatten(v, tensors) for k, v in value.items()}


def save_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Saves nested dicts, lists, tuples, tensors, numbers, strings and None, atomically."""
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(state, tensors)
    write_atomically(Path(path), save(tensors, metadata={"state": json.dumps(skeleton)}))


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads what `save_state` saved, tensors on the CPU.

    Raises:
        FastcilError: The file is absent, cut short, or not one of fastcil's.
    """
    if not Path(path).is_file():
        raise FastcilError(f"path is '{path}', which is no file; pass one that save() wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state: dict[str, Any] = _unflatten(json.loads(metadata["state"]), tensors)
    except FastcilError:
        raise
    except Exception as error:
        raise FastcilError(
            f"'{path}' can't be read as saved state ({error}); it is damaged or not fastcil's."
        ) from error
    return state


def random_state() -> dict[str, Any]:
    """The state of torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": list(cuda)}


def set_random_state(state: dict[str, Any]) -> None:
    """Puts torch's global generators back; each of several ranks takes the first GPU's for its."""
    torch.set_rng_state(state["cpu"])
    if not state["cuda"] or not torch.cuda.is_available():
        return
    if current().size > 1 or len(state["cuda"]) > torch.cuda.device_count():
        torch.cuda.set_rng_state(state["cuda"][0])
    else:
        torch.cuda.set_rng_state_all(state["cuda"])
