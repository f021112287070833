"""Named tensors that come and go, as a module's part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Tensors(nn.Module):
    """Tensors by any name, saved and moved with the module they are a part of.

    A module's buffers have names without dots and are there from the start; what a method keeps
    for old tasks is named after other modules' parameters and changes from task to task. An
    object of this class never changes: it is replaced.

    Args:
        values: The tensors; they are detached, not copied.

    Example:
        >>> kept = Tensors({"layer.weight": torch.zeros(2)})
        >>> kept["layer.weight"], kept.nbytes
        (tensor([0., 0.]), 8)
    """

    kind = "tensors"

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.names = tuple(values or ())
        self._place = {name: f"tensor{number}" for number, name in enumerate(self.names)}
        for number, value in enumerate((values or {}).values()):
            self.register_buffer(f"tensor{number}", value.detach())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Tensor:
        value: Tensor = getattr(self, self._place[name])
        return value

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.numel() * value.element_size() for value in self.buffers())

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, by the rest of their names."""
        return {n[len(prefix) :]: self[n] for n in self.names if n.startswith(prefix)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves to devices, but keeps every tensor's own layout and dtype."""
        for name, value in list(self._buffers.items()):
            if value is not None:
                moved = fn(value.new_empty(0))
                self._buffers[name] = value.to(moved.device)
        return self

    def structure(self) -> dict[str, Any]:
        """What ``build`` needs; JSON-able."""
        return {"kind": self.kind, "names": list(self.names)}

    @classmethod
    def build(cls, structure: Mapping[str, Any]) -> Tensors:
        """Empty tensors of those names, to be loaded."""
        return cls({name: torch.empty(0) for name in structure["names"]})
