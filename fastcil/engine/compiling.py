"""Objectives compiled one by one, whatever else is compiled in the process."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import count
from types import CodeType, FunctionType
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_numbers = count()


def compile_alone(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """`torch.compile` of a function of one argument, with graphs of its own, gone when it goes.

    torch keeps graphs by the code that they were traced from, and traces the same code eight times
    at most: the stages of a long stream, whose networks and heads differ, would soon run eagerly.
    To forget all graphs before each stage would be to forget the caller's own too. So the function
    is called from a copy of these lines, which torch knows nothing of. Only where a graph breaks
    does what follows count for the code that it broke in.

    Args:
        function: What to compile.

    Example:
        >>> first, second = compile_alone(torch.cos), compile_alone(torch.cos)  # two graphs
    """

    def stage(argument: Any) -> T:
        return function(argument)

    # A name of its own too, by which torch remembers the sizes it has seen.
    code = stage.__code__.replace(co_name=f"stage_{next(_numbers)}")
    alone = FunctionType(code, stage.__globals__, code.co_name, None, stage.__closure__)
    compiled: Callable[[Any], T] = torch.compile(alone)
    # torch's table of what it traced would keep the graphs for good.
    weakref.finalize(alone, _forget, code).atexit = False
    return compiled


def _forget(code: CodeType) -> None:
    """Lets go of the graphs of one code, as `torch.compiler.reset` does with all."""
    from torch._dynamo.eval_frame import reset_code

    reset_code(code)
