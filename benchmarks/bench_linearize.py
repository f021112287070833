"""Networks linearised at their weights: fastcil.nn.linearize beside other ways to g(x) + J psi.

ResNet-18 in evaluation, its batch norms folded into the convolutions, as `linearize` has them; psi
displaces all its weights. "torch.func.jvp" is PyTorch's forward-mode differentiation of that
network, with which ours is compared in float64 before it is timed: in float32 a ReLU whose input
all but vanishes may be on or off. "two forwards" are two passes of the network on the same images:
not the same result, but what both parts of an expansion are asked to take no longer than; "two
forwards, unfolded" are passes with batch norms as they were. The first case has no gradients; in
the second they are those in psi, of two forwards those in the weights.

Without gradients the aim can't be had: of a layer with input x and tangent t an expansion takes the
three products W x, W t and psi x, where two forwards take two, so that these take two thirds of its
time at best. With gradients ours goes back by the tangent alone.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from op_case import OURS, OpCase, Step
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.fx.experimental.optimization import fuse

from fastcil.nn import linearize, resnet18

TWO, UNFOLDED, JVP = "two forwards", "two forwards, unfolded", "torch.func.jvp"
ALLOWED = 1e-12  # relative error in the Frobenius norm, in float64


def expansion(network: nn.Module, psi: dict[str, Tensor], images: Tensor) -> Tensor:
    """By forward-mode differentiation."""
    base = {name: p.detach() for name, p in network.named_parameters()}
    primal, tangent = jvp(lambda own: functional_call(network, own, (images,)), (base,), (psi,))
    total: Tensor = primal + tangent
    return total


def twice(network: nn.Module, images: Tensor) -> Tensor:
    """Two passes."""
    total: Tensor = network(images) + network(images)
    return total


@torch.no_grad()
def check(ours: nn.Module, network: nn.Module, images: Tensor) -> None:
    """In float64."""
    ours, network = (copy.deepcopy(module).double() for module in (ours, network))
    images = images.double()
    wanted = expansion(network, dict(ours.named_parameters()), images)
    error = float((ours(images) - wanted).norm() / wanted.norm())
    assert error <= ALLOWED, f"relative error {error}"


def make(gradients: bool, name: str, full: bool) -> Step:
    """A way to the outputs, or on to their gradient, checked."""
    width, batch, side = (16, 32, 32) if full else (4, 2, 16)
    torch.manual_seed(0)
    backbone = resnet18(width, "cifar").eval()
    images = torch.randn(batch, 3, side, side)
    network, ours = fuse(backbone).requires_grad_(), linearize(backbone)
    psi = dict(ours.named_parameters())
    for p in psi.values():
        nn.init.normal_(p, std=0.01)
    if name in (TWO, UNFOLDED):
        passed = network if name == TWO else backbone
        way, trained = partial(twice, passed, images), list(passed.parameters())
    else:
        way = partial(ours, images) if name == OURS else partial(expansion, network, psi, images)
        trained = list(psi.values())
    if name == OURS:
        check(ours, network, images)

    def step() -> Any:
        if gradients:
            return torch.autograd.grad(way().sum(), trained)
        with torch.no_grad():
            return way()

    return step


CASES = [
    OpCase(
        "linearize",
        f"ResNet-18 of width 16, 32x3x32x32, {what}",
        (OURS, TWO, UNFOLDED, JVP),
        partial(make, gradients),
        threads=1,
        aims={TWO: 1.0, JVP: 1.0},
    )
    for gradients, what in ((False, "forward"), (True, "forward and backward"))
]
