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
    key: str = "CompositeExplicitAutograd",
) -> None:
    """Declare an op: its schema, its reference as the default kernel, and its shapes.

    A gradient, where there is one, is added with ``torch.library.register_autograd`` and
    ``lib=LIBRARY``.

    Args:
        schema: the op's name and signature, such as ``"f(Tensor x, int n) -> Tensor"``.
        reference: plain PyTorch, for any device without a kernel of its own.
        fake: returns empty outputs of the right shape, dtype and strides.
        key: the dispatch key of ``reference``.

    Example:
        >>> from fastcil.ops._library import define
        >>> define("doctest_twice(Tensor x) -> Tensor", lambda x: x * 2, torch.empty_like)
        >>> torch.ops.fastcil.doctest_twice(torch.ones(2))
        tensor([2., 2.])
    """
    name = schema.partition("(")[0].strip()
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, key)
    torch.library.register_fake(f"fastcil::{name}", fake, lib=LIBRARY)
