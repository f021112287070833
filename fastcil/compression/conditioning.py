"""How the rate-distortion multiplier λ reaches a network: its embedding and conditioned blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcil.errors import FastcilError

_PERIOD = 64.0
_LARGEST_LAMBDA = 8192.0


class LambdaEmbedding(nn.Module):
    r"""A vector that tells a network which λ to work at.

    .. math:: t = 64 \, \frac{\ln \lambda}{\ln 8192}, \qquad
        e = W_2 \, \mathrm{GELU}(W_1 [\cos(t \omega), \sin(t \omega)] + b_1) + b_2, \qquad
        \omega_j = 64^{-2j/E}

    with j = 0 ... E/2 - 1. λ is first clamped to ``range``, the λ that this part was trained for.
    A part that is frozen while the others learn new rates thus gets what it knows, and its output
    for old rates doesn't change.

    Args:
        size: E, even.
        lambda_range: Smallest and largest λ.

    Example:
        >>> embedding = LambdaEmbedding(8, (32.0, 1024.0))
        >>> embedding(torch.tensor([32.0, 500.0])).shape
        torch.Size([2, 8])
        >>> bool((embedding(torch.tensor([1.0])) == embedding(torch.tensor([32.0]))).all())
        True
    """

    range: Tensor

    def __init__(self, size: int, lambda_range: tuple[float, float]) -> None:
        super().__init__()
        if size < 2 or size % 2:
            raise FastcilError(f"size is {size}; an embedding needs a positive, even size.")
        self.size = size
        self.first = nn.Linear(size, size)
        self.last = nn.Linear(size, size)
        self.register_buffer("range", torch.tensor(check_range("lambda_range", lambda_range)))

    def forward(self, lmbda: Tensor) -> Tensor:
        """The embedding of each λ.

        Args:
            lmbda: Positive.  # [B]

        Returns:
            # [B, E]
        """
        low, high = self.range
        known = torch.minimum(torch.maximum(lmbda.to(self.range), low), high)
        t = known.log() * (64 / math.log(_LARGEST_LAMBDA))
        half = self.size // 2
        steps = torch.arange(half, dtype=t.dtype, device=t.device)
        angles = t[:, None] * torch.exp(steps * (-math.log(_PERIOD) / half))  # [B, E/2]
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.last(F.gelu(self.first(waves)))

    @torch.no_grad()
    def rescale(self, new_range: tuple[float, float], *, last: bool = True) -> None:
        r"""Takes a larger range of λ, and damps the layers for it, once.

        First layer × old high / new high; last layer × new low / old low (weights and biases, so
        that it is the layer's output that scales).

        Args:
            new_range: Smallest and largest λ from now on.
            last: Whether the last layer is rescaled too.

        Raises:
            FastcilError: The new range doesn't contain the old one.
        """
        new_low, new_high = check_range("new_range", new_range)
        low, high = (float(x) for x in self.range.tolist())
        if new_low > low or new_high < high:
            raise FastcilError(
                f"new_range is {new_range}; it must contain the range so far, {(low, high)}."
            )
        for parameter in self.first.parameters():
            parameter.mul_(high / new_high)
        if last:
            for parameter in self.last.parameters():
                parameter.mul_(new_low / low)
        self.range.copy_(torch.tensor((new_low, new_high)))


def check_range(name: str, value: tuple[float, float]) -> tuple[float, float]:
    """The two ends of a range of λ as float32, which is what embeddings and bitstreams hold.

    Whatever compares ranges compares these: most decimal fractions are no float32.

    Raises:
        FastcilError: Unless 0 < low <= high < inf.

    Example:
        >>> check_range("lambda_range", (32, 1024))
        (32.0, 1024.0)
        >>> check_range("lambda_range", (29.26125, 29.26125))
        (29.261249542236328, 29.261249542236328)
    """
    # On the CPU even where a model is built without memory, on torch's device "meta".
    given = torch.tensor([float(x) for x in value], dtype=torch.float32, device="cpu")
    low, high = given.tolist()
    if not 0 < low <= high < math.inf:
        raise FastcilError(
            f"{name} is {value}; it must be two positive numbers, the smaller one first."
        )
    return low, high


class Conditioned(nn.Module):
    """Base of the modules whose forward takes an embedding as its second argument."""


class ConditionedBlock(Conditioned):
    r"""A ConvNeXt block whose normalised features are scaled and shifted by an embedding of λ.

    .. math:: y = \mathrm{LN}(\mathrm{DW}_k(x)) \odot (1 + s(e)) + t(e), \qquad
        x + \gamma \odot W_2 \, \mathrm{GELU}(W_1 y + b_1) + \gamma \odot b_2

    (the block: Liu et al. 2022, *A ConvNet for the 2020s*; its conditioning: the paper's Fig. 6)
    with LN over channels without affine (eps 1e-6), (t, s) = W GELU(e) + b, an inner width of
    twice the channels, and :math:`\gamma` starting at 1e-6.

    Args:
        channels: C.
        kernel: Side k of the depthwise convolution, odd.
        embedding: Size E of the embedding.

    Example:
        >>> block = ConditionedBlock(4, 3, 8)
        >>> block(torch.zeros(2, 4, 5, 6), torch.zeros(2, 8)).shape
        torch.Size([2, 4, 5, 6])
    """

    def __init__(self, channels: int, kernel: int, embedding: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.widen = nn.Linear(channels, 2 * channels)
        self.narrow = nn.Linear(2 * channels, channels)
        self.layer_scale = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The block's output, of the input's shape.

        Args:
            x: # [B, C, h, w]
            embedding: # [B, E]
        """
        shift, scale = self.modulation(F.gelu(embedding)).chunk(2, dim=1)  # [B, C]
        y = self.depthwise(x).permute(0, 2, 3, 1)  # [B, h, w, C]
        y = F.layer_norm(y, y.shape[-1:], eps=1e-6)
        y = y * (1 + scale[:, None, None]) + shift[:, None, None]
        y = self.layer_scale * self.narrow(F.gelu(self.widen(y)))
        return x + y.permute(0, 3, 1, 2)


class ConditionedSequence(nn.ModuleList):
    """Modules one after the other; those that are conditioned get the embedding too.

    Example:
        >>> layers = ConditionedSequence([nn.Conv2d(3, 4, 2, stride=2), ConditionedBlock(4, 3, 8)])
        >>> layers(torch.zeros(1, 3, 6, 6), torch.zeros(1, 8)).shape
        torch.Size([1, 4, 3, 3])
    """

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """The last module's output.

        Args:
            x: The first module's input.
            embedding: None where no module is conditioned.  # [B, E]
        """
        for module in self:
            x = module(x, embedding) if isinstance(module, Conditioned) else module(x)
        return x


class ChannelAffine(Conditioned):
    r"""Scales and shifts each channel by an embedding of λ: how the baselines learn many rates.

    .. math:: x \odot (1 + s(e)) + t(e), \qquad (s, t) = W e + b

    with W starting at a hundredth of its usual values and b at 0, so that it starts close to the
    identity.

    Args:
        channels: C.
        embedding: Size E of the embedding.

    Example:
        >>> ChannelAffine(4, 8)(torch.ones(1, 4, 2, 2), torch.zeros(1, 8)).unique()
        tensor([1.], grad_fn=<...>)
    """

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(embedding, 2 * channels)
        with torch.no_grad():
            self.modulation.weight.mul_(0.01)
            self.modulation.bias.zero_()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The input, scaled and shifted.

        Args:
            x: # [B, C, h, w]
            embedding: # [B, E]
        """
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


def blocks(count: int, channels: int, kernel: int, embedding: int) -> Iterable[ConditionedBlock]:
    """So many conditioned blocks of one shape.

    Example:
        >>> len(list(blocks(2, 4, 3, 8)))
        2
    """
    return (ConditionedBlock(channels, kernel, embedding) for _ in range(count))


def with_affine(activation: nn.Module, channels: int, embedding: int) -> list[nn.Module]:
    """An activation, and after it the affine map by λ; without it where ``embedding`` is 0.

    Example:
        >>> [type(module).__name__ for module in with_affine(nn.LeakyReLU(), 4, 8)]
        ['LeakyReLU', 'ChannelAffine']
    """
    return [activation, ChannelAffine(channels, embedding)] if embedding else [activation]
