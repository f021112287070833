"""Dark experience replay: exemplars replayed with the logits they had when they were stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcil.contract import (
    Batch,
    Context,
    Losses,
    Method,
    Recipe,
    Retained,
    Stage,
    Stepper,
    Stream,
    Task,
    check_not_negative,
    total,
)
from fastcil.memory.reservoir import Reservoir
from fastcil.methods.recipes import FINETUNING
from fastcil.nn import masked_mean
from fastcil.nn.lifecycle import linear_head, start_network
from fastcil.ops import send

_CIFAR100 = Recipe(
    epochs=50,
    lr=0.03,
    schedule="step",
    milestones=(35, 45),
    gamma=0.2,
    momentum=0.0,
    weight_decay=0.0,
    batch_size=32,
)
_CIFAR10 = replace(_CIFAR100, schedule="constant", milestones=())
_MNIST = replace(_CIFAR10, epochs=1, batch_size=10)


@dataclass(frozen=True)
class DarkConfig:
    """Settings that both forms share; see `Dark.Config`.

    Example:
        >>> DarkConfig().first.batch_size
        32
    """

    first: Recipe = _CIFAR100
    later: Recipe = _CIFAR100
    alpha: float = 0.3
    replay_batch: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "replay_batch"):
            check_not_negative(name, getattr(self, name))


class DarkReplay(Method):
    """What dark experience replay and its ++ form are made of.

    Memory is a `Reservoir` of all images that training offers, in every step of every epoch, as in
    the released code; an image can be in it twice, with the logits of two steps. What lies in a
    slot: the image, its label, and the logits it had in the step in which it was offered, before
    that step's update. The image is stored as it is, the logits are those of its augmented view.
    A draw from memory is a forward pass of its own, with batch statistics of its own (as in the
    released code), and left out while it has only one image.

    A head that grows has no output for classes to come. The stored logits of those are infinite
    here, and a distance is a mean over the others; in the released code the head has all outputs
    from the start, and what is stored includes those of outputs that were taught nothing yet.

    Attributes:
        stored: The exemplars' logits as the task found them, row by row, float32 [M, K].
        fresh: The logits of the reservoir's slots, float32 [slots, K]; empty between tasks.
    """

    config: DarkConfig
    selection = "own"
    stored: Tensor
    fresh: Tensor

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.reservoir = Reservoir()
        self.register_buffer("stored", torch.empty(0, 0))
        self.register_buffer("fresh", torch.empty(0, 0))

    @property
    def beta(self) -> float:
        """Weight of the cross-entropy of exemplars."""
        return 0.0

    def begin_task(self, task: Task) -> None:
        """Starts the network, or adds the new classes; opens the reservoir."""
        if task.first:
            self.network = start_network(self.context.make_backbone(), task.total)
        else:
            linear_head(self.network).grow(task.total)
        held = len(task.exemplars)
        self.reservoir.open(task.room, len(task.examples), held)
        old, like = self.stored[:held], linear_head(self.network).weight
        self.stored = like.new_full((held, task.total), torch.inf, requires_grad=False)
        self.stored[: len(old), : old.shape[1]] = old
        slots = len(self.reservoir.slots)
        self.fresh = like.new_full((slots, task.total), torch.inf, requires_grad=False)
        self.fresh[:held] = self.stored[:slots]

    def stages(self, task: Task) -> list[Stage]:
        """One stage: new data, and a draw from memory for each term that replays."""
        recipe = self.config.first if task.first else self.config.later
        streams = [Stream((task.examples,), recipe.batch_size)]
        if len(self.reservoir.slots):
            draw = Stream(
                (task.examples, task.exemplars),
                self.config.replay_batch or recipe.batch_size,
                subset=self.reservoir.pool,
            )
            streams += [draw, replace(draw)] if self.beta else [draw]
        return [_DarkStage(self, recipe, tuple(streams))]

    def objective(self, batch: Batch) -> Losses:
        """The loss on a joined batch, as addons need it: part 1 are exemplars, as stored.

        The new images' cross-entropy, alpha times the exemplars' distance from the logits they
        came with, and beta times their cross-entropy.
        """
        logits = self.network(batch.images)  # [B, K]
        terms = F.cross_entropy(logits, batch.labels, reduction="none")  # [B]
        if not len(self.stored):
            return {"classification": terms.mean()}
        old = batch.part == 1
        targets = self.stored[torch.where(old, batch.index, 0)]  # [B, K]
        targets = targets.masked_fill(~old[:, None], torch.inf)
        losses = {
            "classification": masked_mean(terms, ~old),
            "distillation": self.config.alpha * _distance(logits, targets),
        }
        if self.beta:
            losses["replay"] = self.beta * masked_mean(terms, old)
        return losses

    def learn(self, batch: Batch) -> tuple[Losses, Tensor]:
        """Cross-entropy of new images, and their logits [B, K]."""
        logits = self.network(batch.images)
        return {"classification": F.cross_entropy(logits, batch.labels)}, logits

    def match(self, batch: Batch, targets: Tensor) -> Losses:
        """Distance from the logits that were stored, ``targets`` [B, K]."""
        logits = self.network(batch.images)
        return {"distillation": self.config.alpha * _distance(logits, targets)}

    def replay(self, batch: Batch) -> Losses:
        """Cross-entropy of images from memory."""
        logits = self.network(batch.images)
        return {"replay": self.beta * F.cross_entropy(logits, batch.labels)}

    def offer(self, batch: Batch, logits: Tensor) -> None:
        """Offers a step's new images, and their logits [B, K], to the reservoir."""
        assert batch.entry is not None
        which, slots = self.reservoir.offer(batch.entry, self.reservoir.draws())
        which, slots = send((which, slots), logits.device)
        self.fresh.index_copy_(0, slots, logits.detach().float()[which].to(self.fresh.dtype))

    def close(self) -> None:
        """Puts what the reservoir holds in a random order, of which memory keeps a prefix."""
        order = self.reservoir.shuffle()
        self.stored = self.fresh[order.to(self.fresh.device)]
        self.fresh = self.fresh[:0].clone()

    def chosen(self) -> Tensor:
        """What the reservoir holds, in the order of ``stored``."""
        return self.reservoir.slots

    def beside(self, classes: int) -> int:
        """A row of float32 logits."""
        return 4 * classes

    def end_task(self, task: Task) -> None:
        """Keeps the logits of those exemplars that memory kept."""
        self.stored = self.stored[: len(task.exemplars)].clone()
        self.reservoir.open(0, 0, 0)

    def retained(self) -> list[Retained]:
        """The exemplars' logits, one row for each."""
        return [Retained("logits of exemplars", "logits", {"logits": self.stored})]


