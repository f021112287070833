"""The codec with a Gaussian mixture, attention and a context model, for one rate or many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastcil.compression.conditioning import Conditioned, ConditionedSequence, with_affine
from fastcil.compression.factorised import Factorised, FactorisedDensity
from fastcil.compression.gaussian import SigmaTable, bounded_log_sigma, log_likelihood
from fastcil.compression.gdn import GDN
from fastcil.compression.hyperprior import HyperDecoder, HyperEncoder, HyperpriorModel
from fastcil.compression.model import EntropyModel, Prior
from fastcil.compression.phases import Phases
from fastcil.compression.tables import Tables
from fastcil.errors import FastcilError

_NO_BITSTREAM = (
    "gma and gma-vr have no bitstream: the probabilities of each symbol need the symbols before "
    "it, one by one. Take rates from forward, or a hierarchical or msh model."
)


@dataclass(frozen=True)
class MixtureConfig:
    """Shape of a mixture codec; the defaults are those of ``gma-vr``.

    Args:
        hidden: N, channels everywhere.
        components: K, Gaussians of a symbol's mixture.
        parameters: Width of the 1×1 convolutions that compute the mixture.
        embedding: Size of the embeddings of λ; 0: a model of one rate.
        lambda_range: λ of pre-training.
        entropy_dtype: Unused, as there is no bitstream; the models share the field.
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


class MaskedConv2d(nn.Conv2d):
    """A 5×5 convolution that sees only what precedes a position in raster order.

    (Van den Oord et al. 2016, mask A.)

    Example:
        >>> convolution = MaskedConv2d(1, 1)
        >>> x = torch.zeros(1, 1, 5, 5)
        >>> before = convolution(x)
        >>> x[0, 0, 2, 2] = 1
        >>> changed = (convolution(x) != before)[0, 0]
        >>> bool(changed[:2].any() | changed[2, :3].any())
        False
    """

    mask: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 5, padding=2)
        mask = torch.ones(25)
        mask[12:] = 0
        self.register_buffer("mask", mask.view(5, 5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """What the symbols before say [B, out, h, w]."""
        return self._conv_forward(x, self.weight * self.mask, self.bias)


@dataclass(frozen=True)
class Mixture:
    """The prior of y: a mixture for each symbol, by the symbols before it.

    Args:
        entropy: Computes the mixtures' parameters.
        state: What the hyper latent says.
        embedding: Of λ, or None.
        mean: Zeros: symbols are the integers themselves.
    """

    entropy: MixtureEntropy
    state: Tensor
    embedding: Tensor | None
    mean: Tensor

    def log_likelihood(self, z: Tensor) -> Tensor:
        r"""ln Σ_k w_k p(z; μ_k, σ_k) (Cheng et al. 2020)."""
        weights, means, raw = self.entropy.parameters_of(z, self.state, self.embedding)
        parts = log_likelihood(z[:, None], means, bounded_log_sigma(raw))  # [B, K, C, h, w]
        return torch.logsumexp(weights.log_softmax(1) + parts, dim=1)

    def index(self) -> Tensor:
        """No table holds a mixture."""
        raise FastcilError(_NO_BITSTREAM)


class MixtureEntropy(EntropyModel):
    """A factorised prior of z; of y, a mixture by the hyper-synthesis and a masked convolution."""

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        n, wide, embedding = config.hidden, config.hidden * 3 // 2, config.embedding
        self.table = SigmaTable(high=256.0)
        self.components = config.components
        self.bottleneck = FactorisedDensity(n)
        self.synthesis = ConditionedSequence(
            [
                _same(n, n),
                *with_affine(nn.LeakyReLU(), n, embedding),
                _shuffled(n, n),
                *with_affine(nn.LeakyReLU(), n, embedding),
                _same(n, wide),
                *with_affine(nn.LeakyReLU(), wide, embedding),
                _shuffled(wide, wide),
                *with_affine(nn.LeakyReLU(), wide, embedding),
                _same(wide, 2 * n),
            ]
        )
        self.context = MaskedConv2d(n, 2 * n)
        width = config.parameters
        self.mixture = ConditionedSequence(
            [
                nn.Conv2d(4 * n, width, 1),
                *with_affine(nn.LeakyReLU(), width, embedding),
                nn.Conv2d(width, width, 1),
                *with_affine(nn.LeakyReLU(), width, embedding),
                nn.Conv2d(width, 3 * config.components * n, 1),
            ]
        )

    def start(self, batch: int, height: int, width: int) -> Tensor:
        """Zeros of z's shape."""
        n = self.context.in_channels
        return self.context.weight.new_zeros(batch, n, height // 64, width // 64)

    def ahead(self, i: int, state: Tensor, embedding: Tensor | None) -> tuple[Tensor, Prior]:
        """z by channel, then y by what z and the symbols before say."""
        if i == 0:
            return state, Factorised(self.bottleneck, state)
        mean = state.new_zeros(len(state), state.shape[1] // 2, *state.shape[2:])
        return state, Mixture(self, state, embedding, mean)

    def advance(
        self, i: int, state: Tensor, z: Tensor, embedding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """z through the hyper-synthesis."""
        return z, self.synthesis(z, embedding) if i == 0 else state

    def parameters_of(
        self, z: Tensor, state: Tensor, embedding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights before their softmax, means and raw log scales, [B, K, C, h, w] each."""
        both = torch.cat([self.context(z), state], dim=1)
        stats = self.mixture(both, embedding).unflatten(1, (3, self.components, z.shape[1]))
        weights, means, raw = stats.unbind(1)
        return weights, means, raw

    def tables(self, i: int) -> Tables:
        """There are none for y."""
        raise FastcilError(_NO_BITSTREAM)


class MixtureHyperprior(HyperpriorModel):
    """Gaussian mixture, attention and context model (Cheng et al. 2020), for estimated rates.

    With an ``embedding`` it stands for the variable-rate baseline GMA-VR of Duan et al. (2024), of
    which no code is public. Our reading: the network of Cheng et al. with its simplified attention,
    K = 3 and its masked 5×5 context model, and, as in MSH-VR, an affine map by λ after every GDN
    and LeakyReLU; the frozen entropy model is the bottleneck, the hyper-synthesis, the context
    model and the mixture's parameters, with their λ-MLP. Rates are those of ``forward``; there is
    no bitstream, and ``begin`` says so.

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
        n, e = config.hidden, config.embedding
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
        self.entropy = MixtureEntropy(config)
        self.decoder = HyperDecoder(
            ConditionedSequence([*synthesis, Residual(n, n, "same", e), _shuffled(n, 3)])
        )

    def begin(self, height: int, width: int, lmbda: float | Tensor, batch: int = 1) -> Phases:
        """There is no real coding.

        Raises:
            FastcilError: Always.
        """
        raise FastcilError(_NO_BITSTREAM)
