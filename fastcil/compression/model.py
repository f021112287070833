"""What every learned codec is: parts, rates, freezing, and the walk through its latents."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcil.compression.conditioning import LambdaEmbedding
from fastcil.compression.entropy_model import EntropyModel, Prior
from fastcil.compression.fixed import FixedEntropy
from fastcil.compression.objective import rate_distortion
from fastcil.compression.phases import Phases
from fastcil.errors import FastcilError
from fastcil.ops import send

Strategy = Literal["enc", "enc-dec", "kr", "all"]
PART_NAMES = ("encoder", "posteriors", "entropy", "decoder")
TRAINED: Mapping[str, tuple[str, ...]] = {
    "enc": ("encoder", "posteriors"),
    "enc-dec": ("encoder", "posteriors", "decoder"),
    "kr": ("encoder", "posteriors", "decoder"),
    "all": PART_NAMES,
}
"""Parts that each strategy trains, each with its λ-MLP where it has one."""


class CodecModel(nn.Module, ABC):
    """A learned image codec: encoder, entropy model and decoder at any λ of a range.

    Subclasses set ``latent_channels`` and the parts ``encoder``, ``entropy``, ``decoder``, and
    ``posteriors`` where the encoder reads the entropy model's state. ``embeddings`` holds a λ-MLP
    for encoder (and posteriors), entropy model and decoder, or none in a model of one rate.

    Args:
        config: The model's dataclass of settings, among them ``embedding`` (0: one rate),
            ``lambda_range`` and ``entropy_dtype``.
    """

    kind: ClassVar[str]
    latent_names: ClassVar[tuple[str, ...]]
    latent_strides: ClassVar[tuple[int, ...]]
    multiple: ClassVar[int] = 64
    rescales_last: ClassVar[bool] = True

    encoder: nn.Module
    entropy: EntropyModel
    decoder: nn.Module

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.entropy_dtype not in ("float64", "float32"):
            raise FastcilError(
                f"entropy_dtype is {config.entropy_dtype!r}; it must be 'float64' or 'float32'."
            )
        self.config = config
        size, parts = config.embedding, ("encoder", "entropy", "decoder")
        mlps = {part: LambdaEmbedding(size, config.lambda_range) for part in parts if size}
        self.embeddings: Mapping[str, LambdaEmbedding] = nn.ModuleDict(mlps)  # type: ignore[assignment]
        self.latent_channels: tuple[int, ...] = ()
        self._frozen: tuple[nn.Module, ...] = ()
        self._fixed: FixedEntropy | None = None

    @property
    def entropy_dtype(self) -> torch.dtype:
        """The dtype in which the entropy model is computed for real bitstreams."""
        dtype: torch.dtype = getattr(torch, self.config.entropy_dtype)
        return dtype

    @abstractmethod
    def posterior(
        self, i: int, features: Sequence[Tensor], state: Tensor, embedding: Tensor | None
    ) -> Tensor:
        """Latent i before quantisation, from the encoder's features and the entropy state."""

    def forward(
        self, x: Tensor, lmbda: float | Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        r"""Codes and reconstructs images, without a bitstream.

        In training z = q + u with u uniform on [-1/2, 1/2); in evaluation
        z = round(q - mean) + mean (Minnen et al. 2018).

        Args:
            x: RGB in 0..1, any sides.  # [B, 3, H, W]
            lmbda: One λ, or one per image.  # [B]
            generator: Source of the noise; torch's global one by default.

        Returns:
            ``x_hat`` [B, 3, H, W] (clamped to 0..1 in evaluation only), ``likelihoods`` and
            ``log_likelihoods`` (natural; finite where a likelihood underflows), and ``latents``,
            each a dict by latent.

        Raises:
            FastcilError: x isn't [B, 3, H, W], or a λ that isn't positive.
        """
        rates = self.rates(lmbda, len(x), x.device)
        logs = {}

        def note(i: int, z: Tensor, prior: Prior) -> None:
            logs[self.latent_names[i]] = prior.log_likelihood(z)

        draw = self._noisy(generator) if self.training else _rounded
        zs, read = self._encode(x, rates, draw, note)
        x_hat = self.decode(zs, read, rates)[..., : x.shape[-2], : x.shape[-1]]
        return {
            "x_hat": x_hat if self.training else x_hat.clamp(0, 1),
            "likelihoods": {name: value.exp() for name, value in logs.items()},
            "log_likelihoods": logs,
            "latents": dict(zip(self.latent_names, zs, strict=True)),
        }

    @torch.no_grad()
    def quantised(self, x: Tensor, lmbda: float | Tensor) -> list[Tensor]:
        """Latents as a bitstream carries them, z = round(q - mean) + mean; nothing is decoded.

        Args:
            x: RGB in 0..1, any sides.  # [B, 3, H, W]
            lmbda: One λ, or one per image.  # [B]

        Returns:
            z of each latent, first to last, for `reconstruct`.

        Raises:
            FastcilError: As `forward`.
        """
        return self._encode(x, self.rates(lmbda, len(x), x.device), _rounded)[0]

    def loss(self, out: Mapping[str, Any], x: Tensor, lmbda: float | Tensor) -> dict[str, Tensor]:
        """See :func:`fastcil.compression.objective.rate_distortion`."""
        return rate_distortion(out, x, self.rates(lmbda, len(x), x.device))

    def reconstruct(
        self, latents: Sequence[Tensor], lmbda: float | Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Images of known latents, as an ordinary differentiable graph: knowledge replay's.

        Args:
            latents: z of each latent, first to last, such as ``forward(x)["latents"].values()``.
            lmbda: One λ, or one per image.  # [B]
            size: H, W of the images.

        Returns:
            In 0..1 but for what the network overshoots.  # [B, 3, H, W]
        """
        rates = self.rates(lmbda, len(latents[0]), latents[0].device)
        embedding = self.embed("entropy", rates)
        padded = self.padded(*size)
        zs, read = self._walk(lambda i, *_: latents[i], len(rates), *padded, embedding)
        return self.decode(zs, read, rates)[..., : size[0], : size[1]]

    def begin(self, height: int, width: int, lmbda: float | Tensor, batch: int = 1) -> Phases:
        """The walk of real coding, for either side of a bitstream: see `Phases`."""
        return Phases(self, height, width, lmbda, batch)

    def update(self, force: bool = False) -> bool:
        """Makes the integer tables that a model has learned anew from its weights.

        Tables of Gaussians are the same for all models; those of a factorised density are learned.
        They are made when a codec first codes or is saved, and then stay what they are, whatever
        the weights become: files that were coded with them can't be decoded with others.
        `trainable` lets them go before all weights are trained; after a loop of your own, ``force``
        makes them anew.

        Args:
            force: Also where there are tables already.

        Returns:
            Whether there are other tables than before.
        """
        densities = list(self.entropy.densities())
        wanted = [density for density in densities if force or not density.has_tables]
        changed = [density.make_tables() for density in wanted]
        return any(changed)

    def fixed_entropy(self) -> FixedEntropy:
        """What both sides of a bitstream compute with, made once for weights as they are."""
        _ensure_tables(self.entropy)
        modules = self.parts()["entropy"]
        if self._fixed is None or not self._fixed.is_of(modules):
            self._fixed = FixedEntropy(modules, self.entropy_dtype, entropy_hash(self))
        return self._fixed

    def features(self, x: Tensor, lmbda: float | Tensor) -> list[Tensor]:
        """What the encoder makes of images: a feature map per latent, or the latent itself.

        Args:
            x: RGB in 0..1.  # [B, 3, H, W]
            lmbda: One λ, or one per image.  # [B]
        """
        if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point() or 0 in x.shape[2:]:
            raise FastcilError(
                f"x is {x.dtype} of shape {list(x.shape)}; it must be floating [B, 3, H, W] in "
                f"0..1."
            )
        height, width = self.padded(*x.shape[-2:])
        framed = F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), mode="replicate")
        rates = self.rates(lmbda, len(x), x.device)
        features: list[Tensor] = self.encoder(2 * framed - 1, self.embed("encoder", rates))
        return features

    def decode(self, latents: Sequence[Tensor], read: Sequence[Tensor], lmbda: Tensor) -> Tensor:
        """Padded images in 0..1 from latents and what the entropy model passed on with them."""
        image: Tensor = self.decoder(latents, read, self.embed("decoder", lmbda))
        return (image + 1) / 2

    def embed(self, part: str, lmbda: Tensor) -> Tensor | None:
        """A part's embedding of λ [B], or None in a model of one rate."""
        return self.embeddings[part](lmbda) if part in self.embeddings else None

    def rates(self, lmbda: float | Tensor, batch: int, device: torch.device | str) -> Tensor:
        """λ per image as float32 [B]: what a bitstream can store."""
        if not isinstance(lmbda, Tensor):
            if not 0 < lmbda < float("inf"):
                raise FastcilError(f"lmbda is {lmbda}; it must be a positive number.")
            return torch.full((batch,), float(lmbda), device=device)
        if lmbda.shape not in ((), (batch,)):
            raise FastcilError(
                f"lmbda has shape {list(lmbda.shape)}; it must be one number or [{batch}], one "
                f"per image."
            )
        return lmbda.to(device, torch.float32).expand(batch)

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Sides after edge padding to multiples of 64."""
        m = self.multiple
        return -(-height // m) * m, -(-width // m) * m

    def latent_shapes(self, height: int, width: int) -> tuple[tuple[int, int, int], ...]:
        """(channels, height, width) of each latent of one image."""
        h, w = self.padded(height, width)
        pairs = zip(self.latent_channels, self.latent_strides, strict=True)
        return tuple((channels, h // stride, w // stride) for channels, stride in pairs)

    def trainable(self, strategy: Strategy) -> list[nn.Parameter]:
        """Lets the parts of a strategy learn, and freezes the others with their λ-MLPs.

        - ``enc``: encoder and posteriors (FT-Enc);
        - ``enc-dec``: decoder too (FT-Enc+Dec). The entropy model stays frozen, or old bitstreams
          could not be read at all;
        - ``kr``: the same parts; what differs is the loss, which replays old latents;
        - ``all``: everything (pre-training). Tables are forgotten, as others are to be learned.

        Frozen parts stay in evaluation mode whatever ``train()`` says, and get λ clamped to the
        range of their embedding.

        Returns:
            The parameters that learn, in order.
        """
        if strategy not in TRAINED:
            raise FastcilError(
                f"strategy is {strategy!r}; it must be one of {', '.join(get_args(Strategy))}."
            )
        frozen: list[nn.Module] = []
        for name, parts in self.parts().items():
            learns = name in TRAINED[strategy]
            for part in parts:
                part.requires_grad_(learns)
            frozen += [] if learns else parts
        self._frozen = tuple(frozen)
        if strategy == "all":
            for density in self.entropy.densities():
                density.forget_tables()
        self.train(self.training)
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part: its network, and its λ-MLP where it has one."""
        found = {name: getattr(self, name, None) for name in PART_NAMES}
        return {
            name: [module, *([self.embeddings[name]] if name in self.embeddings else [])]
            for name, module in found.items()
            if module is not None
        }

    def train(self, mode: bool = True) -> CodecModel:
        """As in torch, but frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def rescale_embeddings(self, new_range: tuple[float, float]) -> None:
        """Grows the range of λ of the parts that learn; see `LambdaEmbedding.rescale`.

        Each grows from its own, which differ where the decoder stood still while the encoder
        learned other rates; one that has the range already stays as it is.

        Args:
            new_range: The range from now on; must contain those so far.

        Raises:
            FastcilError: No part that learns has an embedding, or one has a λ that it would lose.
        """
        learning = [e for e in self.embeddings.values() if e.first.weight.requires_grad]
        if not learning:
            raise FastcilError("No part that learns depends on λ; a range has nothing to grow.")
        for embedding in learning:
            if tuple(embedding.range.tolist()) != tuple(new_range):
                embedding.rescale(new_range, last=self.rescales_last)

    def structure(self) -> dict[str, Any]:
        """The settings, JSON-able: `build_model` of it gives a model of the same shape."""
        return {"kind": self.kind, **asdict(self.config)}

    def _encode(
        self,
        x: Tensor,
        rates: Tensor,
        draw: Callable[[Tensor, Tensor], Tensor],
        note: Callable[[int, Tensor, Prior], None] = lambda *_: None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Latents of images, and what the decoder reads of each; ``note`` is told of each too."""
        features = self.features(x, rates)
        reading = self.embed("encoder", rates)

        def choose(i: int, state: Tensor, prior: Prior) -> Tensor:
            z = draw(self.posterior(i, features, state, reading), prior.mean)
            note(i, z, prior)
            return z

        padded = self.padded(*x.shape[-2:])
        return self._walk(choose, len(x), *padded, self.embed("entropy", rates))

    def _walk(
        self,
        choose: Callable[[int, Tensor, Prior], Tensor],
        batch: int,
        height: int,
        width: int,
        embedding: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Latents that ``choose`` gives one after the other, and what the decoder reads of each."""
        state = self.entropy.start(batch, height, width)
        zs, read = [], []
        for i in range(len(self.latent_names)):
            state, prior = self.entropy.ahead(i, state, embedding)
            zs.append(choose(i, state, prior))
            feature, state = self.entropy.advance(i, state, zs[-1], embedding)
            read.append(feature)
        return zs, read

    def _noisy(self, generator: torch.Generator | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Quantisation's stand-in for training: additive uniform noise."""

        def add(q: Tensor, mean: Tensor) -> Tensor:
            device = q.device if generator is None else generator.device
            noise = torch.rand(q.shape, generator=generator, device=device, dtype=q.dtype)
            return q + send((noise - 0.5,), q.device)[0]

        return add


def _ensure_tables(entropy: EntropyModel) -> None:
    """Makes the tables that are missing; those there are stay."""
    for density in entropy.densities():
        if not density.has_tables:
            density.make_tables()


def _rounded(q: Tensor, mean: Tensor) -> Tensor:
    """q to the nearest integer distance from the mean."""
    return torch.round(q - mean) + mean


def entropy_hash(model: CodecModel) -> str:
    """What a bitstream names: SHA-256 of all that the probabilities of symbols depend on.

    Names, shapes, dtypes and bytes of the parameters and buffers of the entropy model (with the
    tables that it has learned, which are made if there are none yet) and of its λ-MLP (with its
    range of λ, to which λ is clamped), the scales of its tables, and the dtype in which it is
    computed.

    Returns:
        64 hexadecimal digits; unchanged as long as the entropy model is frozen.
    """
    entropy = model.entropy
    _ensure_tables(entropy)
    settings = [type(entropy).__name__, model.config.entropy_dtype, asdict(entropy.table)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for module in model.parts()["entropy"]:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
