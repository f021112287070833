"""The Padé activation, forward and backward and to second order, beside other ways to have it.

float32 [64, 64, 56, 56], version A, degrees (5, 4), coefficients of a fit to ReLU. "eager" and
"compiled" are Horner's scheme in PyTorch; F.gelu is what a fixed activation costs;
rational-activations is the package of the CIM authors, where it is installed. The second order is
the gradient of <gradient, directions> by all that it depends on, from a graph that is kept: for a
quarter of the batch, because eager keeps some hundred tensors for it. torch.compile refuses it.

A way is timed only after its results have been compared with float64's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from op_case import OURS, OpCase, Step
from torch import Tensor
from torch.nn import functional

from fastcil import ops

NUMERATOR = [0.029967598, 0.616990705, 2.372987287, 3.058671231, 1.518767212, 0.251436266]
DENOMINATOR = [1.190752408, 4.397182940, 0.907627365, 0.346941462]


@dataclass(frozen=True)
class Work:
    """What a step is given; all leaves of autograd."""

    x: Tensor
    numerator: Tensor
    denominator: Tensor
    gradient: Tensor  # that by f(x)
    directions: tuple[Tensor, Tensor, Tensor]  # one for each gradient

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.numerator, self.denominator


def make_work(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Work:
    """The same numbers in each dtype."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    x, gradient, dx = (normal(*shape).requires_grad_() for _ in range(3))
    a, b = (torch.tensor(c).to(device, dtype).requires_grad_() for c in (NUMERATOR, DENOMINATOR))
    return Work(x, a, b, gradient, (dx.detach(), normal(6), normal(4)))


def horner(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Version A as one would write it."""
    a, b = numerator.unbind(), denominator.abs().unbind()
    size = x.abs()
    p, q = a[-1], b[-1]
    for coefficient in a[-2::-1]:
        p = p * x + coefficient
    for coefficient in b[-2::-1]:
        q = q * size + coefficient
    return p / (q * size + 1)


def powers(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """The definition."""
    p = sum(a * x**k for k, a in enumerate(numerator))
    return p / (1 + sum((b * x**k).abs() for k, b in enumerate(denominator, 1)))


def first_order(name: str, work: Work) -> Step:
    """The value and its gradient, by this way."""
    x, a, b = leaves = work.inputs
    if name == "F.gelu":
        return lambda: (y := functional.gelu(x), *torch.autograd.grad(y, x, work.gradient))
    if name == "rational-activations":
        from rational.torch import Rational

        layer = Rational("relu", (5, 4), cuda=False, version="A")
        layer.numerator.data, layer.denominator.data = a.detach().clone(), b.detach().clone()
        leaves = (x, layer.numerator, layer.denominator)
        return lambda: (y := layer(x), *torch.autograd.grad(y, leaves, work.gradient))
    function = {
        OURS: ops.pade,
        "eager": horner,
        "float64": powers,
        "compiled": torch.compile(horner, dynamic=False),
    }[name]
    return lambda: (y := function(x, a, b), *torch.autograd.grad(y, leaves, work.gradient))


def second_order(name: str, work: Work) -> Step:
    """The gradient of <gradient, directions>, by this way."""
    function = {OURS: ops.pade, "eager": horner, "float64": powers}[name]
    grads = torch.autograd.grad(
        function(*work.inputs), work.inputs, work.gradient, create_graph=True
    )
    leaves = (work.gradient, *work.inputs)
    return lambda: torch.autograd.grad(grads, leaves, work.directions, retain_graph=True)


def make(order: Callable[[str, Work], Step], name: str, shape: tuple[int, ...]) -> Step | None:
    """A step, compared with float64's on a few images."""
    if name == "rational-activations" and not find_spec("rational"):
        return None
    if name != "F.gelu":
        few = (min(shape[0], 2), *shape[1:])
        truth = order("float64", make_work(few, torch.float64))()
        for ours, exact in zip(order(name, make_work(few))(), truth, strict=True):
            gap = float((ours - exact).detach().norm() / exact.detach().norm())
            assert gap < 1e-4, f"{name} computes something else: relative error {gap}"
    return order(name, make_work(shape))


def make_first(name: str, full: bool) -> Step | None:
    return make(first_order, name, (64, 64, 56, 56) if full else (4, 4, 7, 7))


def make_second(name: str, full: bool) -> Step | None:
    return make(second_order, name, (16, 64, 56, 56) if full else (4, 4, 7, 7))


CASES = [
    OpCase(
        "pade",
        "forward and backward, 64x64x56x56",
        (OURS, "F.gelu", "compiled", "eager", "rational-activations"),
        make_first,
        aims={"F.gelu": 1.0, "compiled": 1.3, "eager": 20, "rational-activations": 60},
    ),
    OpCase("pade", "second order, 16x64x56x56", (OURS, "eager"), make_second, aims={"eager": 5}),
]
