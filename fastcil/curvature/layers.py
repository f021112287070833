"""What curvature needs of layers: inputs, gradients at outputs, gradients of single samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from fastcil.curvature.input_factor import ConvInputFactor
from fastcil.errors import FastcilError
from fastcil.nn import LinearHead, TangentConv2d, TangentLinear

_CONVOLUTIONS = (nn.Conv2d, TangentConv2d)
_LINEAR = (nn.Linear, LinearHead, TangentLinear)


@dataclass
class Layer:
    """A layer with weights, and what passed through it in a forward pass.

    Args:
        name: Its path in the model.
        module: A convolution or a linear layer, or the linearised form of one.
        calls: Input and the place of the output in the graph, of every call.
    """

    name: str
    module: nn.Module
    calls: list[tuple[Tensor, GradientEdge]] = field(default_factory=list)

    @property
    def bias(self) -> bool:
        """Whether it has a bias."""
        return self.module.bias is not None

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for a linear layer."""
        groups: int = getattr(self.module, "groups", 1)
        return groups

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Its parameters by their name in the model."""
        start = f"{self.name}." if self.name else ""
        return {f"{start}{k}": p for k, p in self.module.named_parameters(recurse=False)}

    def input_factor(self, **options: Any) -> ConvInputFactor:
        """An empty factor for its inputs."""
        m: Any = self.module
        if isinstance(m, _LINEAR):
            return ConvInputFactor(m.in_features, 1, bias=self.bias, **options)
        return ConvInputFactor(
            m.in_channels,
            m.kernel_size,
            m.stride,
            m.padding,
            m.dilation,
            self.bias,
            groups=m.groups,
            padding_mode=m.padding_mode,
            **options,
        )

    def as_images(self, values: Tensor) -> tuple[Tensor, int]:
        """Inputs or output gradients as [N, C, H, W], with N and how many of them a sample has.

        What a linear layer sees, [N, ..., D], are N * ... images of one pixel.
        """
        if isinstance(self.module, _LINEAR):
            each = values[0, ..., 0].numel() if len(values) else 1
            return values.reshape(-1, values.shape[-1], 1, 1), each
        return values, 1

    def patches(self, x: Tensor) -> Tensor:
        """What the layer sees of each sample, [N, groups, n, L], with a one for the bias."""
        m: Any = self.module
        if isinstance(m, _LINEAR):
            seen = x.flatten(1, -2).mT[:, None] if x.ndim > 2 else x[:, None, :, None]
        else:
            factor = self.input_factor()
            window = factor.window
            seen = functional.unfold(
                factor.padded(x), window.kernel, window.dilation, window.padding, factor.stride
            )
            seen = seen.unflatten(1, (m.groups, -1))
        if self.bias:
            seen = torch.cat([seen, seen.new_ones(*seen.shape[:2], 1, seen.shape[3])], 2)
        return seen

    def mean_patches(self, x: Tensor) -> Tensor:
        """The mean over output positions of what the layer sees of each sample, [N, groups, n]."""
        return self.patches(x).mean(3)

    def patch_norms(self, x: Tensor) -> Tensor:
        """The mean over output positions of the squared norm of what it sees of each sample, [N].

        A pixel counts as often as a tap meets it.
        """
        if isinstance(self.module, _LINEAR):
            norms = x.square().flatten(1, -2).sum(2).mean(1) if x.ndim > 2 else x.square().sum(1)
        else:
            factor = self.input_factor()
            window = factor.window
            seen = functional.conv2d(
                factor.padded(x).square().sum(1, keepdim=True),
                x.new_ones(1, 1, *window.kernel),
                None,
                factor.stride,
                window.padding,
                window.dilation,
            )
            norms = seen.mean((1, 2, 3))
        return norms + self.bias

    def output_rows(self, g: Tensor) -> Tensor:
        """Output gradients of each sample, [N, groups, m, L]."""
        if isinstance(self.module, _LINEAR):
            return g.flatten(1, -2).mT[:, None] if g.ndim > 2 else g[:, None, :, None]
        return g.flatten(2).unflatten(1, (self.groups, -1))

    def gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradient of every sample, [N, groups, m, n], the bias's in the last column."""
        return self.output_rows(g) @ self.patches(x).mT


def find_layers(model: nn.Module, names: Sequence[str] | None = None) -> list[Layer]:
    """The layers of a model that have a Kronecker factor.

    Args:
        model: Any network.
        names: Paths of the layers wanted; None for all convolutions and linear layers.

    Raises:
        FastcilError: A name that is none, or one of another kind of module; no layer at all.
    """
    modules = dict(model.named_modules())
    if names is None:
        found = [Layer(name, m) for name, m in modules.items() if _has_factors(m)]
        if not found:
            raise FastcilError(
                f"model is a {type(model).__name__} without a convolution or a linear layer."
            )
        return found
    for name in names:
        if name not in modules or not _has_factors(modules[name]):
            kind = type(modules[name]).__name__ if name in modules else "no module of the model"
            raise FastcilError(f"layer '{name}' is {kind}; name Conv2d or Linear layers.")
    return [Layer(name, modules[name]) for name in names]


def _has_factors(module: nn.Module) -> bool:
    """Whether a module is a product of its inputs; a head of unit vectors is one of others."""
    known = isinstance(module, (*_CONVOLUTIONS, *_LINEAR))
    return known and not getattr(module, "normalised", False)


@contextmanager
def watched(layers: Sequence[Layer]) -> Iterator[None]:
    """Within it, every forward pass leaves inputs and outputs in the layers' ``calls``."""
    handles = [layer.module.register_forward_hook(_watch(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.calls.clear()


def _watch(layer: Layer) -> Any:
    linearised = isinstance(layer.module, (TangentConv2d, TangentLinear))

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        y = output[1] if linearised else output
        changed = None
        if not y.requires_grad:
            # Nothing before it is trained: gradients begin here.
            leaf = y.detach().requires_grad_()
            layer.calls.append((inputs[0].detach(), get_gradient_edge(leaf)))
            changed = leaf.clone()
            return output._replace(tangent=changed) if linearised else changed
        # The edge stays what it is, even if the output is changed in place later.
        layer.calls.append((inputs[0].detach(), get_gradient_edge(y)))
        return None

    return hook


def gradients_at(outputs: Tensor, layers: Sequence[Layer], vector: Tensor) -> list[list[Tensor]]:
    """Gradients of <vector, outputs> at the outputs of all layers, call by call.

    Args:
        outputs: Of the model, from a forward pass that was `watched`; its graph is kept.
        layers: Where to.
        vector: As the outputs.
    """
    edges = [edge for layer in layers for _, edge in layer.calls]
    found = iter(torch.autograd.grad(outputs, edges, vector, retain_graph=True))
    return [[next(found) for _ in layer.calls] for layer in layers]
