"""Weights to start from: read from safetensors or passed in Python, and fitted by their names."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fastcil.contract.files import read_tensors, write_tensors
from fastcil.engine.groups import NetworkOptions
from fastcil.errors import FastcilError

_NAMED = "state_dict:"
# A step count that batch norms of ours never use, and old files lack.
_COUNTER = "num_batches_tracked"
_CLASSIFIERS = ("fc", "head")
_SHOWN = 3
_BLOCK = 1 << 20  # bytes read at a time


class StateDict:
    """Weights passed in Python, which a run's config names by their checksum.

    There is one of a name in a process (`of`), and while it lives `find` gives it to whoever has
    the name: a run that goes on makes its settings anew from plain data.

    Args:
        values: Name -> tensor; they are copied to the CPU.

    Attributes:
        name: ``state_dict:`` and the first 16 digits of the SHA-256 of names, types, shapes, bits.
        values: The tensors.

    Raises:
        FastcilError: A value that is no tensor.

    Example:
        >>> given = StateDict.of({"conv1.weight": torch.zeros(4, 3, 3, 3)})
        >>> given.name, StateDict.find(given.name) is given
        ('state_dict:7d0c8d38ddbeac8f', True)
    """

    _alive: ClassVar[WeakValueDictionary[str, StateDict]] = WeakValueDictionary()

    def __init__(self, values: Mapping[Any, Any]) -> None:
        for key, value in values.items():
            if not isinstance(value, Tensor):
                inner = f", such as what lies under '{key}'" if isinstance(value, Mapping) else ""
                raise FastcilError(
                    f"network.weights holds a {type(value).__name__} under '{key}'; pass a mapping "
                    f"from names to tensors{inner}."
                )
        self.values = {str(key): v.detach().cpu().clone() for key, v in values.items()}
        digest = hashlib.sha256()
        for key in sorted(self.values):
            value = self.values[key].contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.flatten().view(torch.uint8).numpy())
        self.name = _NAMED + digest.hexdigest()[:16]

    @classmethod
    def of(cls, values: Mapping[Any, Any]) -> StateDict:
        """The one that holds these values, which may be there already."""
        made = cls(values)
        return cls._alive.setdefault(made.name, made)

    @classmethod
    def find(cls, name: str) -> StateDict | None:
        """The one of that name, if something in this process still holds it."""
        return cls._alive.get(name)

    def __repr__(self) -> str:
        return self.name


def as_option(value: Any) -> Any:
    """What was given for ``network.weights``: a mapping as a `StateDict`, a path as text.

    Raises:
        FastcilError: A network, or a mapping with something else than tensors in it.
    """
    if isinstance(value, nn.Module):
        raise FastcilError(
            f"network.weights is a network ({type(value).__name__}); pass its state_dict()."
        )
    if isinstance(value, Mapping):
        return StateDict.of(value)
    return str(value) if isinstance(value, Path) else value


def save_weights(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes weights as safetensors, atomically, with a description as JSON in their header.

    Raises:
        FastcilError: The file can't be written.
    """
    write_tensors(path, tensors, description)


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a safetensors file, and what `save_weights` wrote beside them, else nothing.

    Raises:
        FastcilError: No such file, one that holds a pickle, or a damaged one.
    """
    return read_tensors(path, "network.weights")


def file_checksum(weights: str | None) -> str | None:
    """What tells one file of weights from another, wherever it lies.

    Args:
        weights: ``network.weights``: a path, the name of a `StateDict`, or None.

    Returns:
        The first 16 digits of the file's SHA-256; None if it is no file.
    """
    if weights is None or weights.startswith(_NAMED):
        return None
    digest = hashlib.sha256()
    with open(Path(weights).expanduser(), "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return f"sha256 {digest.hexdigest()[:16]}"


@dataclass
class Fit:
    """Which weights go where in a network, and which nowhere.

    Args:
        taken: The network's name of a tensor -> the value it takes.
        missing: The network's tensors for which there is none.
        misshapen: Those for which there is one of another shape, and both shapes.
        unexpected: Names that the network has no tensor for.
        classifier: Those among them that a classifier has, for which there is no place.
    """

    taken: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    classifier: list[str] = field(default_factory=list)

    @property
    def odd(self) -> bool:
        """Whether something is left over that should not be."""
        return bool(self.missing or self.misshapen or self.unexpected)

    def left(self) -> dict[str, list[str]]:
        """All names that are left over, by why."""
        reasons = {
            "missing": self.missing,
            "of another shape": self.misshapen,
            "unexpected": self.unexpected,
            "ignored as a classifier's": self.classifier,
        }
        return {reason: names for reason, names in reasons.items() if names}

    def leftovers(self) -> str:
        """What is left over, as a part of a sentence: some of the names."""
        return "; ".join(f"{reason} {_some(names)}" for reason, names in self.left().items())


def fit(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> Fit:
    """Finds a feature extractor's tensors among others by their names.

    A name may be the extractor's own or, if its class has an ``own_name`` that translates them,
    another library's; a prefix that all of them have, such as ``module.`` or
    ``network.extractors.0.``, is left out where more names fit without it.

    Args:
        backbone: The extractor; it is not changed.
        tensors: Name -> tensor.

    Example:
        >>> from fastcil.nn import resnet18
        >>> network = resnet18(width=4)
        >>> found = fit(network, {f"module.{k}": v for k, v in network.state_dict().items()})
        >>> len(found.taken) == len(network.state_dict()), found.odd
        (True, False)
    """
    own = backbone.state_dict()
    translate: Callable[[str], str] = getattr(type(backbone), "own_name", str)

    def under(prefix: str) -> dict[str, str]:
        """The extractor's names -> the names given, of those with this prefix."""
        inner = {key[len(prefix) :]: key for key in tensors if key.startswith(prefix)}
        return {name if name in own else translate(name): key for name, key in inner.items()}

    prefixes = dict.fromkeys(prefix for key in tensors for prefix in _prefixes(key))
    # The shortest of those under which most names fit.
    shortest = sorted(prefixes or [""], key=len)
    named = under(max(shortest, key=lambda prefix: len(own.keys() & under(prefix).keys())))
    found = Fit()
    for name, value in own.items():
        if name not in named:
            if not name.endswith(_COUNTER):
                found.missing.append(name)
        elif tensors[named[name]].shape != value.shape:
            shape = tuple(tensors[named[name]].shape)
            found.misshapen.append(f"{name} {shape} for {tuple(value.shape)}")
        else:
            found.taken[name] = tensors[named[name]]
    used = {named[name] for name in own if name in named}
    for key in tensors:
        if key not in used:
            of_classifier = any(part in _CLASSIFIERS for part in key.split("."))
            (found.classifier if of_classifier else found.unexpected).append(key)
    return found


