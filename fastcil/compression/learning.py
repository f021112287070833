"""What the trainer runs when a codec learns: the model, what it replays, its moving average."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastcil.compression.conditioning import check_range
from fastcil.compression.model import CodecModel
from fastcil.compression.objective import squared_error
from fastcil.compression.stored_latents import StoredLatents
from fastcil.compression.training import CodecTraining, draw_lambdas, lambda_range
from fastcil.contract import Batch, Losses, Stage, Stepper, Stream
from fastcil.data import Augmentation, Examples
from fastcil.errors import FastcilError
from fastcil.ops import send


class CodecLearner(nn.Module):
    r"""A codec that is being trained.

    Without replay the loss is the rate-distortion objective
    (`fastcil.compression.rate_distortion`) of each batch x at λ drawn per image
    (`fastcil.compression.draw_lambdas`). Knowledge replay (Duan et al. 2024) adds old images x':

    .. math:: L = (1 - \alpha) \, \mathrm{RD}(x, \lambda) + \alpha \, \frac1{B'} \sum_b
        \lambda'_b \, \mathrm{MSE}\big(2 \, g(z'_b, \lambda'_b) - 1, \; 2 x'_b - 1\big)

    where z' are the hard-quantised latents that a frozen copy of the model as it was makes of x' at
    λ' drawn from the range it was trained for, and g is the new decoder. z' stands for the old
    bitstreams, whose rate can't change any more, so the term has none. Since the entropy branch is
    frozen, they mean the same to the new model.

    Where nothing is left but the old bitstreams themselves (`StoredLatents`), z' are windows of
    their latents, λ' is theirs, and in place of 2 x' - 1 stands what the old decoder makes of them
    (our extension).

    Parts are frozen, and λ-MLPs of the parts that learn are rescaled for a larger range of λ, once,
    as this is made. Every random number comes from one generator, whose state is part of `state`.

    Args:
        model: The codec, on its device; it is trained in place.
        training: How.
        seed: Of λ and of the noise that stands for quantisation.

    Raises:
        FastcilError: A range of λ that doesn't contain the model's own, or one of many λ for a
            model of one rate.

    Example:
        >>> from fastcil.compression import build_codec
        >>> from fastcil.compression.training import PRETRAINING
        >>> learner = CodecLearner(build_codec("hierarchical-tiny"), PRETRAINING["small"], seed=0)
        >>> sorted(learner.losses(torch.rand(1, 3, 64, 64), None))
        ['bpp', 'distortion']
    """

    average: AveragedModel | None

    def __init__(self, model: CodecModel, training: CodecTraining, seed: int) -> None:
        super().__init__()
        self.config = training
        replays = training.strategy == "kr"
        self.old = copy.deepcopy(model).requires_grad_(False) if replays else None
        self.old_range = lambda_range(model)
        self.model = model
        self.trained = model.trainable(training.strategy)
        wanted = training.lambda_range or self.old_range
        low, high = self.new_range = check_range("lambda_range", wanted)
        if low > self.old_range[0] or high < self.old_range[1]:
            raise FastcilError(
                f"lambda_range is {wanted}; it must contain the range that the codec was trained "
                f"for, {self.old_range}."
            )
        if low < high and not model.embeddings:
            raise FastcilError(
                f"lambda_range is {wanted}; this {model.kind} has one rate, so give one λ twice, "
                f"or take a model with an embedding of λ."
            )
        if model.embeddings:
            model.rescale_embeddings(self.new_range)
        # Its counter stays on the CPU, where looking at it waits for nothing.
        self.average = AveragedModel(model) if training.ema else None
        self.generator = torch.Generator().manual_seed(seed)
        self.train()

    @property
    def result(self) -> CodecModel:
        """The codec so far: the moving average where there is one."""
        if self.average is None:
            return self.model
        averaged: CodecModel = self.average.module  # type: ignore[assignment]
        return averaged

    def train(self, mode: bool = True) -> CodecLearner:
        """As in torch, but the old codec and the average stay in evaluation mode."""
        super().train(mode)
        for still in (self.old, self.average):
            if still is not None:
                still.eval()
        return self

    def stage(self, examples: Examples, replay: Examples | StoredLatents | None = None) -> Stage:
        """The training, for the trainer to run with `augmentation`.

        Args:
            examples: What to learn from.
            replay: Old images, or latents of old streams, for knowledge replay.

        Raises:
            FastcilError: Something to replay without knowledge replay, or the other way round; no
                image; latents that are to become originals, leave no new images, or are smaller
                than a window.
        """
        config = self.config
        if (replay is None) != (self.old is None):
            raise FastcilError(
                f"replay is {'None' if replay is None else 'given'} with the strategy "
                f"'{config.strategy}'; 'kr' needs old images to replay, and no other takes any."
            )
        for name, given in (("examples", examples), ("replay", replay)):
            if given is not None and not len(given):
                raise FastcilError(f"{name} has no image; give at least one.")
        count = config.recipe.batch_size
        parts = [(examples, count)]
        replayed = 0
        stored: StoredLatents | None = None
        if isinstance(replay, StoredLatents):
            self._check_stored(replay)
            parts, stored = [(examples, count - config.replayed)], replay
        elif replay is not None:
            parts = [(examples, count - config.replayed), (replay, config.replayed)]
            # Without new images the replayed ones lead, whose passes may end in a shorter batch.
            alone = config.replayed == count
            replayed = count if alone else min(config.replayed, len(replay))
        return _CodecStage(
            name=config.strategy,
            method=self,
            objective=partial(self._objective, replayed=replayed, stored=stored),
            streams=tuple(Stream((part,), size) for part, size in parts if size),
            recipe=config.recipe,
            parameters=lambda: self.trained,
            primary=True,
            steps=config.epoch_steps,
        )

    @property
    def augmentation(self) -> Augmentation:
        """Windows of the images' own resolution, half of them mirrored, as values from 0 to 1."""
        return Augmentation(
            self.config.size,
            crop="window",
            brightness=0.0,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        )

    def losses(
        self,
        images: Tensor | None,
        replayed: Tensor | None,
        stored: StoredLatents | None = None,
    ) -> Losses:
        """The terms of the loss, each with its weight.

        Args:
            images: New images in 0..1, or None.  # [B, 3, H, W]
            replayed: Old images, or None.  # [B', 3, H, W]
            stored: What to draw windows of in their place, or None.

        Returns:
            ``bpp`` and ``distortion`` of the new images, ``replay`` of the old ones.
        """
        alpha = 0.0 if replayed is None and stored is None else self.config.alpha
        losses = {}
        if images is not None:
            parts = self._rate_distortion(images)
            losses = {name: (1 - alpha) * parts[name] for name in ("bpp", "distortion")}
        if replayed is not None:
            losses["replay"] = alpha * self._replay(replayed)
        if stored is not None:
            losses["replay"] = alpha * self._replay_stored(stored)
        return losses

    def state(self) -> dict[str, Any]:
        """All that training changes, but for the optimiser: tensors by name."""
        return {
            "model": dict(self.model.state_dict()),
            "average": None if self.average is None else dict(self.average.state_dict()),
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` gave."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.generator.set_state(state["generator"])

    def _check_stored(self, stored: StoredLatents) -> None:
        """Refuses latents of streams that can't be replayed."""
        config = self.config
        if config.target != "outputs":
            raise FastcilError(
                "target is 'originals', which stored streams don't hold; take 'outputs', what the "
                "old decoder makes of them."
            )
        if config.replayed == config.recipe.batch_size:
            raise FastcilError(
                f"alpha is {config.alpha}, which leaves no new image in a batch of "
                f"{config.recipe.batch_size}; with stored streams take less."
            )
        if stored.least < config.size:
            raise FastcilError(
                f"size is {config.size}, and a stored stream's shorter side is {stored.least} "
                f"pixels with its padding; take a smaller size."
            )

    def _objective(
        self, batch: Batch, replayed: int, stored: StoredLatents | None = None
    ) -> Losses:
        """Of the images of a batch the last ones are replayed, as many as there are at most."""
        fresh = max(0, len(batch) - replayed)
        return self.losses(
            batch.images[:fresh] if fresh else None,
            batch.images[fresh:] if replayed else None,
            stored,
        )

    def _rate_distortion(self, images: Tensor) -> dict[str, Tensor]:
        """The rate-distortion objective of new images."""
        rates = self._rates(images, self.new_range)
        out = self.model(images, rates, generator=self._noise(images.device))
        return self.model.loss(out, images, rates)

    def _replay(self, images: Tensor) -> Tensor:
        """What the new decoder loses on the old codec's latents."""
        assert self.old is not None
        rates = self._rates(images, self.old_range)
        latents = self.old.quantised(images, rates)
        originals = images if self.config.target == "originals" else None
        return self._drift(latents, rates, (images.shape[-2], images.shape[-1]), originals)

    def _replay_stored(self, stored: StoredLatents) -> Tensor:
        """What the new decoder loses on windows of old streams' latents."""
        side = self.config.size
        drawn, its = stored.draw(self.config.replayed, side, self.generator)
        device = next(self.model.parameters()).device
        *latents, rates = send((*drawn, its), device)
        return self._drift(latents, rates, (side, side))

    def _drift(
        self,
        latents: Sequence[Tensor],
        rates: Tensor,
        size: tuple[int, int],
        wanted: Tensor | None = None,
    ) -> Tensor:
        """λ MSE of the new decoder's images from those wanted, or from the old decoder's."""
        if wanted is None:
            assert self.old is not None
            with torch.no_grad():
                wanted = self.old.reconstruct(latents, rates, size).clamp(0, 1)
        x_hat = self.model.reconstruct(latents, rates, size)
        return (rates * squared_error(x_hat, wanted)).mean()

    def _rates(self, images: Tensor, limits: tuple[float, float]) -> Tensor:
        """A λ for each image, on its device without a wait for it."""
        (rates,) = send((draw_lambdas(len(images), limits, self.generator),), images.device)
        return rates

    def _noise(self, device: torch.device) -> torch.Generator:
        """Where the noise of a step comes from: a device's own generator is many times faster."""
        if device.type == "cpu":
            return self.generator
        (seed,) = torch.randint(2**62, (1,), generator=self.generator).tolist()
        return torch.Generator(device).manual_seed(seed)

    def update_average(self) -> None:
        """One update of the moving average, if there is one, whose decay grows from 0 to ``ema``.

        `AveragedModel.update_parameters` would send its counter to the device and wait.
        """
        if self.average is None:
            return
        config, done = self.config, int(self.average.n_averaged)
        decay = config.ema * (1 - math.exp(-done / config.ema_ramp))
        averaged = [p.detach() for p in self.average.module.parameters()]
        current = [p.detach() for p in self.model.parameters()]
        get_ema_multi_avg_fn(decay)(averaged, current, done)
        self.average.n_averaged += 1


@dataclass
class _CodecStage(Stage):
    """A stage that updates the moving average after each step."""

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """The usual step, then the average."""
        losses = super().step(batches, stepper)
        learner = self.method
        assert isinstance(learner, CodecLearner)
        learner.update_average()
        return losses
