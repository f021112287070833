"""Functions that torch.compile leaves as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F) -> F:
    """`torch.compiler.disable`, but nothing of the compiler is loaded before something compiles.

    That decorator loads all of it, which would take as long as torch itself wherever the decorated
    function is only defined.

    Args:
        function: What to run as it is.

    Example:
        >>> @eager  # numbers from a generator cannot be compiled
        ... def draw(seed):
        ...     return torch.rand(2, generator=torch.Generator().manual_seed(seed))
        >>> torch.equal(draw(1), draw(1))
        True
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(F, call)