def _prefixes(key: str) -> Iterable[str]:
    """Everything a name begins with that ends with a dot, and nothing.

    Example:
        >>> list(_prefixes("module.conv1.weight"))
        ['', 'module.', 'module.conv1.']
    """
    parts = key.split(".")
    return (".".join([*parts[:count], ""]) if count else "" for count in range(len(parts)))


class StartingFrom:
    """Builds extractors that start from given weights.

    Args:
        build: Builds one with random weights.
        weights: ``network.weights``: a path, or the name of ``state_dict``.
        state_dict: The weights that were passed in Python.
        network: What ``build`` builds, nothing left open; None for one of the user's own.

    Attributes:
        left: All names that had no place in the last one built, by why (`Fit.left`).
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        weights: str,
        state_dict: StateDict | None,
        network: NetworkOptions | None,
    ) -> None:
        self._build, self._network = build, network
        self._weights, self._state_dict = weights, state_dict
        self.left: dict[str, list[str]] = {}

    def __call__(self) -> nn.Module:
        """A new one."""
        weights = self._weights
        description: dict[str, Any] = {}
        if self._state_dict is not None:
            tensors = self._state_dict.values
        elif weights.startswith(_NAMED):
            raise FastcilError(
                f"network.weights is '{weights}', a state_dict that was passed in Python, of which "
                f"only the checksum is saved; pass it again."
            )
        else:
            tensors, description = read_weights(weights)
        if self._network is not None:
            _check_made_for(weights, description, self._network)
        backbone = self._build()
        self.left = _load(backbone, tensors, weights).left()
        return backbone


def _load(backbone: nn.Module, tensors: Mapping[str, Tensor], source: str) -> Fit:
    """Puts weights in their places; one warning says what is left over."""
    found = fit(backbone, tensors)
    kind = type(backbone).__name__
    if all(name.endswith(_COUNTER) for name in found.taken):
        raise FastcilError(
            f"network.weights is '{source}', of whose {len(tensors)} tensors none fits this "
            f"{kind} ({found.leftovers()}); pass weights of this network, or set network.name, "
            f"network.width and network.stem to theirs."
        )
    if found.odd:
        _warn_once(
            f"network.weights is '{source}', which fits this {kind} in part: {found.leftovers()}."
        )
    own = backbone.state_dict()
    for name, value in found.taken.items():
        own[name].copy_(value)
    return found


@lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    """Warns of what every extractor of a run would warn of, once in this process."""
    warnings.warn(text, stacklevel=3)


def _check_made_for(source: str, description: Mapping[str, Any], network: NetworkOptions) -> None:
    """Refuses a file of another network, of which no weight or the wrong ones would fit."""
    made = description.get("network", {})
    differing = [key for key in made if made[key] != getattr(network, key, None)]
    # Training goes on with another activation only if that was asked for: it is no default.
    if network.activation == "leaky" and "activation" in differing:
        differing.remove("activation")
    if differing:
        theirs = ", ".join(f"network.{key}={made[key]}" for key in differing)
        ours = ", ".join(f"network.{key}={getattr(network, key, None)}" for key in differing)
        raise FastcilError(
            f"network.weights is '{source}', which was made with {theirs}, and the run has {ours}; "
            f"give the options that it was made with."
        )


def _some(names: list[str]) -> str:
    """The first few of several names, and how many there are.

    Example:
        >>> _some(["a", "b", "c", "d"]), _some(["a"])
        ('4 (a, b, c, ...)', '1 (a)')
    """
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(names[:_SHOWN])}{more})"
