"""The quadratic penalty: fastcil.curvature.half_quadratic beside autograd's way.

Value and gradient of 1/2 <D, G D A> for one layer of ResNet-18, a 3x3 convolution of so many
channels: D is [C, 9 C + 1], A and G symmetric. "autograd" writes the value as it reads and leaves
the gradient to PyTorch; both are compared with G D A in float64 before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from op_case import OURS, OpCase, Step
from torch import Tensor

from fastcil.curvature import half_quadratic
from fastcil.curvature.penalty import kronecker_product


def by_hand(inner: Tensor, output: Tensor, d: Tensor) -> Tensor:
    """As the formula reads."""
    return 0.5 * torch.sum(d * (output @ d @ inner))


def ours(inner: Tensor, output: Tensor, d: Tensor) -> Tensor:
    """As methods call it."""
    return half_quadratic([d], [kronecker_product([(inner, output)])])


def both(value: Callable[[Tensor], Tensor], d: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    d = d.detach().requires_grad_()
    result = value(d)
    (gradient,) = torch.autograd.grad(result, d)
    return result, gradient


def make(channels: int, name: str, full: bool, device: str = "cpu") -> Step:
    """A way to the value and its gradient, checked."""
    c = channels if full else 4
    generator = torch.Generator().manual_seed(0)
    inner, output = (
        m @ m.T / len(m) for m in (torch.randn(n, n, generator=generator) for n in (9 * c + 1, c))
    )
    d = torch.randn(c, 9 * c + 1, generator=generator)
    inner, output, d = (m.to(device) for m in (inner, output, d))
    step = partial(both, partial({OURS: ours, "autograd": by_hand}[name], inner, output), d)
    _, gradient = step()
    wanted = output.double() @ d.double() @ inner.double()
    assert float((gradient - wanted).norm()) <= 1e-5 * float(wanted.norm())
    return step


CHANNELS = (64, 128, 256, 512)
CASES = [
    OpCase(
        "penalty",
        f"value and gradient, 3x3 convolution of {channels} channels",
        (OURS, "autograd"),
        partial(make, channels),
        threads=1,
        aims={"autograd": 1.5},
    )
    for channels in CHANNELS
]
