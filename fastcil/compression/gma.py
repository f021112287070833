"""The codec with a Gaussian mixture, attention and a context model, for one rate or many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastcil.compression.conditioning import Conditioned, ConditionedSequence, with_affine
from fastcil.compression.gdn import GDN
from fastcil.compression.hyperprior import HyperDecoder, HyperEncoder, HyperpriorModel
from fastcil.compression.mixture import MixtureEntropy
from fastcil.errors import FastcilError


@dataclass(frozen=True)
class MixtureConfig:
    """Shape of a mixture codec; the defaults are those of ``gma-vr``.

    Args:
        hidden: N, channels everywhere.
        components: K, Gaussians of a symbol's mixture.
        parameters: Width of the 1×1 convolutions that compute the mixture.
        embedding: Size of the embeddings of λ; 0: a model of one rate.
        lambda_range: λ of pre-training.
        entropy_dtype: In what the entropy model is computed for bitstreams.
    """

    hidden: int = 192
    components: int = 3
    parameters: int = 640
    embedding: int = 256
    lambda_range: tuple[float, float] = (32.0, 1024.0)
    entropy_dtype: str = "float64"

    def __post_init__(self) -> None:
        if self.hidden < 2 or self.hidden % 2 or self.components < 1:
            raise FastcilError(
                f"hidden and components are {self.hidden} and {self.components}; the first must be "
                f"positive and even, the second at least 1."
            )


def _shuffled(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3×3 convolution and a pixel shuffle: twice the side."""
    convolution = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)
    return nn.Sequential(convolution, nn.PixelShuffle(2))


def _same(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3×3 convolution."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def _halve(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3×3 convolution of stride 2."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)


class Residual(Conditioned):
    """Two convolutions and a shortcut; ``change`` halves or doubles the side or keeps it.

    The second activation is GDN where the side halves, its inverse where it doubles, and otherwise
    a LeakyReLU; each is followed by the affine map by λ where there is an embedding.
    """

    def __init__(self, in_channels: int, channels: int, change: str, embedding: int) -> None:
        super().__init__()
        first = {"halve": _halve, "double": _shuffled, "same": _same}[change]
        last: nn.Module = nn.LeakyReLU()
        if change != "same":
            last = GDN(channels, inverse=change == "double")
        shortcuts = {
            "halve": lambda: nn.Conv2d(in_channels, channels, 1, stride=2),
            "double": lambda: _shuffled(in_channels, channels),
            "same": nn.Identity,
        }
        self.first = first(in_channels, channels)
        self.inner = ConditionedSequence(with_affine(nn.LeakyReLU(), channels, embedding))
        self.second = _same(channels, channels)
        self.outer = ConditionedSequence(with_affine(last, channels, embedding))
        self.shortcut = shortcuts[change]()

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """The sum [B, C, h, w] at the new side."""
        y = self.inner(self.first(x), embedding)
        y = self.outer(self.second(y), embedding)
        total: Tensor = y + self.shortcut(x)
        return total


class _Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 at half the width, with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, half, 1),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(half, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sum [B, C, h, w], without its negative part."""
        return torch.relu(x + self.body(x))


class Attention(nn.Module):
    r"""x + a(x) ⊙ sigmoid(b(x)): three residual units each, without the non-local block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(_Bottleneck(channels) for _ in range(3)))
        units = (_Bottleneck(channels) for _ in range(3))
        self.mask = nn.Sequential(*units, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The gated sum [B, C, h, w]."""
        gated: Tensor = x + self.trunk(x) * torch.sigmoid(self.mask(x))
        return gated


class MixtureHyperprior(HyperpriorModel):
    """Gaussian mixture, attention and context model (Cheng et al. 2020).

    With an ``embedding`` it stands for the variable-rate baseline GMA-VR of Duan et al. (2024), of
    which no code is public. Our reading: the network of Cheng et al. with its simplified attention,
    K = 3 and its masked 5×5 context model, and, as in MSH-VR, an affine map by λ after every GDN
    and LeakyReLU; the frozen entropy model is the bottleneck, the hyper-synthesis, the context
    model and the mixture's parameters, with their λ-MLP. A context model makes coding sequential:
    encoding and decoding take a step for each wave of positions, three times the rows and once the
    columns of y, where the other models take one for a latent. In float64 on one CPU core a photo
    of 768 × 512 takes some 7 s that way, two thirds of them in the network.

    Args:
        config: Its shape.

    Example:
        >>> model = MixtureHyperprior(MixtureConfig(hidden=4, parameters=8, embedding=8)).eval()
        >>> model(torch.rand(1, 3, 64, 64), lmbda=100.0)["likelihoods"]["y"].shape
        torch.Size([1, 4, 4, 4])
    """

    kind = "mixture"

    def __init__(self, config: MixtureConfig = MixtureConfig()) -> None:
        super().__init__(config)
        n, wide, e = config.hidden, config.hidden * 3 // 2, config.embedding
        self.latent_channels = (n, n)
        analysis: list[nn.Module] = []
        for step, in_channels in enumerate((3, n, n)):
            analysis += [Residual(in_channels, n, "halve", e)]
            analysis += [Attention(n)] if step == 1 else []
            analysis += [Residual(n, n, "same", e)]
        synthesis: list[nn.Module] = [Attention(n)]
        for step in range(3):
            synthesis += [Residual(n, n, "same", e), Residual(n, n, "double", e)]
            synthesis += [Attention(n)] if step == 1 else []
        hyper: list[nn.Module] = []
        for convolution in (_same, _same, _halve, _same):
            hyper += [convolution(n, n), *with_affine(nn.LeakyReLU(), n, e)]
        self.encoder = HyperEncoder(
            ConditionedSequence([*analysis, _halve(n, n), Attention(n)]),
            ConditionedSequence([*hyper, _halve(n, n)]),
        )
        hyper_synthesis = ConditionedSequence(
            [
                _same(n, n),
                *with_affine(nn.LeakyReLU(), n, e),
                _shuffled(n, n),
                *with_affine(nn.LeakyReLU(), n, e),
                _same(n, wide),
                *with_affine(nn.LeakyReLU(), wide, e),
                _shuffled(wide, wide),
                *with_affine(nn.LeakyReLU(), wide, e),
                _same(wide, 2 * n),
            ]
        )
        self.entropy = MixtureEntropy(
            n, config.components, config.parameters, config.embedding, hyper_synthesis
        )
        self.decoder = HyperDecoder(
            ConditionedSequence([*synthesis, Residual(n, n, "same", e), _shuffled(n, 3)])
        )
