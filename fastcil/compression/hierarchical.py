"""The four-latent codec whose entropy model and decoder are separate branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastcil.compression.conditioning import (
    ConditionedBlock,
    ConditionedSequence,
    blocks,
)
from fastcil.compression.entropy_model import EntropyModel
from fastcil.compression.gaussian import SIGMAS, Gaussian, SigmaTable, bounded_log_sigma
from fastcil.compression.model import CodecModel
from fastcil.compression.tables import Tables
from fastcil.errors import FastcilError

PHASES = 4
_STRIDES = (64, 32, 16, 8)


@dataclass(frozen=True)
class HierarchicalConfig:
    """Shape of the model; the defaults are the published one, 35.5 M parameters.

    Args:
        channels: Width at strides 4, 8, 16, 32 and 64, in all branches.
        kernels: Side of the depthwise kernels at those strides.
        encoder_blocks: Blocks of the encoder at those strides.
        latents: Channels of z1 (stride 64), z2 (32), z3 (16) and z4 (8).
        decoder_blocks: Blocks of the decoder before and after each merge, phase by phase.
        last_blocks: Blocks of the decoder at stride 4.
        embedding: Size of the embeddings of λ.
        lambda_range: λ of pre-training.
        entropy_dtype: In what the entropy model is computed for bitstreams.
    """

    channels: tuple[int, ...] = (128, 256, 384, 256, 128)
    kernels: tuple[int, ...] = (7, 7, 7, 5, 3)
    encoder_blocks: tuple[int, ...] = (6, 6, 6, 4, 4)
    latents: tuple[int, ...] = (128, 128, 256, 32)
    decoder_blocks: tuple[tuple[int, int], ...] = ((0, 2), (2, 2), (3, 3), (3, 3))
    last_blocks: int = 6
    embedding: int = 256
    lambda_range: tuple[float, float] = (32.0, 1024.0)
    entropy_dtype: str = "float64"

    def __post_init__(self) -> None:
        for name, length in (
            ("channels", 5),
            ("kernels", 5),
            ("encoder_blocks", 5),
            ("latents", PHASES),
            ("decoder_blocks", PHASES),
        ):
            if len(getattr(self, name)) != length:
                raise FastcilError(f"{name} is {getattr(self, name)}; it needs {length} entries.")
        if self.embedding < 1:
            raise FastcilError(f"embedding is {self.embedding}; its blocks need at least 1.")
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise FastcilError(f"kernels is {self.kernels}; depthwise kernels must be odd.")

    def width(self, phase: int) -> int:
        """Channels of a phase, 0 to 3."""
        return self.channels[4 - phase]

    def blocks(self, phase: int, count: int) -> list[ConditionedBlock]:
        """Blocks of a phase's shape."""
        width, kernel = self.width(phase), self.kernels[4 - phase]
        return list(blocks(count, width, kernel, self.embedding))


class Upsample(nn.Sequential):
    """A 1×1 convolution and a pixel shuffle."""

    def __init__(self, in_channels: int, out_channels: int, rate: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels * rate * rate, 1), nn.PixelShuffle(rate)
        )


