"""The mean-scale hyperprior codec, for one rate or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastcil.compression.conditioning import ConditionedSequence, with_affine
from fastcil.compression.entropy_model import EntropyModel, Prior
from fastcil.compression.factorised import Factorised, FactorisedDensity
from fastcil.compression.gaussian import Gaussian, SigmaTable, bounded_log_sigma
from fastcil.compression.gdn import GDN
from fastcil.compression.model import CodecModel
from fastcil.compression.tables import Tables
from fastcil.errors import FastcilError


@dataclass(frozen=True)
class HyperpriorConfig:
    """Shape of a hyperprior codec; the defaults are those of ``msh-vr``.

    Args:
        hidden: N, channels within the transforms and of the hyper latent.
        latent: M, channels of the latent.
        embedding: Size of the embeddings of λ; 0: a model of one rate.
        lambda_range: λ of pre-training.
        entropy_dtype: In what the entropy model is computed for bitstreams.
    """

    hidden: int = 192
    latent: int = 320
    embedding: int = 256
    lambda_range: tuple[float, float] = (32.0, 1024.0)
    entropy_dtype: str = "float64"

    def __post_init__(self) -> None:
        if self.hidden < 2 or self.hidden % 2 or self.latent < 2 or self.latent % 2:
            raise FastcilError(
                f"hidden and latent are {self.hidden} and {self.latent}; both must be positive and "
                f"even."
            )


def halve(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 5×5 convolution of stride 2."""
    return nn.Conv2d(in_channels, out_channels, 5, stride=2, padding=2)


def double(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """A 5×5 transposed convolution of stride 2."""
    return nn.ConvTranspose2d(in_channels, out_channels, 5, stride=2, padding=2, output_padding=1)


class HyperEncoder(nn.Module):
    """Analysis and hyper-analysis: both latents before quantisation, [z, y]."""

    def __init__(self, analysis: nn.Module, hyper: nn.Module) -> None:
        super().__init__()
        self.analysis = analysis
        self.hyper = hyper

    def forward(self, x: Tensor, embedding: Tensor | None) -> list[Tensor]:
        """z [B, N, H/64, W/64] and y [B, M, H/16, W/16]."""
        y = self.analysis(x, embedding)
        return [self.hyper(y, embedding), y]


class HyperDecoder(nn.Module):
    """Synthesis: the image in -1..1 from y alone."""

    def __init__(self, synthesis: nn.Module) -> None:
        super().__init__()
        self.synthesis = synthesis

    def forward(
        self, latents: Sequence[Tensor], features: Sequence[Tensor], embedding: Tensor | None
    ) -> Tensor:
        """The image [B, 3, H, W]."""
        image: Tensor = self.synthesis(latents[-1], embedding)
        return image


class HyperEntropy(EntropyModel):
    """A factorised prior of z, and what the hyper-synthesis of z says of y.

    Args:
        channels: Those of z.
        synthesis: z to two maps per channel of y or more.
        prior: Makes y's prior of that.
    """

    def __init__(
        self,
        channels: int,
        synthesis: nn.Module,
        prior: Callable[[Tensor, SigmaTable], Prior],
    ) -> None:
        super().__init__()
        # Latents of a large image's scale grow beyond 20 at high rates.
        self.table = SigmaTable(high=256.0)
        self.channels = channels
        self.bottleneck = FactorisedDensity(channels)
        self.synthesis = synthesis
        self._prior = prior

    def start(self, batch: int, height: int, width: int) -> Tensor:
        """Zeros of z's shape: its mean."""
        shape = (batch, self.channels, height // 64, width // 64)
        return self.bottleneck.biases[0].new_zeros(shape)

    def ahead(self, i: int, state: Tensor, embedding: Tensor | None) -> tuple[Tensor, Prior]:
        """z by channel, then y by what z says."""
        if i == 0:
            return state, Factorised(self.bottleneck, state)
        return state, self._prior(state, self.table)

    def advance(
        self, i: int, state: Tensor, z: Tensor, embedding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """z through the hyper-synthesis; the decoder reads y itself."""
        return z, self.synthesis(z, embedding) if i == 0 else state

    def tables(self, i: int) -> Tables:
        """A table per channel for z, the Gaussians for y."""
        return self.bottleneck.tables() if i == 0 else self.table.tables()


def mean_and_scale(stats: Tensor, table: SigmaTable) -> Gaussian:
    """The Gaussian whose mean and raw log scale a map holds, one half of the channels each."""
    mean, raw = stats.chunk(2, dim=1)
    return Gaussian(mean, bounded_log_sigma(raw), table)


class HyperpriorModel(CodecModel):
    """What ``Hyperprior`` and ``MixtureHyperprior`` share: the latents z and y."""

    latent_names = ("z", "y")
    latent_strides = (64, 16)
    # As in the released code of the variable-rate baselines.
    rescales_last = False

    def posterior(
        self, i: int, features: Sequence[Tensor], state: Tensor, embedding: Tensor | None
    ) -> Tensor:
        """The encoder's output as it is."""
        return features[i]


class Hyperprior(HyperpriorModel):
    """Mean-scale hyperprior with GDN (Minnen et al. 2018, without its context model).

    With an ``embedding`` it is the variable-rate baseline MSH-VR of Duan et al. (2024): an affine
    map of every channel by an embedding of λ after every GDN and LeakyReLU. Its frozen entropy
    model is the bottleneck, the hyper-synthesis and their λ-MLP. The scale of y is bounded below
    by a softplus, as in the hierarchical models, rather than by a cut-off; z is rounded to
    integers rather than to learned medians.

    Args:
        config: Its shape.

    Example:
        >>> import torch
        >>> model = Hyperprior(HyperpriorConfig(hidden=4, latent=6, embedding=8)).eval()
        >>> out = model(torch.rand(1, 3, 64, 64), lmbda=100.0)
        >>> out["latents"]["z"].shape, out["latents"]["y"].shape
        (torch.Size([1, 4, 1, 1]), torch.Size([1, 6, 4, 4]))
    """

    kind = "hyperprior"

    def __init__(self, config: HyperpriorConfig = HyperpriorConfig()) -> None:
        super().__init__(config)
        n, m, e = config.hidden, config.latent, config.embedding
        wide = m * 3 // 2
        self.latent_channels = (n, m)
        analysis = [halve(3, n), *with_affine(GDN(n), n, e)]
        synthesis = [double(m, n), *with_affine(GDN(n, inverse=True), n, e)]
        for _ in range(2):
            analysis += [halve(n, n), *with_affine(GDN(n), n, e)]
            synthesis += [double(n, n), *with_affine(GDN(n, inverse=True), n, e)]
        hyper_analysis = [
            nn.Conv2d(m, n, 3, padding=1),
            *with_affine(nn.LeakyReLU(), n, e),
            halve(n, n),
            *with_affine(nn.LeakyReLU(), n, e),
            halve(n, n),
        ]
        hyper_synthesis = [
            double(n, m),
            *with_affine(nn.LeakyReLU(), m, e),
            double(m, wide),
            *with_affine(nn.LeakyReLU(), wide, e),
            nn.Conv2d(wide, 2 * m, 3, padding=1),
        ]
        self.encoder = HyperEncoder(
            ConditionedSequence([*analysis, halve(n, m)]), ConditionedSequence(hyper_analysis)
        )
        self.entropy = HyperEntropy(n, ConditionedSequence(hyper_synthesis), mean_and_scale)
        self.decoder = HyperDecoder(ConditionedSequence([*synthesis, double(n, 3)]))
