"""Whether this machine and installation can do what fastcil does."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from fastcil.engine.environment import environment


def findings() -> list[tuple[str, str, bool]]:
    """What there is, as (name, finding, whether it is as good as it can be here)."""
    found: dict[str, Any] = environment("auto")
    rows = [
        ("fastcil", f"{found['fastcil']}, commit {found['commit'] or 'unknown'}", True),
        ("python", found["python"], True),
        ("torch", found["torch"], True),
        ("processor", found["processor"], True),
        ("device", found["device"], True),
        _extension(),
        _triton(),
        _data(),
    ]
    rows += [_package(name, use) for name, use in _EXTRAS.items()]
    return rows


_EXTRAS = {
    "onnxscript": "export to ONNX",
    "onnxruntime": "running exported ONNX models",
    "tensorboard": "TensorBoard logs",
    "sklearn": "t-SNE of features",
    "pytorch_msssim": "MS-SSIM of codecs",
    "imagecodecs": "JPEG XL beside codecs",
}


def _extension() -> tuple[str, str, bool]:
    """Build facts of the C++ kernels."""
    if importlib.util.find_spec("fastcil._C") is None:
        return (
            "C++ kernels",
            "absent: the PyTorch references run; reinstall with a C++ compiler for speed",
            False,
        )
    try:
        from fastcil import _C
    except ImportError as error:
        return "C++ kernels", f"built, but can't be loaded ({error}): rebuild them", False
    facts = _C.build_facts()
    return "C++ kernels", ", ".join(f"{k} {v}" for k, v in facts.items()), True


def _triton() -> tuple[str, str, bool]:
    if importlib.util.find_spec("triton") is None:
        return "triton", "absent: needed on CUDA only", not torch.cuda.is_available()
    from importlib.metadata import version

    found = version("triton")
    major, minor = map(int, found.split(".")[:2])
    if (major, minor) < (3, 5):
        return "triton", f"{found}: too old for the kernels; install 3.5 or later", False
    return "triton", found, True


def _data() -> tuple[str, str, bool]:
    folder = os.environ.get("FASTCIL_DATA")
    if folder is None:
        return "FASTCIL_DATA", "not set: data are found by path", True
    there = os.path.isdir(folder)
    return "FASTCIL_DATA", folder if there else f"{folder}, which is no folder", there


def _package(name: str, use: str) -> tuple[str, str, bool]:
    there = importlib.util.find_spec(name) is not None
    return name, "there" if there else f"absent: needed for {use}", there
