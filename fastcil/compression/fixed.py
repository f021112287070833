"""The one way in which the entropy model is computed wherever bits depend on it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)

_alone = threading.RLock()


@contextmanager
def fixed_mode() -> Iterator[None]:
    """One thread on the CPU, no autocast, no gradients; as before on leaving.

    Sums that are split among threads, and vector loops that end elsewhere in each share, give
    other last bits. On one thread the same operations on the same shapes give the same bits on the
    same machine and versions; nothing is said of other machines. Of a program's threads one is in
    it at a time, for the setting is the whole program's.

    Example:
        >>> with fixed_mode():
        ...     torch.get_num_threads()
        1
    """
    with _alone:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                yield
        finally:
            torch.set_num_threads(threads)


def fixed_copy(module: _Module, dtype: torch.dtype) -> _Module:
    """A frozen copy on the CPU, whose parameters and buffers have another dtype, in plain order.

    Example:
        >>> fixed_copy(nn.Linear(2, 3), torch.float64).weight.dtype
        torch.float64
    """
    copied = copy.deepcopy(module).eval().requires_grad_(False)
    for tensor in (*copied.parameters(), *copied.buffers()):
        # Tables are integers, and stay.
        tensor.data = laid_out(tensor, dtype if tensor.is_floating_point() else tensor.dtype)
    return copied


class FixedEntropy:
    """The entropy model and its λ-MLP, copied for `fixed_mode`, with the hash of their weights.

    A copy of its own is not made for every image, but for every state of the weights: `is_of` says
    by their version counters, which every change within autograd's sight raises, whether they are
    still those. A change behind its back, through ``.data`` in place, isn't seen.

    Args:
        modules: The entropy model, and its λ-MLP where it has one.
        dtype: Of the copies.
        digest: The hash of the modules as they are.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> fixed = FixedEntropy([layer], torch.float64, "")
        >>> fixed.is_of([layer])
        True
        >>> with torch.no_grad():
        ...     _ = layer.weight.mul_(2)
        >>> fixed.is_of([layer])
        False
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype, digest: str) -> None:
        self.entropy: Any = fixed_copy(modules[0], dtype)
        self.embedding: Any = fixed_copy(modules[1], dtype) if len(modules) > 1 else None
        self.digest = digest
        # Aliases, so that no other tensor can come to lie where one of these did.
        self._seen = [(t, t.detach(), _version(t)) for t in _tensors(modules)]

    def is_of(self, modules: Sequence[nn.Module]) -> bool:
        """Whether these modules have the weights that were copied."""
        found = _tensors(modules)
        return len(found) == len(self._seen) and all(
            tensor is known
            and tensor.data_ptr() == alias.data_ptr()
            and tensor.shape == alias.shape
            and version is not None
            and _version(tensor) == version
            for tensor, (known, alias, version) in zip(found, self._seen, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        copies = [module for module in (self.entropy, self.embedding) if module is not None]
        return sum(t.numel() * t.element_size() for t in _tensors(copies))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a model makes its own when it needs one."""


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


def _version(tensor: Tensor) -> int | None:
    """How often it was changed; None of inference tensors, which don't count."""
    return None if tensor.is_inference() else tensor._version


def laid_out(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU in plain memory order, so that no stride tells where it came from.

    Example:
        >>> laid_out(torch.zeros(1, 2, 1, 1).to(memory_format=torch.channels_last),
        ...          torch.float64).stride()
        (2, 1, 1, 1)
    """
    return x.detach().to("cpu", dtype).flatten().clone().view(x.shape)
