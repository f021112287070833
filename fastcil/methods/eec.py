"""EEC: old classes are kept as codes of an autoencoder, and learned again from what it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcil.contract import (
    Batch,
    Context,
    Losses,
    Method,
    Recipe,
    Record,
    Retained,
    Stage,
    Stream,
    Task,
    check_choices,
    check_not_negative,
    evaluating,
)
from fastcil.data import Examples
from fastcil.errors import FastcilError
from fastcil.memory.episodes import Costs, Episodes, Group, Rows
from fastcil.memory.fitting_rows import fitting_rows
from fastcil.memory.regenerate import Regenerated, regenerate
from fastcil.memory.replay import replay_streams
from fastcil.methods.recipes import online
from fastcil.nn import TaskOutputs
from fastcil.nn.image_autoencoder import ImageAutoencoder, code_length, decoder_length
from fastcil.nn.label_smoothing import smoothed_cross_entropy
from fastcil.nn.lifecycle import linear_head, start_network

_STEPS = (60, 120, 160)
_FIRST = Recipe(
    epochs=200, lr=0.1, schedule="step", milestones=_STEPS, gamma=0.2, weight_decay=5e-4
)
_LATER = Recipe(epochs=45, lr=0.1, schedule="step", milestones=(37,), weight_decay=5e-4)
_AUTOENCODER = Recipe(
    epochs=100, lr=1e-3, schedule="step", milestones=(50,), optimizer="adam", weight_decay=5e-4
)
_SAMC: dict[str, Any] = {
    "first": online(0.1),
    "later": online(0.1),
    "autoencoder": replace(_AUTOENCODER, epochs=20, milestones=(10,), batch_size=32),
    "replay": "paired",
    "head": "task",
}


class EEC(Method):
    r"""Encoding episodes as concepts (Ayub and Wagner 2021).

    After the classifier has learned a task, an autoencoder is trained on the task's images,

    .. math:: L = (1 - \lambda) \, \mathrm{MSE}(x, \hat x)
        + \lambda \, \mathrm{MSE}(F(x), F(\hat x)) ,

    with F the classifier's last feature maps, and the images are kept as codes. Over budget a
    class's codes are clustered by k-means to as many clusters as its share holds; of a cluster
    are kept the centroid c, the diagonal v of its covariance and its number n. At the start of a
    task images are made again of all old classes, n decoded draws from N(c, v) of each cluster;
    single codes are decoded as they are. With them and the new data the classifier minimises the
    mean of

    .. math:: w \, \mathrm{CE}_\epsilon(z, y), \qquad w = e^{-\gamma a}, \qquad
        \gamma = 1 - \frac{\mathrm{acc}(\hat x)}{\mathrm{acc}(x)} ,

    CE with labels smoothed by epsilon, w = 1 for new images; a is the number of tasks since the
    image's own, whose gamma (here no less than 0) was measured when it was learned.

    What is kept, bytes of every budget: codes and centroids, covariances, numbers, labels, and
    all decoders needed to make images of them, batch norms folded in. Encoders are let go. A task
    adds a decoder of its own, as published, while all decoders together take no more than
    ``decoders`` of what may be kept. Where they would, one autoencoder is trained on the new
    images and on those made again of all old classes, which are encoded anew by it, and its
    decoder is the only one. (What becomes of old decoders is not published.) A budget in images
    allows the bytes of as many raw ones, decoders included; the released code limits the number
    of codes and centroids alone.

    The autoencoder learns from the images that the run's augmentation cuts, and encodes whole
    images, squeezed to the training size.

    Example:
        >>> EEC.keeps, EEC.Config().width
        ('nothing', 64)
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of EEC.

        Recipes, width and smoothing are those of the released code, in which lambda is not
        defined and F is not used: ``content``, ``decoders`` and the dtype of codes are ours.
        The released script also multiplies the age by 0: ``decay="none"``. ``PRESETS`` are for
        the protocol of Bai et al. (2023, SAMC), who do not tell EEC's settings: one pass of
        the classifier at batch 10 and their learning rate; ours are the number of passes of the
        autoencoder and its width, for decoder and codes must fit into the bytes of 10 images.

        Args:
            first: Recipe of the classifier in the first task.
            later: Recipe of the classifier in every later task.
            autoencoder: Recipe of the autoencoder.
            width: Channels of its widest maps, a multiple of 4; a code of an image of side S has
                about width / 4 * (S / 4)^2 numbers.
            content: Lambda.
            smoothing: Epsilon of the smoothed labels.
            decay: ``age``, or ``none`` for w = 1.
            codes: Dtype of what is kept; the released code has float32.
            decoders: Largest share of the budget for decoders; 0 for a single autoencoder.
            per_class: Most images made again of each class; 0 for as many as were encoded.
            replay: New images and those made again are one set (``joined``, as published), or
                each step has as many of one as of the other (``paired``).
            head: ``all`` known classes share one softmax, or each ``task`` has its own.
        """

        first: Recipe = _FIRST
        later: Recipe = _LATER
        autoencoder: Recipe = field(default=_AUTOENCODER, metadata={"own_batch": True})
        width: int = 64
        content: float = 0.5
        smoothing: float = 0.1
        decay: Literal["age", "none"] = "age"
        codes: Literal["float16", "float32"] = "float16"
        decoders: float = 0.5
        per_class: int = 0
        replay: Literal["joined", "paired"] = "joined"
        head: Literal["all", "task"] = "all"

        def __post_init__(self) -> None:
            check_choices(self)
            check_not_negative("per_class", self.per_class)
            decoder_length(self.width)
            for name in ("content", "smoothing", "decoders"):
                if not 0 <= getattr(self, name) <= 1:
                    raise FastcilError(
                        f"{name} is {getattr(self, name)}; it must be a number from 0 to 1."
                    )

    PRESETS: ClassVar[dict[str, Config]] = {
        "samc-cifar10": Config(**_SAMC, width=16),
        "samc-cifar100": Config(**_SAMC, width=16),
        "samc-mini": Config(**_SAMC, width=32),
    }

    config: Config
    keeps = "nothing"
    allowance: Tensor  # float64 []
    seed: Tensor  # int64 []

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.episodes = Episodes(getattr(torch, config.codes))
        self.outputs = TaskOutputs(config.head)
        self.autoencoder: ImageAutoencoder | None = None
        self.register_buffer("allowance", torch.zeros((), dtype=torch.float64))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        self._made: Regenerated | None = None

    @property
    def costs(self) -> Costs:
        """Bytes of what is kept."""
        width, size = self.config.width, self.context.augmentation.size
        itemsize = self.episodes.centres.element_size()
        return Costs(code_length(width, size), decoder_length(width), itemsize)

    def structure(self) -> dict[str, Any]:
        """Also whether an autoencoder is in training."""
        return {**super().structure(), "encodes": self.autoencoder is not None}

    def restore(self, structure: Mapping[str, Any]) -> None:
        """Makes room for the autoencoder in training, if there was one."""
        parts = {name: described for name, described in structure.items() if name != "encodes"}
        super().restore(parts)
        self.autoencoder = ImageAutoencoder(self.config.width) if structure["encodes"] else None

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Forgets images that were made of other codes."""
        super().load_tensors(tensors)
        self._made = None

    def begin_task(self, task: Task) -> None:
        """Adds the new classes, and starts an autoencoder if anything may be kept.

        Raises:
            FastcilError: What may be kept is too little for a decoder and a code of every class.
        """
        if task.first:
            self.network = start_network(self.context.make_backbone(), task.total)
        else:
            self.network.thaw(0)
            linear_head(self.network).grow(task.total)
        self.outputs.add(len(task.new_classes))
        self.allowance = torch.full_like(self.allowance, task.allowance)
        self.seed = torch.randint(2**31, (), dtype=torch.int64).to(self.seed.device)
        self._made = None
        self.autoencoder = None
        if task.allowance > 0:
            self._check_room(task)
            self.autoencoder = ImageAutoencoder(self.config.width)

    def _check_room(self, task: Task) -> None:
        """Refuses a budget without room for what it takes to make images again."""
        least = self._least(task, 1 if self._merges(task) else len(self.episodes.decoders) + 1)
        if least > task.allowance:
            width = self.config.width
            narrower = f", or set eec.width below {width}" if width > 4 else ""
            raise FastcilError(
                f"memory allows {task.allowance:.0f} bytes, but EEC's decoder and a code of each "
                f"of {task.total} classes take {least}; give it at least {least} bytes, and more "
                f"for classes still to come{narrower}."
            )

    def _least(self, task: Task, decoders: int) -> int:
        """Bytes of so many decoders and a code of each class that each task brought."""
        groups = {*self.episodes.groups(), *((label, task.index) for label in task.classes)}
        return self.costs.least(len(groups), decoders, task.index + 1)

    def _merges(self, task: Task) -> bool:
        """Whether one autoencoder takes the place of those before."""
        decoders, allowed = len(self.episodes.decoders), float(self.allowance)
        together = (decoders + 1) * self.costs.decoder * self.costs.itemsize
        share = self.config.decoders * allowed if self.config.decoders else 0.0
        return decoders > 0 and (together > share or self._least(task, decoders + 1) > allowed)

    def stages(self, task: Task) -> list[Stage]:
        """The classifier, then the autoencoder if anything may be kept."""
        config = self.config
        recipe = config.first if task.first else config.later
        made = self._regenerated(task)
        old = made.examples
        if config.replay == "paired":
            streams = replay_streams(replace(task, exemplars=old), recipe.batch_size)
        else:
            streams = (Stream((task.examples, old), recipe.batch_size),)
        stages = [
            Stage(
                name="eec",
                method=self,
                objective=partial(self._classify, self._weights(made, task)),
                streams=streams,
                recipe=recipe,
                parameters=self.network.trained_parameters,
                primary=True,
                logits=self.logits,
            )
        ]
        autoencoder = self.autoencoder
        if autoencoder is not None:
            parts = (task.examples, old) if self._merges(task) else (task.examples,)
            stages.append(
                Stage(
                    name="autoencoder",
                    method=self,
                    objective=self._reconstruct,
                    streams=(Stream(parts, config.autoencoder.batch_size),),
                    recipe=config.autoencoder,
                    parameters=autoencoder.parameters,
                    begin=lambda: self.network.freeze(0),
                    finish=partial(self._keep, task),
                    behind=True,
                )
            )
        return stages

    def _classify(self, weights: Tensor, batch: Batch) -> Losses:
        """Weighted cross-entropy with smoothed labels; part 1 are images made again."""
        logits = self.network(batch.images)  # [B, K]
        own = None
        if self.config.head == "task":
            own = self.outputs.own(batch.labels, logits.shape[1])
        terms = smoothed_cross_entropy(logits, batch.labels, self.config.smoothing, own)  # [B]
        if len(weights):
            old = batch.part == 1
            terms = torch.where(old, weights[torch.where(old, batch.index, 0)], 1.0) * terms
        return {"classification": terms.mean()}

    def _reconstruct(self, batch: Batch) -> Losses:
        """Errors of pixels and of the classifier's maps."""
        assert self.autoencoder is not None
        content = self.config.content
        restored = self.autoencoder(batch.images)
        losses = {"pixels": (1 - content) * F.mse_loss(restored, batch.images)}
        if content:
            maps = self.network.maps(batch.images)
            losses["content"] = content * F.mse_loss(self.network.maps(restored), maps)
        return losses

    def _regenerated(self, task: Task) -> Regenerated:
        """Images of the classes of earlier tasks, made once in a task."""
        if self._made is None:
            self._made = self._regenerate(
                torch.arange(len(self.episodes)), task.examples.images.device
            )
        return self._made

    def _regenerate(
        self, rows: Tensor, device: torch.device | str = "cpu", per_class: int | None = None
    ) -> Regenerated:
        """Images of some rows of what is kept, as many of a class as the config says."""
        return regenerate(
            self.episodes,
            rows,
            self.config.width,
            self.context.augmentation,
            seed=int(self.seed),
            per_class=self.config.per_class if per_class is None else per_class,
            device=device,
        )

    def _weights(self, made: Regenerated, task: Task) -> Tensor:
        """w of each image made again, [N]."""
        weights = torch.ones(len(made))
        if self.config.decay == "age":
            age = task.index - made.born
            weights = torch.exp(-self.episodes.gamma.cpu()[made.born] * age)
        return weights.to(linear_head(self.network).weight.device)

    def _keep(self, task: Task) -> None:
        """Encodes the task's images, and reduces what is kept to what may be."""
        assert self.autoencoder is not None
        episodes, alone = self.episodes, self._merges(task)
        with evaluating(self):
            sources = self._sources(task, alone)
            episodes.add_decoder(self.autoencoder.folded_decoder(), task.index, alone)
            rows = fitting_rows(
                sources,
                partial(self.context.scan, self.autoencoder.encode, look="whole"),
                float(self.allowance) - self.costs.fixed(len(episodes.decoders), task.index + 1),
                self.costs,
                episodes.centres.dtype,
                int(self.seed),
            )
            episodes.hold(rows)
            episodes.gamma[task.index] = self._gamma(task)
        self.network.thaw(0)

    def _sources(self, task: Task, alone: bool) -> dict[Group, Rows | Examples]:
        """What the task's classes are encoded from, and the old ones where they are kept anew."""
        episodes, made = self.episodes, self._regenerated(task)
        if alone and self.config.per_class:
            # What is not encoded anew is lost, however few images a task may train on.
            made = self._regenerate(torch.arange(len(episodes)), per_class=0)
        sources: dict[Group, Rows | Examples] = {}
        for label, born in episodes.groups():
            if alone:
                mine = (made.examples.labels.cpu() == label) & (made.born == born)
                sources[label, born] = _pick(made.examples, mine)
            else:
                sources[label, born] = episodes.rows(label, born)
        labels = task.examples.labels.cpu()
        for label in task.classes:
            sources[label, task.index] = _pick(task.examples, labels == label)
        return {group: source for group, source in sources.items() if len(source)}

    def _gamma(self, task: Task) -> float:
        """How much worse the task's images are classified once they are made again."""
        rows = (self.episodes.born.cpu() == task.index).nonzero().flatten()
        original = self._accuracy(task.examples)
        again = self._accuracy(self._regenerate(rows, task.examples.images.device).examples)
        return min(1.0, max(0.0, 1 - again / original)) if original else 0.0

    def _accuracy(self, examples: Examples) -> float:
        """Share of images whose class scores highest, among its task's if heads are of tasks."""
        logits = self.context.scan(self.logits, examples)
        labels = examples.labels.to(logits.device)
        logits = self.outputs.masked(logits, labels)
        return float((logits.argmax(1) == labels).double().mean())

    def end_task(self, task: Task) -> None:
        """Lets the encoder go, and the images made again."""
        if not float(self.allowance):
            self.episodes.clear()
        self.autoencoder = None
        self._made = None

    def retained(self) -> list[Retained]:
        """Codes, centroids, covariances and decoders."""
        return [self.episodes.retained()]

    def records(self) -> list[Record]:
        """An image of each class as it would be made again."""
        made = self._regenerate(torch.arange(len(self.episodes)), per_class=1).examples
        pictures = [made.images.image(place).numpy() for place in range(len(made))]
        payload = {"images": pictures, "labels": made.labels.tolist()}
        return [Record("images", "Images made again", payload)] if pictures else []


def _pick(examples: Examples, mask: Tensor) -> Examples:
    """Those that a mask on the CPU picks."""
    return examples.select(mask.nonzero().flatten().to(examples.images.device))
