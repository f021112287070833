"""Small codecs with weights at which every part matters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastcil.compression.hierarchical import Posterior
from fastcil.compression.hyperprior import HyperEncoder
from fastcil.compression.model import CodecModel
from fastcil.compression.zoo import build_codec

SMALL = {
    "hierarchical-tiny": {},
    "msh-vr": {"hidden": 6, "latent": 8, "embedding": 8},
    "msh": {"hidden": 6, "latent": 8},
    "gma-vr": {"hidden": 4, "parameters": 8, "embedding": 8},
    "gma": {"hidden": 4, "parameters": 8},
}


@pytest.fixture
def lively() -> Callable[[str], CodecModel]:
    """Builds a small codec by name whose symbols and scales are spread out."""

    def build(name: str) -> CodecModel:
        torch.manual_seed(0)
        model = build_codec(name, **SMALL[name]).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("layer_scale"):
                    parameter.normal_().mul_(0.3)
                elif parameter.ndim == 4 and key.startswith("entropy"):
                    parameter.mul_(0.7 if ".prior." in key else 1.5)
            for module in model.modules():
                if isinstance(module, Posterior):
                    module.project.weight.mul_(4)
                if isinstance(module, HyperEncoder):
                    for transform in (module.analysis, module.hyper):
                        last = [m for m in transform.modules() if isinstance(m, nn.Conv2d)][-1]
                        last.weight.mul_(30)
        return model

    return build


@pytest.fixture
def images() -> Callable[..., torch.Tensor]:
    """Random images with some structure, in 0..1."""

    def draw(batch: int, height: int, width: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(batch * height + width)
        coarse = torch.rand(batch, 3, 5, 7, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        noise = torch.rand(batch, 3, height, width, generator=generator)
        return 0.8 * smooth + 0.2 * noise

    return draw
