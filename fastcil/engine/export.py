"""A method's network as a file that other programs run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcil.contract import Method
from fastcil.data import Augmentation
from fastcil.errors import FastcilError

FORMATS = ("onnx", "torch")


class _Classifier(torch.nn.Module):
    """What is exported: normalised images -> logits."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.method(images)
        return scores


def export_method(method: Method, augmentation: Augmentation, path: Path, format: str) -> Path:
    """Writes what ``method.forward`` computes, for any batch size, in evaluation mode.

    The draft is written beside the target and moved there when complete.

    Args:
        method: What to export.
        augmentation: Gives the image side.
        path: Where to.
        format: ``onnx`` (needs the onnx and onnxscript packages) or ``torch``.

    Raises:
        FastcilError: Another format, or packages that are not installed.
    """
    if format not in FORMATS:
        raise FastcilError(f"format is '{format}'; use 'onnx' or 'torch'.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # torch.export bakes a batch size of 1 in as a constant; 2 stays symbolic.
    images = torch.zeros(2, 3, augmentation.size, augmentation.size)
    model = copy_for_export(method)
    batch = torch.export.Dim("batch", min=1)
    draft = path.with_name(f".{path.name}.draft{path.suffix}")
    try:
        if format == "torch":
            program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: batch}})
            torch.export.save(program, draft)
        else:
            _write_onnx(model, images, draft, batch)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def copy_for_export(method: Method) -> torch.nn.Module:
    """A CPU copy in evaluation mode; torch.export takes of it only what ``forward`` uses."""
    context = method.context
    del method.context
    try:
        copied = copy.deepcopy(method).cpu()
    finally:
        method.context = context
    return _Classifier(copied).eval().requires_grad_(False)


def _write_onnx(model: torch.nn.Module, images: Tensor, path: Path, batch: Any) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise FastcilError(
            "format is 'onnx', which needs the packages onnx and onnxscript; "
            "pip install 'fastcil[onnx]'."
        ) from error
    torch.onnx.export(
        model,
        (images,),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: batch}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
