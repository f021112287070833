"""The ``fastcil`` operator library: the one place where ops are declared and kernels meet.

An op's schema and its plain PyTorch reference are declared here from Python. C++ kernels join
under the ``CPU`` key when ``fastcil._C`` is loaded, before or after; Triton kernels under ``CUDA``.
The dispatcher then takes the most special kernel there is, so nothing else asks for the device.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fastcil", "DEF")


def _load_extension() -> bool:
    """Load the C++ kernels if they were built; say so if they were but cannot be used."""
    try:
        # By name: a plain import would read as if the ops needed the whole package.
        importlib.import_module("fastcil._C")
    except ModuleNotFoundError:
        return False
    except ImportError as error:
        warnings.warn(
            f"fastcil._C was built but cannot be loaded ({error}): the PyTorch reference runs "
            "instead; rebuild the extension against the installed torch",
            stacklevel=2,
        )
        return False
    return True


_EXTENSION = _load_extension()


def extension_available() -> bool:
    """Whether the compiled C++ kernels are loaded.

    Returns:
        False when fastcil was installed without them (``FASTCIL_NO_EXT=1``); every op then runs
        its PyTorch reference.

    Example:
        >>> extension_available() in (True, False)
        True
    """
    return _EXTENSION


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: str | None = None,
) -> None:
    """Declare an op: its schema, its reference as the default kernel, and its shapes.

    A gradient, where there is one, is added with ``torch.library.register_autograd`` and
    ``lib=LIBRARY``.

    Args:
        schema: the op's name and signature, such as ``"f(Tensor x, int n) -> Tensor"``.
        reference: plain PyTorch, for any device without a kernel of its own.
        fake: returns empty outputs of the right shape, dtype and strides.
        kernel: where the CUDA launcher of the same signature is, such as
            ``"fastcil.kernels.pade:pade"``; imported when the op first meets a CUDA tensor.

    Example:
        >>> from fastcil.ops._library import define
        >>> define("doctest_twice(Tensor x) -> Tensor", lambda x: x * 2, torch.empty_like)
        >>> torch.ops.fastcil.doctest_twice(torch.ones(2))
        tensor([2., 2.])
    """
    name = schema.partition("(")[0].strip()
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if kernel is not None:
        LIBRARY.impl(name, _lazily(kernel, reference), "CUDA")
    torch.library.register_fake(f"fastcil::{name}", fake, lib=LIBRARY)


def _lazily(kernel: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher that ``kernel`` names, looked up at the first call: Triton takes long to import.

    Where there is no Triton (it is not built for every platform), the reference, with a warning.
    """
    found: list[Callable[..., Any]] = []

    def launch(*args: Any) -> Any:
        if not found:
            found.append(_find(kernel, reference))
        return found[0](*args)

    return launch


def _find(kernel: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    module, _, name = kernel.partition(":")
    try:
        launcher: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        warnings.warn(
            f"{kernel} cannot be loaded ({error}): the PyTorch reference runs instead; install "
            "triton to have the fused kernel",
            stacklevel=4,
        )
        return reference
    return launcher
