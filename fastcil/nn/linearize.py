"""Networks linearised at their weights (Mu et al. 2020; Achille et al. 2021; Shon et al. 2022)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastcil.errors import FastcilError
from fastcil.nn.propagation import Program
from fastcil.nn.shares import in_shares
from fastcil.nn.tangent import TangentConv2d, TangentLinear, TangentPair
from fastcil.nn.tracing import Traced

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Linearized(nn.Module):
    """A network's first-order expansion in its weights; ``linearize`` makes it.

    Its parameters are the displacement psi, one ``weight`` and ``bias`` in each ``TangentConv2d``
    and ``TangentLinear``; these have the paths of the layers whose place they take. Its buffers are
    the network as it was. Training and evaluation mode are the same to it.

    Args:
        traced: The network.

    Attributes:
        out_channels: As the network has it; absent where that has none.

    Raises:
        FastcilError: If the network does what there is no rule for.
    """

    out_channels: Any

    def __init__(self, traced: Traced) -> None:
        super().__init__()
        program = Program(traced)
        self._steps = tuple(program.steps)
        self._slots, self._result = program.slots, program.result
        for path, layer in program.layers.items():
            *owners, name = path.split(".")
            owner: nn.Module = self
            for part in owners:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(name, layer)

    def tangent(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts of the output, by augmented propagation (Shon et al. 2022, Appendix B).

        Without a gradient to the images only the tangent is in autograd's graph: the network as it
        was has nothing to train. A gradient to the images is that of both parts.

        Args:
            images: What the network reads.  # [B, 3, H, W]

        Returns:
            g(x; psi0) and D_psi g(x; psi0) psi.  # as the network's output each
        """
        pair: tuple[Tensor, Tensor] = in_shares(self, self._propagate, images)
        return pair

    def _propagate(self, images: Tensor) -> tuple[Tensor, Tensor]:
        values: list[TangentPair | None] = [None] * self._slots
        values[0] = TangentPair(images, None)
        for step in self._steps:
            values[step.slot] = step.rule(self, values)
            for slot in step.done:
                values[slot] = None
        primal, tangent = values[self._result] or (images, None)
        return primal, torch.zeros_like(primal) if tangent is None else tangent

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> g(x; psi0) + D_psi g(x; psi0) psi, as the network's output."""
        primal, tangent = self.tangent(images)
        return primal + tangent


def linearize(module: nn.Module) -> Linearized:
    r"""A network's first-order expansion at its weights, of which only the displacement trains.

    .. math:: g_{lin}(x; \psi) = g(x; \psi_0) + D_\psi g(x; \psi_0) \, \psi

    (Shon et al. 2022, Eq. 6; Mu et al. 2020.) psi starts at zero, so that the result first gives
    what the network gives in evaluation. One pass computes both parts: each operation takes a value
    and its tangent, by the rules of Shon et al. 2022, Table 4. It costs three convolutions where
    the network has one, the least that the derivative of a product takes, and has no batch norm.

    Batch norms are taken in evaluation. One that alone follows a convolution or a linear layer is
    folded into it first, and psi are coordinates of that folded network, as in the papers: a folded
    layer has a bias. Any other batch norm is a fixed affine map without a displacement. A layer
    without a bias, none folded into it, keeps none. What one module does in several places has one
    displacement.

    The rules cover ``nn.Conv2d`` of any kind, ``nn.Linear``, batch norms, ReLU and LeakyReLU, max-
    and average pooling, dropout (nothing in evaluation), flattening and reshaping, padding,
    slicing, sums, means, products with numbers, and concatenation, as modules or as functions. At
    zero a (leaky) ReLU has the slope of its negative side.

    The network is traced by ``torch.fx``; hooks on its modules are not called.

    Args:
        module: The network: one tensor in, one tensor out. It stays as it is; ``leaky`` turns its
            ReLUs into LeakyReLUs, as the papers do before.

    Returns:
        The linearised network, on the device and in the type of the network, which serves as an
        extractor of ``Network`` where that does.

    Raises:
        FastcilError: If the network cannot be traced, does what there is no rule for, or has no
            layer to displace.

    Example:
        >>> from fastcil.nn import LinearHead, Network, resnet20
        >>> backbone = resnet20(width=4).double().eval()
        >>> linearized = linearize(backbone)
        >>> images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        >>> torch.allclose(linearized(images), backbone(images))
        True
        >>> Network([linearized.float()], LinearHead(16, classes=5))(images.float()).shape
        torch.Size([2, 5])
    """
    linearized = Linearized(Traced(module))
    if not any(isinstance(part, TangentConv2d | TangentLinear) for part in linearized.modules()):
        raise FastcilError(
            f"module {type(module).__name__} has no nn.Conv2d or nn.Linear; there is nothing to "
            "displace without one."
        )
    if hasattr(module, "out_channels"):
        linearized.out_channels = module.out_channels
    return linearized


def leaky(module: ModuleT, slope: float = 0.01) -> ModuleT | nn.LeakyReLU:
    """Replaces every ReLU of a network by a LeakyReLU, in place.

    Linearised networks fit better with it, for no unit's derivative is ever zero (Achille et al.
    2021: LQF). The network's function changes a little: it is to be trained some more before it is
    linearised (for one epoch in Shon et al. 2022, Sec. 4.1).

    Args:
        module: The network; its activations must be ``nn.ReLU`` modules.
        slope: Of the negative side, above 0.

    Returns:
        ``module``, or the LeakyReLU where it is itself a ReLU.

    Raises:
        FastcilError: If there is no ReLU, or the slope is not above 0.

    Example:
        >>> leaky(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))[1]
        LeakyReLU(negative_slope=0.01)
    """
    if not slope > 0:
        raise FastcilError(f"slope is {slope}; it must be above 0.")
    if isinstance(module, nn.ReLU):
        return nn.LeakyReLU(slope, module.inplace)
    fresh: dict[nn.Module, nn.LeakyReLU] = {}
    for owner in list(module.modules()):
        for name, part in owner._modules.items():
            if isinstance(part, nn.ReLU):
                if part not in fresh:
                    fresh[part] = nn.LeakyReLU(slope, part.inplace).train(part.training)
                owner._modules[name] = fresh[part]
    if not fresh:
        raise FastcilError(
            f"module {type(module).__name__} has no nn.ReLU module; give each activation a module "
            "of its own instead of calling a function."
        )
    return module
