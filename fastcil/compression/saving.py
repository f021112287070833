"""Codecs as files: weights as safetensors, and what they are as JSON in the header."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcil.compression.factorised import is_table
from fastcil.compression.model import CodecModel, entropy_hash
from fastcil.compression.training import lambda_range
from fastcil.compression.zoo import build_model
from fastcil.contract.files import read_tensors, write_tensors
from fastcil.errors import FastcilError

FORMAT = 1
_KEY = "codec"
_SHOWN = 3


@dataclass(frozen=True)
class CodecFacts:
    """What a codec's file says of it.

    Args:
        structure: See `CodecModel.structure`.
        lambda_range: Smallest and largest λ it was trained for.
        entropy_hash: See `fastcil.compression.entropy_hash`.
        history: One entry for each training, first to last, JSON-able; as ``fastcil codec``
            writes it: ``model`` (the name it was built by, or the SHA-256 of the file it came
            from), ``data``, ``replay``, ``training`` (a `CodecTraining`), ``seed`` and versions.
    """

    structure: dict[str, Any]
    lambda_range: tuple[float, float]
    entropy_hash: str
    history: tuple[dict[str, Any], ...]


def save_codec(
    path: str | os.PathLike[str], model: CodecModel, history: Sequence[dict[str, Any]] = ()
) -> None:
    """Saves a codec in one safetensors file, atomically; nothing in it can be executed.

    The header holds, as JSON under ``fastcil``, what `CodecFacts` describes. Tables that the codec
    has learned are saved with its weights; if it has none yet, they are made (`CodecModel.update`).

    Args:
        path: Where to.
        model: The codec.
        history: One JSON-able entry for each training, first to last.

    Raises:
        FastcilError: The file can't be written.

    Example:
        >>> import tempfile
        >>> from fastcil.compression import build_codec
        >>> model = build_codec("hierarchical-tiny")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_codec(f"{folder}/codec.safetensors", model)
        ...     again = load_codec(f"{folder}/codec.safetensors")
        >>> entropy_hash(again) == entropy_hash(model)
        True
    """
    # First, for it makes the tables that the weights lack.
    digest = entropy_hash(model)
    facts = {
        "format": FORMAT,
        "structure": model.structure(),
        "lambda_range": list(lambda_range(model)),
        "entropy_hash": digest,
        "history": list(history),
    }
    write_tensors(Path(path), model.state_dict(), {_KEY: facts})


def load_codec(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> CodecModel:
    """Loads what `save_codec` wrote.

    Args:
        path: The file.
        device: Where to put it.

    Returns:
        The codec, in evaluation mode.

    Raises:
        FastcilError: The file is absent, damaged or of another kind; or weights that don't fit the
            structure, or an entropy model that isn't the one whose hash the file names.
    """
    return load_with_facts(path, device)[0]


def load_with_facts(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[CodecModel, CodecFacts]:
    """A codec and what its file says of it; see `load_codec`."""
    tensors, description = read_tensors(path, "model")
    facts = _facts(path, description)
    try:
        _check_counts(facts.structure, tensors)
        # A few bytes may claim any size: without memory first, and with it only what is there. Its
        # first weights are drawn to be replaced; no one else's draws may depend on that.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            claimed = build_model(facts.structure).state_dict()
        odd = _odd(claimed, tensors)
        if not odd:
            with torch.random.fork_rng(devices=[]):
                model = build_model(facts.structure)
    except (FastcilError, TypeError, ValueError, RuntimeError) as error:
        raise FastcilError(
            f"model is '{path}', whose structure this fastcil can't build ({error})."
        ) from error
    if odd:
        more = ", ..." if len(odd) > _SHOWN else ""
        raise FastcilError(
            f"model is '{path}', whose weights don't fit its structure "
            f"({len(odd)}: {', '.join(odd[:_SHOWN])}{more}); save it again with save_codec."
        )
    model.load_state_dict(tensors)
    if entropy_hash(model) != facts.entropy_hash:
        raise FastcilError(
            f"model is '{path}', whose entropy model isn't the one it says it is "
            f"({entropy_hash(model)[:16]}, not {facts.entropy_hash[:16]}); it was damaged or "
            f"changed, and would misread its own streams."
        )
    return model.eval().to(device), facts


def _check_counts(structure: Any, tensors: Mapping[str, Tensor]) -> None:
    """Refuses a structure with more of anything than the file's tensors can be of.

    Raises:
        ValueError: Such a number.
    """
    most = max([len(tensors), *(side for tensor in tensors.values() for side in tensor.shape)])
    parts = structure.values() if isinstance(structure, dict) else structure
    for part in parts:
        if isinstance(part, (dict, list)):
            _check_counts(part, tensors)
        elif isinstance(part, int) and part > most:
            raise ValueError(f"{part} is more than its weights have of anything")


def _odd(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that only one of both has, or of other dtypes or shapes."""
    return sorted(own.keys() ^ tensors.keys()) + [
        name
        for name in sorted(own.keys() & tensors.keys())
        if own[name].dtype != tensors[name].dtype
        or (own[name].shape != tensors[name].shape and not is_table(name))
    ]


def _facts(path: str | os.PathLike[str], description: dict[str, Any]) -> CodecFacts:
    """The facts in a file's header."""
    found = description.get(_KEY)
    if not isinstance(found, dict):
        raise FastcilError(
            f"model is '{path}', which holds tensors but no codec; give a file that save_codec or "
            f"'fastcil codec train' wrote."
        )
    if found.get("format") != FORMAT:
        raise FastcilError(
            f"model is '{path}', of codec format {found.get('format')}; this fastcil reads format "
            f"{FORMAT}."
        )
    try:
        low, high = found["lambda_range"]
        return CodecFacts(
            dict(found["structure"]),
            (float(low), float(high)),
            str(found["entropy_hash"]),
            tuple(dict(entry) for entry in found["history"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FastcilError(
            f"model is '{path}', whose header is incomplete ({error!r}); save it again with "
            f"save_codec."
        ) from error