class Dark(DarkReplay):
    r"""Dark experience replay, DER (Buzzega et al. 2020).

    Each step draws images x, y from the new data and, from memory, images x' with the logits z'
    that the network gave them when they were stored, and minimises

    .. math:: \mathrm{CE}(f(x), y) + \alpha \, \frac{1}{B K} \sum_{i, k} (f(x'_i)_k - z'_{ik})^2

    (the mean over batch and classes is the released code's reading of the norm). Memory is filled
    by reservoir sampling while the stream passes, logits included: see `DarkReplay`.

    Example:
        >>> Dark.Config().alpha, Dark.selection
        (0.3, 'own')
    """

    @dataclass(frozen=True)
    class Config(DarkConfig):
        """Settings of dark experience replay.

        The defaults are the released ones for Seq-CIFAR-100. ``PRESETS`` are those for
        Seq-CIFAR-10 (memories of 200, 500 and 5120 images alike) and Seq-MNIST (200).

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            alpha: Weight of the distance from the stored logits.
            replay_batch: Images of each draw from memory; 0 for as many as of the new data.
        """

    PRESETS: ClassVar[dict[str, DarkConfig]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING),
        "cifar10": Config(first=_CIFAR10, later=_CIFAR10),
        "mnist": Config(first=_MNIST, later=_MNIST, alpha=0.2),
    }

    config: Config


