"""Learned codecs of a few thousand weights, whose streams say something."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastcil.compression.hierarchical import Posterior
from fastcil.compression.hyperprior import HyperEncoder
from fastcil.compression.model import CodecModel
from fastcil.compression.zoo import build_codec

SHAPES: dict[str, dict[str, Any]] = {
    "hierarchical-tiny": {
        "channels": (6, 6, 6, 6, 6),
        "kernels": (3, 3, 3, 3, 3),
        "latents": (4, 4, 4, 2),
        "embedding": 8,
    },
    "msh-vr": {"hidden": 6, "latent": 8, "embedding": 8},
}


def tiny_codec(name: str = "msh-vr", seed: int = 0) -> CodecModel:
    """A codec with random weights at which every part matters; ``msh-vr`` is the faster one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_codec(name, **SHAPES[name]).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("layer_scale"):
                    parameter.normal_().mul_(0.3)
            for module in model.modules():
                if isinstance(module, Posterior):
                    module.project.weight.mul_(8)
                if isinstance(module, HyperEncoder):
                    for transform in (module.analysis, module.hyper):
                        last = [m for m in transform.modules() if isinstance(m, nn.Conv2d)][-1]
                        last.weight.mul_(30)
    return model
