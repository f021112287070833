"""How networks start, are copied and become teachers."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from fastcil.nn.heads import LinearHead
from fastcil.nn.network import Network

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def start_network(
    backbone: nn.Module, classes: int, bias: bool = True, normalised: bool = False
) -> Network:
    """A network of one extractor and a fresh linear head, on the extractor's device.

    Args:
        backbone: The extractor.
        classes: Outputs of the head.
        bias: Whether the head has a bias.
        normalised: Whether the head reads feature vectors of unit length, without a bias.

    Example:
        >>> import torch
        >>> from fastcil.nn import resnet20
        >>> network = start_network(resnet20(width=4), classes=5)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """
    return with_head(backbone, LinearHead(channels(backbone), classes, bias, normalised))


def with_head(backbone: nn.Module, head: nn.Module) -> Network:
    """A network of one extractor and a head of any kind, which moves to the extractor's device.

    Args:
        backbone: The extractor.
        head: The head, drawn on the CPU, so that a seed means the same on every device.

    Example:
        >>> from fastcil.nn import CosineHead, resnet20
        >>> with_head(resnet20(width=4), CosineHead(16, classes=5)).head
        CosineHead(16, 5, old=0)
    """
    return Network([backbone], _beside(head, backbone))


def new_head(like: nn.Module, in_features: int, classes: int, bias: bool = True) -> LinearHead:
    """A fresh linear head on the device of another module.

    The weights are drawn on the CPU, so that a seed means the same on every device.

    Args:
        like: A module with parameters.
        in_features: Features that the head reads.
        classes: Outputs.
        bias: Whether the head has a bias.
    """
    return _beside(LinearHead(in_features, classes, bias=bias), like)


def _beside(head: ModuleT, like: nn.Module) -> ModuleT:
    """A head on the device of another module."""
    parameter = next(iter(like.parameters()), None)
    return head if parameter is None else head.to(parameter.device)


def linear_head(network: Network) -> LinearHead:
    """The head of a network that was started with a linear one.

    Raises:
        TypeError: It has another head.
    """
    if not isinstance(network.head, LinearHead):
        raise TypeError(f"head is a {type(network.head).__name__}; it must be a LinearHead.")
    return network.head


def trained_with_new_rows(network: Network) -> list[nn.Parameter]:
    """What a stage trains that holds the classes known before: all but the head's ``old`` block.

    Where the head's ``new`` block is empty, the task having brought no class, ``old`` trains.

    Args:
        network: Its head is a `CosineHead` or a `ProxyHead`.
    """
    head: Any = network.head
    left_out = head.old if len(head.new) else head.new
    return [p for p in network.trained_parameters() if p is not left_out]


def channels(extractor: nn.Module) -> int:
    """Features that an extractor gives."""
    number: Any = extractor.out_channels
    return int(number)


def successor(module: ModuleT) -> ModuleT:
    """A copy of a module, frozen or not, that is free to train and in training mode."""
    return copy.deepcopy(module).requires_grad_(True).train()


def frozen_copy(network: Network) -> Network:
    """A copy of a network that no longer changes: a teacher.

    All extractors are frozen, so that they stay in evaluation mode and keep their batch-norm
    statistics whatever ``train()`` says.
    """
    teacher = copy.deepcopy(network)
    teacher.freeze(*range(len(teacher.extractors)))
    return teacher.requires_grad_(False)