class DarkPP(DarkReplay):
    r"""Dark experience replay ++, DER++ (Buzzega et al. 2020).

    To the loss of `Dark` comes the cross-entropy of a second, independent draw x'', y'' from
    memory,

    .. math:: \mathrm{CE}(f(x), y) + \alpha \, \frac{1}{B K} \sum_{i, k} (f(x'_i)_k - z'_{ik})^2
        + \beta \, \mathrm{CE}(f(x''), y'') .

    Example:
        >>> DarkPP.PRESETS["cifar10-5120"].beta
        1.0
    """

    @dataclass(frozen=True)
    class Config(DarkConfig):
        """Settings of DER++; the defaults are the released ones for Seq-CIFAR-100.

        There the released configuration has alpha 0.3, the list of best arguments beside it 0.1.
        ``PRESETS`` are those of the released code for Seq-CIFAR-10, with a memory of 200, 500 or
        5120 images, and for Seq-MNIST (200).

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            alpha: Weight of the distance from the stored logits.
            replay_batch: Images of each draw from memory; 0 for as many as of the new data.
            beta: Weight of the cross-entropy of exemplars.
        """

        beta: float = 0.5

        def __post_init__(self) -> None:
            super().__post_init__()
            check_not_negative("beta", self.beta)

    PRESETS: ClassVar[dict[str, DarkConfig]] = {
        "finetuning": Config(first=FINETUNING, later=FINETUNING),
        "cifar10-200": Config(first=_CIFAR10, later=_CIFAR10, alpha=0.1),
        "cifar10-500": Config(first=_CIFAR10, later=_CIFAR10, alpha=0.2),
        "cifar10-5120": Config(first=_CIFAR10, later=_CIFAR10, alpha=0.1, beta=1.0),
        "mnist": Config(first=_MNIST, later=_MNIST, alpha=0.2, beta=1.0, replay_batch=128),
    }

    config: Config

    @property
    def beta(self) -> float:
        """Weight of the cross-entropy of exemplars."""
        return self.config.beta


class _DarkStage(Stage):
    """New data and draws from memory in one step, after which the new data are offered to it."""

    def __init__(self, dark: DarkReplay, recipe: Recipe, streams: tuple[Stream, ...]) -> None:
        super().__init__(
            name="dark replay",
            method=dark,
            objective=dark.objective,
            streams=streams,
            recipe=recipe,
            parameters=dark.network.trained_parameters,
            primary=True,
            logits=dark.logits,
            finish=dark.close,
        )
        self._dark = dark
        self._made: dict[str, Callable[..., Any]] = {}

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls one term of the loss, compiled if the objective is."""
        if self.compiled is None:
            return function(*args)
        name = function.__name__
        if name not in self._made:
            self._made[name] = torch.compile(function)
        return self._made[name](*args)

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """The terms of the loss, each on its own batch, and one update."""
        dark, (new, *drawn) = self._dark, batches
        losses, logits = self._run(dark.learn, new)
        # Batch normalisation has no variance to estimate from one image.
        if drawn and len(drawn[0]) > 1:
            (slots,) = send((dark.reservoir.occupied()[drawn[0].entry],), dark.fresh.device)
            losses = {**losses, **self._run(dark.match, drawn[0], dark.fresh[slots])}
            for batch in drawn[1:]:
                losses |= self._run(dark.replay, batch)
        stepper.update(total(losses))
        dark.offer(new, logits)
        return {name: value.detach() for name, value in losses.items()}


def _distance(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference over the entries where targets [B, K] are finite."""
    known = targets.isfinite()
    difference = torch.where(known, logits.to(targets.dtype) - targets, 0.0)
    return difference.square().sum() / known.sum().clamp(min=1)
