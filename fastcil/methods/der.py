"""DER: one more feature extractor per task, then a balanced classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
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
    check_choices,
    check_not_negative,
    check_positive,
)
from fastcil.errors import FastcilError
from fastcil.memory.balance import balanced_subset
from fastcil.methods.recipes import PYCIL_FIRST
from fastcil.nn import LinearHead, Network
from fastcil.nn.channel_masks import MaskedResNet
from fastcil.nn.heads import aligning_factor
from fastcil.nn.lifecycle import channels, linear_head, new_head, start_network, successor
from fastcil.nn.pruning import PrunedResNet, prune

_CIFAR = Recipe(epochs=170, lr=0.1, schedule="step", milestones=(100, 120), warmup=10)
_IMAGENET = Recipe(
    epochs=220,
    lr=0.1,
    schedule="step",
    milestones=(60, 120, 160, 180),
    warmup=20,
    batch_size=256,
)
_AS_LATER = Recipe(epochs=0, lr=0.1)
_PYCIL_LATER = replace(PYCIL_FIRST, epochs=170, milestones=(80, 120, 150), weight_decay=2e-4)
_CLASSIFIER = Recipe(epochs=30, lr=0.1, schedule="step", milestones=(15,))


class DER(Method):
    """Dynamically expandable representation (Yan et al. 2021).

    Task t adds an extractor F_t, a copy of F_{t-1} that goes on training, while all older ones are
    frozen, batch-norm statistics included. The features are u = [F_1(x), ..., F_t(x)] (Eq. 1).

    Stage ``representation`` (Eqs. 3, 4):

        L = CE(H u, y) + lambda_a CE(H_a F_t(x), y_a) ,
        y_a = 0 for every old class and y - known + 1 for a new one;

    the auxiliary term from the second task on. The heads have no bias, are fresh in each task,
    and are drawn anew when the warm-up ends, as in the released code, which the published figures
    come from. With ``head="copied"`` the old block of H is kept instead, as the paper has it, and
    nothing is drawn anew before the second stage.

    With ``masks`` (Sec. 3.3) F_t learns which of its channels it needs (`MaskedResNet`): within
    every epoch of B steps the masks' scale goes from soft to sharp,

        s = 1 / s_max + (s_max - 1 / s_max) (b - 1) / (B - 1)        at step b (Eq. 7),

    the loss has lambda_s times the share of weights in use beside it (Eqs. 9, 10), and when the
    stage is done the channels that are off are removed for good (`fastcil.nn.pruning.prune`):
    what is kept of F_t is really smaller. F_{t+1} starts from what is left of F_t, its other
    channels fresh. That takes a ResNet of fastcil's. No code of the authors' has it: all they
    released is "w/o P", the default here.

    Stage ``classifier``, from the second task on: H is drawn anew and trained alone, the network
    in evaluation mode, on a class-balanced subset, by CE(H u / T, y). The subset holds of each
    class as many images as the smallest one has, drawn with a generator seeded by the task.
    ``balance="weights"`` has none: the rows of H of new classes are brought to the mean length of
    the others, as `WA` does (Zhao et al. 2020), which is what PyCIL's DER ends a task with.

    The extractors beyond the first are `Retained` networks.

    Attributes:
        position: With ``masks``, steps of the current epoch done.  # []

    Example:
        >>> DER.Config().temperature, DER.PRESETS["imagenet"].temperature
        (5.0, 1.0)
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of DER; the default is the released CIFAR-100 configuration.

        ``DER.PRESETS["imagenet"]`` is the ImageNet-100 one, ``PRESETS["pycil"]`` what PyCIL (Zhou
        et al. 2023) trains CIFAR-100 with: other recipes, heads with a bias, H copied, and weights
        aligned. Milestones count from the end of the warm-up, as in the released scheduler: 100
        and 120 fall at epochs 110 and 130.

        Args:
            representation: Recipe of the first stage, in every task; at the end of its
                ``warmup`` epochs the heads are drawn anew.
            first: Recipe of the first task; without epochs it is ``representation``.
            classifier: Recipe of the second stage. With ``engine.epoch_scale`` it shrinks too,
                to too few steps for a fresh head soon; a short run wants more epochs here.
            aux_weight: lambda_a (Yan et al. 2021, Eq. 4).
            temperature: T by which the second stage divides the logits: 5 for CIFAR-100, 1 for
                ImageNet-100.
            head: ``fresh`` (released code) or ``copied`` (paper).
            bias: Whether the heads have a bias.
            balance: What ends a task from the second on: the stage ``classifier``, or aligned
                ``weights``, for which ``classifier`` and ``temperature`` say nothing.
            masks: Whether each extractor is masked and pruned (paper) or stays whole.
            sparsity: lambda_s. The authors tuned it for every setting and name no value; this is
                that of HAT (Serra et al. 2018), where the masks come from.
            largest_scale: s_max, likewise.
        """

        representation: Recipe = _CIFAR
        first: Recipe = _AS_LATER
        classifier: Recipe = _CLASSIFIER
        aux_weight: float = 1.0
        temperature: float = 5.0
        head: Literal["fresh", "copied"] = "fresh"
        bias: bool = False
        balance: Literal["classifier", "weights"] = "classifier"
        masks: bool = False
        sparsity: float = 0.75
        largest_scale: float = 400.0

        def __post_init__(self) -> None:
            check_choices(self)
            check_positive("temperature", self.temperature)
            check_positive("largest_scale", self.largest_scale)
            check_not_negative("aux_weight", self.aux_weight)
            check_not_negative("sparsity", self.sparsity)
            if self.balance == "classifier" and self.classifier.epochs < 1:
                raise FastcilError(
                    f"classifier.epochs is {self.classifier.epochs}; it must be at least 1, since "
                    f"the stage starts from a fresh head."
                )

    PRESETS: ClassVar[dict[str, Config]] = {
        "imagenet": Config(
            representation=_IMAGENET,
            classifier=replace(_CLASSIFIER, batch_size=256),
            temperature=1.0,
        ),
        "pycil": Config(
            representation=_PYCIL_LATER,
            first=PYCIL_FIRST,
            head="copied",
            bias=True,
            balance="weights",
        ),
    }

    config: Config
    adds_extractors = True
    position: Tensor  # []

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.aux_head: LinearHead | None = None
        if config.masks:
            self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def begin_task(self, task: Task) -> None:
        """Adds an extractor, freezes the others, and makes heads."""
        if task.first:
            backbone = self._masked(self.context.make_backbone())
            self.network = start_network(backbone, task.total, bias=self.config.bias)
            return
        old = list(self.network.extractors)
        new = self._grown(old[-1])
        features = sum(map(channels, [*old, new]))
        if self.config.head == "copied":
            head = linear_head(self.network)
            head.grow(task.total, features)
        else:
            head = new_head(new, features, task.total, bias=self.config.bias)
        self.network = Network([*old, new], head)
        self.network.freeze(*range(len(old)))
        outputs = len(task.new_classes) + 1
        self.aux_head = new_head(new, channels(new), outputs, bias=self.config.bias)

    def _masked(self, backbone: nn.Module) -> nn.Module:
        """A backbone with masks, if there are to be any."""
        if not self.config.masks:
            return backbone
        return MaskedResNet(backbone, self.config.largest_scale)

    def _grown(self, last: nn.Module) -> nn.Module:
        """The new extractor, which starts as the last one; what that lost is fresh."""
        if not isinstance(last, PrunedResNet):
            return successor(last)
        return self._masked(last.unpruned(self.context.make_backbone()))

    def stages(self, task: Task) -> list[Stage]:
        """``representation`` and, from the second task on, ``classifier``, if there is one."""
        everything = (task.examples, task.exemplars)
        recipe = self.config.representation
        if task.first and self.config.first.epochs:
            recipe = self.config.first
        stream = Stream(everything, recipe.batch_size)
        masks, aligned = self.config.masks, self.config.balance == "weights"
        stages: list[Stage] = [
            _AnnealedStage(
                name="representation",
                method=self,
                objective=partial(self._representation, task.known),
                streams=(stream,),
                recipe=recipe,
                parameters=self._trained,
                primary=True,
                logits=self.logits,
                finish=partial(self._finish, task.known) if masks or aligned else None,
                before_epoch=[partial(self._start_epoch, recipe.warmup)],
                before_step=partial(self._anneal, stream.steps) if masks else None,
            )
        ]
        if task.first or aligned:
            return stages
        labels = torch.cat([part.labels.cpu() for part in everything])
        recipe = self.config.classifier
        stages.append(
            Stage(
                name="classifier",
                method=self,
                objective=self._classifier,
                streams=(
                    Stream(everything, recipe.batch_size, balanced_subset(labels, task.index)),
                ),
                recipe=recipe,
                parameters=lambda: self.network.head.parameters(),
                begin=self._begin_classifier,
            )
        )
        return stages

    def _trained(self) -> list[torch.nn.Parameter]:
        """Parameters of the newest extractor and of the heads."""
        modules = [self.network.extractors[-1], self.network.head, self.aux_head]
        return [p for module in modules if module is not None for p in module.parameters()]

    def _representation(self, known: int, batch: Batch) -> Losses:
        """Cross-entropy over all classes and the auxiliary one (Eqs. 3, 4)."""
        features = self.network.features(batch.images)  # [B, D]
        losses = {"classification": F.cross_entropy(self.network.head(features), batch.labels)}
        if self.aux_head is not None:
            newest = features[:, -self.aux_head.in_features :]
            labels = (batch.labels - known + 1).clamp(min=0)
            losses["auxiliary"] = self.config.aux_weight * F.cross_entropy(
                self.aux_head(newest), labels
            )
        newest_extractor = self.network.extractors[-1]
        if isinstance(newest_extractor, MaskedResNet):
            losses["sparsity"] = self.config.sparsity * newest_extractor.used()
        return losses

    def _classifier(self, batch: Batch) -> Losses:
        """Cross-entropy of the logits divided by the temperature."""
        logits = self.network(batch.images) / self.config.temperature
        return {"classification": F.cross_entropy(logits, batch.labels)}

    def _start_epoch(self, warmup: int, epoch: int) -> None:
        """Draws the heads anew in the first epoch after the warm-up; softens the masks."""
        if self.config.masks:
            self.position.zero_()
        if self.config.head == "fresh" and epoch and epoch == warmup:
            redraw(linear_head(self.network))
            if self.aux_head is not None:
                redraw(self.aux_head)

    def _anneal(self, steps: int) -> None:
        """Sets the masks' scale for the next of an epoch's steps (Eq. 7)."""
        newest = self.network.extractors[-1]
        assert isinstance(newest, MaskedResNet)
        softest, sharpest = 1 / self.config.largest_scale, self.config.largest_scale
        # An epoch of a single step ends, and begins, with sharp masks.
        position = self.position if steps > 1 else torch.ones_like(self.position)
        done = (position / max(steps - 1, 1)).clamp(max=1.0)
        newest.set_scale(softest + (sharpest - softest) * done)
        self.position += 1

    def _finish(self, known: int) -> None:
        """Prunes where there are masks, and aligns the head where that balances it."""
        if self.config.masks:
            self._prune()
        if self.config.balance == "weights":
            self._align(known)

    @torch.no_grad()
    def _align(self, known: int) -> None:
        """Makes the rows of the classes from ``known`` on as long as those before."""
        weight = linear_head(self.network).weight
        if 0 < known < len(weight):
            weight[known:].mul_(aligning_factor(weight, known))
        self.aux_head = None

    def _prune(self) -> None:
        """Removes the channels that are off, and the head's columns that read them."""
        newest, head = self.network.extractors[-1], linear_head(self.network)
        assert isinstance(newest, MaskedResNet)
        pruned = prune(newest)
        older = torch.arange(head.in_features - newest.out_channels, device=head.weight.device)
        columns = torch.cat([older, len(older) + pruned.kept[-1]])
        head.weight = nn.Parameter(head.weight.detach()[:, columns].contiguous())
        self.network.extractors[-1] = pruned
        self.aux_head = None

    def _begin_classifier(self) -> None:
        """Freezes every extractor and draws the head anew."""
        self.network.freeze(*range(len(self.network.extractors)))
        redraw(linear_head(self.network))
        self.aux_head = None

    def retained(self) -> list[Retained]:
        """Every extractor but the first."""
        return [
            Retained(f"extractor {i}", "network", dict(extractor.state_dict()))
            for i, extractor in enumerate(self.network.extractors)
            if i
        ]


def redraw(head: LinearHead) -> None:
    """Gives a head fresh weights, in place: optimisers keep hold of its parameters."""
    fresh = LinearHead(head.in_features, head.classes, bias=head.bias is not None)
    head.load_state_dict(fresh.state_dict())


@dataclass
class _AnnealedStage(Stage):
    """A stage that sets something before each step."""

    before_step: Callable[[], None] | None = None

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """What comes first, and one training step."""
        if self.before_step is not None:
            self.before_step()
        return super().step(batches, stepper)
