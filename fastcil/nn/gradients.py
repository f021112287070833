"""Gradients that a step takes by itself, beside the backward pass of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcil.nn.phases import phase

# Of losses that a step differentiates itself. Under autocast to fp16 small gradients of activations
# would vanish; a power of two changes no others.
_FACTOR = 1024.0


def differentiate(loss: Tensor, inputs: Sequence[Tensor], **how: Any) -> tuple[Any, ...]:
    """`torch.autograd.grad`, whose time counts as the backward pass that it is.

    Args:
        loss: A scalar.
        inputs: What it is differentiated by.
        **how: ``create_graph``, ``allow_unused``, ``materialize_grads``, as torch takes them.

    Returns:
        A gradient for each input, or None.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> differentiate((3 * x).sum(), [x])
        (tensor([3., 3.]),)
    """
    with phase("backward"):
        return torch.autograd.grad(loss, inputs, **how)


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a loss as a step may take them itself; zeros where it has none.

    Args:
        loss: A scalar, of a forward pass under autocast to any type or under none.
        parameters: Of any shapes.

    Returns:
        One for each parameter, without a graph.

    Example:
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
        >>> gradients_of((3 * a).sum(), [a, b])
        [tensor([3., 3.]), tensor(0.)]
    """
    return [g / _FACTOR for g in _scaled_gradients(loss, parameters)]


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The `gradients_of` of a loss, all parameters one after the other.

    Args:
        loss: A scalar.
        parameters: With P entries in all.

    Returns:
        [P], without a graph.

    Example:
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
        >>> flat_gradient((3 * a).sum(), [a, b])
        tensor([3., 3., 0.])
    """
    return torch.cat([g.flatten() for g in _scaled_gradients(loss, parameters)]) / _FACTOR


def _scaled_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """`gradients_of`, times a factor."""
    with torch.autocast(loss.device.type, enabled=False):
        found = differentiate(loss * _FACTOR, list(parameters), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
