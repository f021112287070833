"""How a learned codec is trained: lengths, rates, strategies, and the published recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, cast

import torch
from torch import Tensor

from fastcil.compression.conditioning import check_range
from fastcil.compression.model import CodecModel
from fastcil.contract import Recipe, check_choices, check_not_negative, check_positive
from fastcil.errors import FastcilError


@dataclass(frozen=True)
class CodecRecipe(Recipe):
    r"""A `Recipe` whose cosine may begin late and end above zero.

    The learning rate of epoch e (from 0) of E is ``lr`` for the first H = ``hold`` · E, then

    .. math:: lr \Big[ f + (1 - f) \, \tfrac12
        \Big(1 + \cos \pi \frac{e - H}{E - H}\Big) \Big], \qquad f = \text{final}

    (Duan et al. 2024, Tab. 10: "constant + cosine" and "cosine"; that it is constant for half the
    time and ends at a tenth is their code's.) An epoch is so many steps as
    `CodecTraining.epoch_steps` says, whatever the number of images.

    Args:
        epochs: Number of epochs, E.
        lr: Peak learning rate.
        hold: Share of the epochs at the peak.
        final: f, where the cosine ends, as a share of the peak.

    Example:
        >>> recipe = CodecRecipe(epochs=4, lr=1.0, hold=0.5)
        >>> [round(recipe.lr_at(e), 2) for e in range(5)]
        [1.0, 1.0, 1.0, 0.55, 0.1]
    """

    optimizer: Literal["sgd", "adam"] = "adam"
    weight_decay: float = 0.0
    batch_size: int = 32
    clip: float = 2.0
    hold: float = 0.0
    final: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hold", "final"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise FastcilError(f"{name} is {value}; it must be a share from 0 to 1.")

    def factor(self, epoch: int) -> float:
        """The schedule's multiplier of ``lr`` in epoch ``epoch``."""
        if self.schedule != "cosine":
            return super().factor(epoch)
        if epoch < self.warmup:
            return (epoch + 1) / (self.warmup + 1)
        start = max(self.hold * self.epochs, self.warmup)
        if epoch < start:
            return 1.0
        share = (epoch - start) / max(1, self.epochs - start)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class CodecTraining:
    """One training of a codec, from scratch or from another codec.

    Args:
        recipe: Optimiser, schedule, batch size, and the number of epochs.
        epoch_steps: Steps of an epoch: between two learning rates, and two lines of the log.
            Training takes ``recipe.epochs * epoch_steps`` steps.
        size: Side of the random window that is cut out of each image, a multiple of 64.
        ema: Largest decay of the exponential moving average of the weights, which is what is
            saved; 0 for none.
        ema_ramp: Steps r of its ramp: the decay of step t is ``ema * (1 - exp(-t / r))``.
        strategy: What learns (`fastcil.compression.CodecModel.trainable`): ``all`` from scratch;
            ``enc``, ``enc-dec`` or ``kr`` from another codec.
        lambda_range: Smallest and largest λ of the training images; None is the model's own. A
            larger one than a codec was trained for is rate-incremental learning.
        alpha: Share of the batch, and weight, that knowledge replay gives to old images.
        target: What the new decoder is to make of old latents: the ``originals`` that they were
            encoded from, as published; or the old decoder's ``outputs``, for when the originals are
            gone and what is replayed are old bitstreams, or images that were decoded from them (our
            extension).

    Raises:
        FastcilError: A value that is out of its range.

    Example:
        >>> FINETUNING["paper"].steps, PRETRAINING["paper"].steps
        (100000, 500000)
    """

    recipe: CodecRecipe
    epoch_steps: int = 1000
    size: int = 256
    ema: float = 0.0
    ema_ramp: float = 10_000.0
    strategy: Literal["all", "enc", "enc-dec", "kr"] = "all"
    lambda_range: tuple[float, float] | None = None
    alpha: float = 0.5
    target: Literal["originals", "outputs"] = "originals"

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive("epoch_steps", self.epoch_steps)
        check_positive("ema_ramp", self.ema_ramp)
        check_not_negative("ema", self.ema)
        if self.size < 1 or self.size % CodecModel.multiple:
            raise FastcilError(
                f"size is {self.size}; it must be a multiple of {CodecModel.multiple}, which is "
                f"what the models downsample by."
            )
        if self.ema >= 1:
            raise FastcilError(f"ema is {self.ema}; it must be below 1.")
        if not 0 < self.alpha <= 1:
            raise FastcilError(f"alpha is {self.alpha}; it must be above 0 and at most 1.")
        if self.lambda_range is not None:
            check_range("lambda_range", self.lambda_range)

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.recipe.epochs * self.epoch_steps

    @property
    def replayed(self) -> int:
        """Old images of a batch in knowledge replay: the nearest whole number, at least one."""
        return max(1, round(self.alpha * self.recipe.batch_size))


PRETRAINING: Mapping[str, CodecTraining] = MappingProxyType(
    {
        "paper": CodecTraining(CodecRecipe(epochs=500, lr=2e-4, hold=0.5), ema=0.9999),
        "small": CodecTraining(
            CodecRecipe(epochs=40, lr=5e-4, hold=0.5, batch_size=8),
            epoch_steps=50,
            size=128,
            ema=0.99,
            ema_ramp=200.0,
        ),
    }
)
"""Pre-training: ``paper`` is Tab. 10 of Duan et al. (2024), 500 k steps; ``small`` is 2 k steps of
8 windows of 128 pixels, for the small models on a CPU (ours)."""

_FINETUNED = CodecTraining(CodecRecipe(epochs=100, lr=1e-4), strategy="kr")

FINETUNING: Mapping[str, CodecTraining] = MappingProxyType(
    {
        "paper": _FINETUNED,
        "paper-low-to-high": replace(_FINETUNED, lambda_range=(32.0, 4096.0)),
        "paper-high-to-low": replace(_FINETUNED, lambda_range=(4.0, 1024.0)),
        "small": CodecTraining(
            CodecRecipe(epochs=20, lr=2e-4, batch_size=8), epoch_steps=50, size=128, strategy="kr"
        ),
    }
)
"""Fine-tuning: ``paper`` is Tab. 10 of Duan et al. (2024), 100 k steps on new data, and with the
ranges of their code on new rates (from 32 to 1024); ``small`` is 1 k steps (ours)."""


def lambda_range(model: CodecModel) -> tuple[float, float]:
    """The λ that a model's encoder was trained for, or is made for, as float32 (`check_range`).

    Example:
        >>> from fastcil.compression import build_codec
        >>> lambda_range(build_codec("hierarchical-tiny"))
        (32.0, 1024.0)
    """
    if "encoder" in model.embeddings:
        return cast(tuple[float, float], tuple(model.embeddings["encoder"].range.tolist()))
    return check_range("lambda_range", model.config.lambda_range)


def is_trained_for(model: CodecModel, lmbda: float) -> bool:
    """Whether a λ, as the float32 that a bitstream holds, is within a model's range.

    Example:
        >>> from fastcil.compression import build_codec
        >>> model = build_codec("hierarchical-tiny", lambda_range=(29.26125, 785.2))
        >>> is_trained_for(model, 29.26125), is_trained_for(model, 29.0)
        (True, False)
    """
    low, high = lambda_range(model)
    return low <= torch.tensor(lmbda, dtype=torch.float32, device="cpu").item() <= high


def draw_lambdas(count: int, limits: tuple[float, float], generator: torch.Generator) -> Tensor:
    r"""Draws λ so that its cube root is uniform.

    .. math:: \lambda = \big( \lambda_0^{1/3}
        + u \, (\lambda_1^{1/3} - \lambda_0^{1/3}) \big)^3, \qquad u \sim U[0, 1)

    (Duan et al. 2024, as their code has it.) A uniform λ would hardly ever be a low one.

    Args:
        count: B.
        limits: Smallest and largest λ.
        generator: A CPU generator.

    Returns:
        float32 on the CPU.  # [B]

    Example:
        >>> draw_lambdas(3, (8.0, 8.0), torch.Generator())
        tensor([8., 8., 8.])
    """
    low, high = (limit ** (1 / 3) for limit in limits)
    luck = torch.rand(count, generator=generator, dtype=torch.float64)
    drawn = (low + luck * (high - low)) ** 3
    return drawn.float().clamp(*limits)


def preset(table: Mapping[str, CodecTraining], name: str) -> CodecTraining:
    """A recipe by name.

    Raises:
        FastcilError: There is none of that name.

    Example:
        >>> preset(PRETRAINING, "small").recipe.batch_size
        8
    """
    if name not in table:
        raise FastcilError(f"preset is {name!r}; it must be one of {', '.join(table)}.")
    return table[name]
