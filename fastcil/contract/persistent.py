"""State that can be saved without pickle and rebuilt: structure as JSON, values as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastcil.contract.context import Context
from fastcil.errors import FastcilError
from fastcil.nn import build_module


class Persistent(nn.Module):
    """A module whose children come and go between tasks, yet is restored from a plain file.

    Children with a ``structure()`` (networks, heads) are described by it and rebuilt from it;
    their values, and all parameters and buffers, are saved as tensors. Anything else a subclass
    wants to keep belongs in a buffer, or in an override of these four functions.
    """

    context: Context

    def structure(self) -> dict[str, Any]:
        """What must be rebuilt before the tensors can be loaded; JSON-able."""
        return {
            name: child.structure()  # type: ignore[operator]
            for name, child in self.named_children()
            if hasattr(child, "structure")
        }

    def restore(self, structure: Mapping[str, Any]) -> None:
        """Rebuilds the children that ``structure`` names and drops those it does not."""
        for name, child in list(self.named_children()):
            if hasattr(child, "structure") and name not in structure:
                setattr(self, name, None)
        for name, described in structure.items():
            setattr(self, name, build_module(described, self.context.bare_backbone))

    def tensors(self) -> dict[str, Tensor]:
        """The values to save, by name."""
        return dict(self.state_dict())

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts saved values back; a buffer whose size depends on the data is replaced."""
        own = self.tensors()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise FastcilError(
                f"the saved state of {type(self).__name__} does not fit: {', '.join(odd[:5])} "
                f"differ; load it with the method, backbone and version that saved it."
            )
        for name, value in tensors.items():
            self._set(name, value)

    def _set(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        owner = self.get_submodule(path)
        current = getattr(owner, leaf)
        if current.shape == value.shape:
            current.data.copy_(value)
        elif isinstance(current, nn.Parameter):
            raise FastcilError(
                f"parameter {name} is {tuple(value.shape)} in the saved state and "
                f"{tuple(current.shape)} here; load it with the backbone that saved it."
            )
        else:
            setattr(owner, leaf, value.to(current.device))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module in evaluation mode and each of its parts back as it was afterwards."""
    before = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in before.items():
            m.training = training
