"""Convolutions whose weights stay, but for a learnable scale of each pair of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from fastcil.errors import FastcilError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class ScaledConv2d(nn.Conv2d):
    r"""A convolution with frozen weight and one learnable scale per pair of channels.

    .. math:: y_o = b_o + \sum_i s_{oi} \, (W_{oi} * x_i)

    (Sun et al. 2019, Meta-transfer learning, Eq. 4: scaling by :math:`\Phi_{S_1}`; the "weight
    transfer" of Liu et al. 2020, Mnemonics, and the stable blocks of Liu et al. 2021, AANets). W is
    a buffer, so that nothing trains it, with the name it had as a parameter; s starts at 1. A bias
    goes on as a parameter: it is what those papers' shift :math:`\Phi_{S_2}` adds up with.

    Args:
        conv: The convolution; its bias is shared, its weight as well.

    Attributes:
        weight: W, a buffer.  # [out, in / groups, kh, kw]
        scale: s, a parameter.  # [out, in / groups, 1, 1]

    Raises:
        FastcilError: If ``conv`` is of a subclass, which may compute something else.

    Example:
        >>> scaled = ScaledConv2d(nn.Conv2d(3, 8, 5, bias=False))
        >>> [(name, tuple(p.shape)) for name, p in scaled.named_parameters()]
        [('scale', (8, 3, 1, 1))]
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        if type(conv) is not nn.Conv2d:
            raise FastcilError(
                f"conv is a {type(conv).__name__}; only nn.Conv2d itself can be scaled."
            )
        super().__init__(**_shape(conv))
        del self.weight
        weight = conv.weight.detach()
        self.register_buffer("weight", weight)
        self.bias = conv.bias
        self.scale = nn.Parameter(weight.new_ones(*weight.shape[:2], 1, 1))
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> [B, out, h', w']."""
        return self._conv_forward(x, self.weight * self.scale, self.bias)

    def merged(self) -> nn.Conv2d:
        """An ordinary convolution that computes the same, with a weight of its own: s W."""
        conv = nn.Conv2d(**_shape(self))
        conv.weight = nn.Parameter((self.weight * self.scale).detach())
        conv.bias = self.bias
        return conv.train(self.training)


def scale_convolutions(module: ModuleT) -> ModuleT:
    """Freezes the weight of every convolution and gives it a learnable scale, in place.

    Whatever else a module has, batch norms above all, stays as it is and may train. Names of
    tensors stay, each convolution has a new ``scale`` beside its ``weight``; a convolution that has
    one already keeps it. A network that computes something starts by computing the same.

    What is restored from a file is made by this function first: `fastcil.nn.Network.build` with
    ``lambda: scale_convolutions(make_backbone())``; `has_scales` says of a network that it must be.

    Args:
        module: A feature extractor, or a network.

    Returns:
        ``module``.

    Raises:
        FastcilError: If it has no convolution, or one of a subclass of ``nn.Conv2d``.

    Example:
        >>> from fastcil.nn import resnet20
        >>> stable = scale_convolutions(resnet20(width=4))
        >>> tuple(stable.stages[0][0].conv1.scale.shape)
        (4, 4, 1, 1)
    """
    plain = _places(module, lambda part: not isinstance(part, ScaledConv2d))
    if not plain and not has_scales(module):
        raise FastcilError(
            f"module {type(module).__name__} has no nn.Conv2d in it; there is nothing to scale."
        )
    _exchange(plain, ScaledConv2d)
    return module


def merge_scales(module: ModuleT) -> ModuleT:
    """Undoes `scale_convolutions`, in place: weights that are multiplied by their scales, and free.

    Args:
        module: What has scaled convolutions; anything else is left as it is.

    Returns:
        ``module``.

    Example:
        >>> from fastcil.nn import resnet20
        >>> has_scales(merge_scales(scale_convolutions(resnet20(width=4))))
        False
    """
    _exchange(_places(module, lambda part: isinstance(part, ScaledConv2d)), ScaledConv2d.merged)
    return module


def has_scales(module: nn.Module) -> bool:
    """Whether a module has scaled convolutions."""
    return any(isinstance(part, ScaledConv2d) for part in module.modules())


def _shape(conv: nn.Conv2d) -> dict[str, Any]:
    """Arguments of a convolution like another, without bias, whose weight takes no memory."""
    sizes = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    same = {name: getattr(conv, name) for name in (*sizes, "groups", "padding_mode")}
    return {**same, "bias": False, "device": "meta"}


def _places(
    module: nn.Module, wanted: Callable[[nn.Conv2d], bool]
) -> list[tuple[nn.Module, str, nn.Conv2d]]:
    """Convolutions within a module, each with what it is a part of, and under which name."""
    return [
        (owner, name, part)
        for owner in module.modules()
        for name, part in owner._modules.items()
        if isinstance(part, nn.Conv2d) and wanted(part)
    ]


def _exchange(
    places: list[tuple[nn.Module, str, nn.Conv2d]], make: Callable[[Any], nn.Conv2d]
) -> None:
    """Puts something else in these places; what stood in several still does."""
    # All are made before any is put in: where that fails, nothing has changed.
    fresh = {part: make(part) for part in {part: None for _, _, part in places}}
    for owner, name, part in places:
        owner._modules[name] = fresh[part]
