"""Files that are never half written and never execute anything: bytes, and tensors by name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fastcil.errors import FastcilError
from fastcil.files.atomic import write_atomically as write_atomically

DESCRIPTION = "fastcil"
# What other libraries end a file with that unpickling reads.
_PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl", ".pickle", ".tar")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Writes tensors as safetensors, atomically, with a description as JSON in their header.

    Raises:
        FastcilError: The file can't be written.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # One key alone: safetensors writes several in any order.
    write_atomically(path, save(plain, metadata={DESCRIPTION: json.dumps(description)}))


def read_tensors(
    path: str | os.PathLike[str], what: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a safetensors file, and what `write_tensors` wrote beside them, else nothing.

    Args:
        path: The file.
        what: The argument that names it, for errors.

    Raises:
        FastcilError: No such file, one that holds a pickle, or a damaged one.
    """
    file = Path(path).expanduser()
    if file.suffix in _PICKLES:
        raise FastcilError(
            f"{what} is '{path}', a kind of file that can run code when it is loaded, "
            f"which fastcil never does; load it yourself and pass the state_dict in Python, or "
            f"save that as safetensors."
        )
    if not file.is_file():
        raise FastcilError(
            f"{what} is '{path}', which is no file; give the path of a safetensors file."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        description = json.loads(metadata.get(DESCRIPTION, "{}"))
    except Exception as error:
        raise FastcilError(
            f"{what} is '{path}', which can't be read as safetensors ({error})."
        ) from error
    return tensors, description if isinstance(description, dict) else {}
