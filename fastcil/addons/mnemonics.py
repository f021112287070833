"""Mnemonics: exemplars as parameters, trained so that a network trained on them does well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastcil.addons.exemplar_pictures import compare_pictures
from fastcil.addons.exemplar_stages import ClassMeans, NewExemplars, OldExemplars, mean_features
from fastcil.addons.free_images import FreeImages
from fastcil.contract import (
    Addon,
    Context,
    Method,
    Recipe,
    Record,
    Stage,
    Stream,
    Task,
    check_choices,
    check_positive,
    evaluating,
)
from fastcil.data import Examples, ImageStore
from fastcil.data.ranks import rank_in_class
from fastcil.errors import CompositionError, FastcilError

_RELEASED = Recipe(epochs=1, lr=1e-5, schedule="constant")
_BILEVEL = Recipe(epochs=1, lr=0.01, schedule="constant", optimizer="adam", weight_decay=0.0)
_SHOWN = 6


class Mnemonics(Addon):
    """Mnemonics training (Liu et al. 2020): the pixels of exemplars are learned.

    Memory chooses exemplars as it would anyhow; then their pixels train, as parameters, while the
    network stays as the method's stages left it, and memory keeps what they have become, rounded
    to the 256 levels and encoded by its codec: as many images as before, of the same sizes.

    ``form="bilevel"`` is the paper's: the new exemplars follow the gradient of the loss on all
    images of their task, through one or more training steps on the exemplars (Sec. 4.3,
    `fastcil.addons.exemplar_stages.NewExemplars`), and those of earlier tasks are split into two
    halves, each of which is adjusted by the other (Sec. 4.4, ``OldExemplars``). Every second
    exemplar of a class is in the same half; the paper draws them. theta is what the method's
    ``network`` trains, heads included, frozen extractors excepted; the loss is the cross-entropy
    of the method's ``logits``.

    ``form="released"`` is what the authors' code does: no step of the network, but class means of
    features (``ClassMeans``), and old exemplars stay.

    Images are seen by the test transform. Photos keep their own resolution, and the gradient goes
    through the resizing; what the transform cuts off at their edges stays as it is. Their pixels
    are float32 while they train, which with the optimiser's momenta takes 12 to 16 times their
    bytes.

    Example:
        >>> Mnemonics.Config().form, Mnemonics.PRESETS["released"].recipe.lr
        ('bilevel', 1e-05)
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of mnemonics training.

        The default has the paper's equations with rates of our own, since its code for them was
        not released: gradients are small and of very different sizes from task to task, and Adam
        moves every pixel by a level or two in one pass over the task's images whatever they are.
        ``Mnemonics.PRESETS["released"]`` is the released code: its form, and its recipe of one
        epoch of SGD at 1e-5 with momentum 0.9 and weight decay 5e-4, by which pixels move so
        little that rounding undoes nearly all of it. (That code rounds down, which darkens all
        images by half a level; here they are rounded to the nearest.)

        Args:
            form: ``bilevel`` (paper) or ``released``.
            recipe: Of the new exemplars; an epoch is a pass over the task's images. Its learning
                rate is beta, in units of normalised pixels.
            adjust_old: Whether the bilevel form adjusts old exemplars too.
            adjustment: Recipe of that; its batches are of each half, an epoch is a pass over one.
            inner_steps: Training steps on the exemplars.
            inner_lr: Their learning rate, alpha; the exemplars become good for steps of this size.
            inner_batch: How many of the new exemplars they are taken on, at most.
        """

        form: Literal["bilevel", "released"] = "bilevel"
        recipe: Recipe = _BILEVEL
        adjust_old: bool = True
        adjustment: Recipe = _BILEVEL
        inner_steps: int = 1
        inner_lr: float = 0.1
        inner_batch: int = 128

        def __post_init__(self) -> None:
            check_choices(self)
            check_positive("inner_lr", self.inner_lr)
            for name in ("inner_steps", "inner_batch"):
                if getattr(self, name) < 1:
                    raise FastcilError(
                        f"{name} is {getattr(self, name)}; it must be a whole number from 1 on."
                    )

    PRESETS: ClassVar[dict[str, Config]] = {
        "released": Config(form="released", recipe=_RELEASED),
    }

    config: Config
    means: Tensor  # [C, D]
    moved: Tensor  # [T, 3]

    def __init__(self, config: Any, context: Context, method: Method) -> None:
        super().__init__(config, context, method)
        self.pixels = nn.ParameterDict()
        self.register_buffer("means", torch.empty(0, 0))
        self.register_buffer("moved", torch.empty(0, 3, dtype=torch.float64))
        self._pictures: Record | None = None

    def check(self, method: Method) -> None:
        """Raises `CompositionError` unless memory chooses exemplars that may change."""
        name = type(method).__name__
        if method.keeps != "exemplars":
            raise CompositionError(
                f"addon 'mnemonics' trains the pixels of exemplars, and {name} keeps "
                f"{method.keeps}; compose it with a method that keeps exemplars, as 'icarl' does."
            )
        if method.selection == "own":
            raise CompositionError(
                f"addon 'mnemonics' changes the images that memory chose, and {name} chooses its "
                f"own, with outputs beside them that belong to the images as they were; compose "
                f"it with a method whose exemplars are herded, as those of 'icarl' are."
            )
        network = getattr(method, "network", None)
        if network is not None and not hasattr(network, "trained_parameters"):
            raise CompositionError(
                f"addon 'mnemonics' steps what the network trains, and the "
                f"{type(network).__name__} of {name} doesn't say what; build it as a "
                f"fastcil.nn.Network."
            )

    def begin_task(self, task: Task) -> None:
        """Makes sure that the network is one it can work with."""
        self.check(self.method)

    def refinements(self, task: Task) -> list[Stage]:
        """Stages on the new exemplars and, in the bilevel form, on the old ones."""
        new, old = _split(task)
        stages: list[Stage] = []
        if len(new):
            released = self.config.form == "released"
            stages.append((self._means_stage if released else self._new_stage)(task, new, old))
        halves = _halves(task.exemplars.labels.cpu()[old])
        adjusts = self.config.form == "bilevel" and self.config.adjust_old
        if adjusts and all(len(half) for half in halves):
            stages.append(self._old_stage(task, old, halves))
        return stages

    def _new_stage(self, task: Task, new: Tensor, old: Tensor) -> Stage:
        """The task's exemplars, through steps on them."""
        recipe = self.config.recipe
        return NewExemplars(
            **self._common("new", task, new),
            streams=(
                Stream((task.examples,), recipe.batch_size),
                _exemplar_stream(task, new, self.config.inner_batch),
            ),
            recipe=recipe,
            inner_lr=self.config.inner_lr,
            inner_steps=self.config.inner_steps,
        )

    def _old_stage(self, task: Task, old: Tensor, halves: tuple[Tensor, Tensor]) -> Stage:
        """Earlier exemplars, each half by the other."""
        recipe = self.config.adjustment
        first, second = halves
        return OldExemplars(
            **self._common("old", task, old),
            streams=(
                _exemplar_stream(task, old[first], recipe.batch_size),
                _exemplar_stream(task, old[second], recipe.batch_size),
            ),
            recipe=recipe,
            inner_lr=self.config.inner_lr,
            inner_steps=self.config.inner_steps,
            halves=halves,
        )

    def _means_stage(self, task: Task, new: Tensor, old: Tensor) -> Stage:
        """The task's exemplars, by the means of their features."""
        recipe = self.config.recipe
        common = self._common("new", task, new)
        start: Callable[[], None] = common["begin"]

        def begin() -> None:
            start()
            self.means = self._mean_features(task.exemplars.select(old), task.total)

        seen = torch.cat([torch.arange(len(task.examples)), len(task.examples) + old])
        return ClassMeans(
            **{**common, "begin": begin},
            streams=(Stream((task.examples, task.exemplars), recipe.batch_size, subset=seen),),
            recipe=recipe,
            labels=task.exemplars.labels.cpu()[new],
            means=lambda: self.means,
        )

    def _common(self, group: str, task: Task, index: Tensor) -> dict[str, Any]:
        """What the stages have in common: the pixels of one group of exemplars."""
        free = self._free(task, index)

        def begin() -> None:
            device = next(self.method.network.parameters()).device
            self.pixels[group] = nn.Parameter(free.start().to(device))

        return {
            "name": f"mnemonics, {group}",
            "method": self.method,
            "free": free,
            "values": lambda: self.pixels[group],
            "begin": begin,
        }

    def _free(self, task: Task, index: Tensor) -> FreeImages:
        return FreeImages(task.exemplars.select(index).images, self.context.augmentation)

    def _mean_features(self, examples: Examples, classes: int) -> Tensor:
        """Mean of each class's features, zero where there is no image, [C, D]."""
        with evaluating(self.method):
            features = self.context.scan(self.method.embed, examples)
        return mean_features(features, examples.labels, classes)

    def refined(self, task: Task) -> tuple[Tensor, ImageStore] | None:
        """The exemplars as they have become; their pixels are let go."""
        groups = dict(zip(("new", "old"), _split(task), strict=True))
        trained = [group for group in groups if group in self.pixels]
        if not trained:
            return None
        moved, parts = {"new": 0.0, "old": 0.0}, []
        for group in trained:
            free = self._free(task, groups[group])
            parts.append(free.store(self.pixels[group]))
            moved[group] = _distance(free.images, parts[-1])
        index, images = torch.cat([groups[group] for group in trained]), ImageStore.cat(parts)
        row = self.moved.new_tensor([[task.index, moved["new"], moved["old"]]])
        self.moved = torch.cat([self.moved, row])
        title = f"Mnemonics of {task.name or f'task {task.index + 1}'}"
        self._pictures = compare_pictures(title, task.exemplars.select(index), images, _SHOWN)
        self.pixels, self.means = nn.ParameterDict(), self.means.new_empty(0, 0)
        return index, images

    def structure(self) -> dict[str, Any]:
        """How many values are being trained, by group."""
        return {"pixels": {group: len(values) for group, values in self.pixels.items()}}

    def restore(self, structure: Mapping[str, Any]) -> None:
        """Makes as many values, to be loaded."""
        self.pixels = nn.ParameterDict(
            {group: nn.Parameter(torch.empty(n)) for group, n in structure["pixels"].items()}
        )

    def records(self) -> list[Record]:
        """Exemplars before and after the last task, and by how much those of each task moved."""
        if not len(self.moved):
            return []
        tasks, new, old = self.moved.cpu().unbind(1)
        curve = Record(
            "curve",
            "Mean change of an exemplar's pixels by mnemonics training",
            {
                "x": tasks.long().tolist(),
                "y": {"new exemplars": new.tolist(), "old exemplars": old.tolist()},
                "xlabel": "task",
                "ylabel": "levels of 255",
            },
        )
        return [curve] if self._pictures is None else [self._pictures, curve]


def _split(task: Task) -> tuple[Tensor, Tensor]:
    """Positions of the exemplars of the task's own classes, and of all others, int64."""
    labels = task.exemplars.labels.cpu()
    own = torch.isin(labels, torch.tensor(task.classes, dtype=torch.int64))
    return own.nonzero().flatten(), (~own).nonzero().flatten()


def _halves(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of every second image of each class, and of the others, int64."""
    odd = rank_in_class(labels) % 2 == 1
    return (~odd).nonzero().flatten(), odd.nonzero().flatten()


def _exemplar_stream(task: Task, index: Tensor, size: int) -> Stream:
    """A stream of some of the exemplars."""
    return Stream((task.examples, task.exemplars), size, subset=len(task.examples) + index)


def _distance(before: ImageStore, after: ImageStore) -> float:
    """Mean absolute difference of two stores' pixels, in levels."""
    return float((after.pixels.float() - before.pixels.float()).abs().mean())
