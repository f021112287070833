"""What few-shot sessions leave as it is: most convolutions, and the classifier's old rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcil.nn.heads import LinearHead
from fastcil.nn.network import Network
from fastcil.nn.unit import unit_vectors

Trains = Literal["all", "last-block"]
"""What later tasks train: everything, or of all convolutions only those of the last block."""


def session_parameters(network: Network, trains: Trains) -> list[nn.Parameter]:
    """What a task after the first one trains of a network.

    Args:
        network: Its batch norms train, unless they are frozen; so does its head.
        trains: ``last-block`` leaves out the weights and biases of every convolution but those of
            each extractor's last residual block, as the code of Tao et al. (2020) does.

    Example:
        >>> from fastcil.nn import resnet20
        >>> network = Network([resnet20(width=4)], LinearHead(16, classes=5))
        >>> rows = [p.ndim for p in session_parameters(network, "last-block")]
        >>> rows.count(4), rows.count(2)  # kernels of convolutions, weights of the head
        (2, 1)
    """
    parameters = network.trained_parameters()
    if trains == "all":
        return parameters
    left_out = {p for extractor in network.extractors for p in early_convolutions(extractor)}
    return [p for p in parameters if p not in left_out]


def early_convolutions(extractor: nn.Module) -> set[nn.Parameter]:
    """Weights and biases of every convolution but those of an extractor's `last_block`."""
    convolutions = (m for m in extractor.modules() if _convolves(m))
    every = {p for m in convolutions for p in m.parameters(recurse=False)}
    return every - set(last_block(extractor).parameters())


def last_block(extractor: nn.Module) -> nn.Module:
    """The last part of an extractor that holds convolutions, below its sequences of parts.

    Of a residual network its last block; of a plain chain of layers its last convolution.

    Args:
        extractor: A feature extractor; itself, if it holds no convolution.
    """
    found = extractor
    while found is extractor or isinstance(found, (nn.Sequential, nn.ModuleList)):
        holding = [c for c in found.children() if any(_convolves(m) for m in c.modules())]
        if not holding:
            break
        found = holding[-1]
    return found


def scores_keeping(head: LinearHead, features: Tensor, known: int) -> Tensor:
    """Logits of a linear head whose rows of known classes get no gradient.

    Args:
        head: The head.
        features: [B, D]
        known: Rows that the loss does not move; an optimiser's weight decay still may.

    Returns:
        What ``head(features)`` gives.  # [B, K]
    """
    if head.normalised:
        features = unit_vectors(features).to(features.dtype)

    def keeping(values: Tensor) -> Tensor:
        return torch.cat([values[:known].detach(), values[known:]])

    bias = None if head.bias is None else keeping(head.bias)
    return functional.linear(features, keeping(head.weight), bias)


def _convolves(module: nn.Module) -> bool:
    """Whether a module is a convolution."""
    return isinstance(module, nn.modules.conv._ConvNd)