class Encoder(nn.Module):
    """Image to feature maps at strides 64, 32, 16 and 8."""

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__()
        widths = (3, *config.channels)
        self.stages = nn.ModuleList(
            ConditionedSequence(
                [
                    # Patches: the kernel is the stride.
                    nn.Conv2d(widths[s], widths[s + 1], 4 if s == 0 else 2, 4 if s == 0 else 2),
                    *blocks(
                        config.encoder_blocks[s], widths[s + 1], config.kernels[s], config.embedding
                    ),
                ]
            )
            for s in range(5)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """Features of each phase, deepest first."""
        features = []
        for stage in self.stages:
            x = stage(x, embedding)
            features.append(x)
        return features[:0:-1]


class Posterior(nn.Module):
    """One latent before quantisation: the encoder's feature and the entropy model's, merged."""

    def __init__(self, config: HierarchicalConfig, phase: int) -> None:
        super().__init__()
        width = config.width(phase)
        self.seen, self.expected, self.merged = config.blocks(phase, 3)
        self.merge = nn.Conv2d(2 * width, width, 1)
        self.project = nn.Conv2d(width, config.latents[phase], 3, padding=1)

    def forward(self, feature: Tensor, state: Tensor, embedding: Tensor) -> Tensor:
        """q [B, latents, h, w]."""
        pair = [self.seen(feature, embedding), self.expected(state, embedding)]
        q: Tensor = self.project(self.merged(self.merge(torch.cat(pair, dim=1)), embedding))
        return q


class EntropyPhase(nn.Module):
    """Blocks, prior, z added back, blocks; then upsampling, but after the last phase."""

    def __init__(self, config: HierarchicalConfig, phase: int) -> None:
        super().__init__()
        width, z = config.width(phase), config.latents[phase]
        before, after = ((0, 1), (1, 1), (1, 1), (2, 0))[phase]
        self.before = ConditionedSequence(config.blocks(phase, before))
        self.prior = nn.Conv2d(width, 2 * z, 1)
        self.add = nn.Conv2d(z, width, 1)
        self.after = ConditionedSequence(config.blocks(phase, after))
        last = phase == PHASES - 1
        self.up = nn.Identity() if last else Upsample(width, config.width(phase + 1), 2)


class EntropyBranch(EntropyModel):
    """Priors of the four latents, each from the latents before it; the first from a constant.

    The bias feature e0 of the paper is zero here, as it may be without loss: the 1×1 convolutions
    that read it have biases of their own. The feature of a phase that the decoder reads is that
    after the phase's last block, with z in it (our reading of the paper's Fig. 7).
    """

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__()
        self.table: SigmaTable = SIGMAS
        self.phases = nn.ModuleList(EntropyPhase(config, phase) for phase in range(PHASES))

    def start(self, batch: int, height: int, width: int) -> Tensor:
        """The zero bias feature [B, C, H/64, W/64]."""
        weight = self._phase(0).add.weight  # [C, z, 1, 1]
        return weight.new_zeros(batch, len(weight), height // _STRIDES[0], width // _STRIDES[0])

    def ahead(self, i: int, state: Tensor, embedding: Tensor | None) -> tuple[Tensor, Gaussian]:
        """The feature that the posterior sees, and the prior that a 1×1 convolution reads off."""
        phase = self._phase(i)
        state = phase.before(state, embedding)
        mean, raw = phase.prior(state).chunk(2, dim=1)
        return state, Gaussian(mean, bounded_log_sigma(raw), self.table)

    def advance(
        self, i: int, state: Tensor, z: Tensor, embedding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The phase's output, and that upsampled."""
        phase = self._phase(i)
        feature = phase.after(state + phase.add(z), embedding)
        return feature, phase.up(feature)

    def tables(self, i: int) -> Tables:
        """The 64 Gaussians, for every latent."""
        return self.table.tables()

    def _phase(self, i: int) -> EntropyPhase:
        """Phase i, typed."""
        return cast(EntropyPhase, self.phases[i])


class DecoderPhase(nn.Module):
    """Blocks, the merge of [decoder feature, z, entropy feature], blocks, upsampling."""

    def __init__(self, config: HierarchicalConfig, phase: int) -> None:
        super().__init__()
        width = config.width(phase)
        before, after = config.decoder_blocks[phase]
        self.before = ConditionedSequence(config.blocks(phase, before))
        self.merge = nn.Conv2d(2 * width + config.latents[phase], width, 1)
        self.after = ConditionedSequence(config.blocks(phase, after))
        self.up = Upsample(width, config.width(phase + 1), 2)

    def forward(self, x: Tensor, z: Tensor, feature: Tensor, embedding: Tensor) -> Tensor:
        """The next phase's input."""
        merged = self.merge(torch.cat([self.before(x, embedding), z, feature], dim=1))
        upsampled: Tensor = self.up(self.after(merged, embedding))
        return upsampled


class Decoder(nn.Module):
    """Latents and entropy features to the image, beside the entropy branch rather than in it."""

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, config.width(0), 1, 1))
        self.phases = nn.ModuleList(DecoderPhase(config, phase) for phase in range(PHASES))
        self.last = ConditionedSequence(config.blocks(PHASES, config.last_blocks))
        self.image = Upsample(config.channels[0], 3, 4)

    def forward(
        self, latents: Sequence[Tensor], features: Sequence[Tensor], embedding: Tensor
    ) -> Tensor:
        """The image in -1..1."""
        x = self.bias.expand(len(latents[0]), -1, *latents[0].shape[2:])
        for phase, z, feature in zip(self.phases, latents, features, strict=True):
            x = phase(x, z, feature, embedding)
        image: Tensor = self.image(self.last(x, embedding))
        return image


class Hierarchical(CodecModel):
    """Four latents, coarse to fine, with the entropy model apart from the decoder.

    (Duan et al. 2024, *Towards Backward-Compatible Continual Learning of Image Compression*,
    arXiv 2402.18862.) Since reconstruction has its own branch, the decoder can be tuned while the
    light entropy branch stays frozen, and with it the meaning of every old bitstream.

    Args:
        config: Its shape.

    Example:
        >>> from fastcil.compression.zoo import build_codec
        >>> model = build_codec("hierarchical-tiny").eval()
        >>> out = model(torch.rand(1, 3, 50, 70), lmbda=100.0)
        >>> out["x_hat"].shape, out["latents"]["z1"].shape
        (torch.Size([1, 3, 50, 70]), torch.Size([1, 16, 1, 2]))
    """

    kind = "hierarchical"
    latent_names = ("z1", "z2", "z3", "z4")
    latent_strides = _STRIDES

    def __init__(self, config: HierarchicalConfig = HierarchicalConfig()) -> None:
        super().__init__(config)
        self.latent_channels = tuple(config.latents)
        self.encoder = Encoder(config)
        self.posteriors = nn.ModuleList(Posterior(config, phase) for phase in range(PHASES))
        self.entropy = EntropyBranch(config)
        self.decoder = Decoder(config)

    def posterior(
        self, i: int, features: Sequence[Tensor], state: Tensor, embedding: Tensor | None
    ) -> Tensor:
        """q of latent i."""
        q: Tensor = self.posteriors[i](features[i], state, embedding)
        return q
