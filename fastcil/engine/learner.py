"""What a user keeps: a method, its memory and the names of the classes it knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcil.contract import Method, Task, evaluating
from fastcil.data import Examples, ImageStore, load_examples
from fastcil.engine.events import Listener
from fastcil.engine.export import export_method
from fastcil.engine.lesson import FirstTask, Lesson
from fastcil.engine.options import Settings, make_settings
from fastcil.engine.parts import Parts
from fastcil.engine.placement import place_parts
from fastcil.engine.progress import make_progress
from fastcil.engine.resolve import as_images, check_crop, natural_look, pick_device
from fastcil.engine.state import load_state, save_state
from fastcil.engine.trainer import Trainer
from fastcil.errors import FastcilError
from fastcil.memory import Budget, Memory

FORMAT = 1


@dataclass(frozen=True)
class Prediction:
    """What a Learner says of some images.

    Args:
        names: Class name of each image.
        scores: Softmax of the method's own readout, float32 [B, K]; for readouts that are not
            logits (nearest means) it is a monotone score, not a probability.
    """

    names: tuple[str, ...]
    scores: Tensor  # [B, K]


class Learner:
    """Learns new classes as they come and keeps what it may of the old ones.

    Args:
        method: The composition, as in ``foster+cim``.
        memory: Budget: ``"64MiB"``, ``"2000 images"``, ``"20 images/class"`` or a `Budget`.
        codec: How exemplars are stored, if no addon says; default ``raw``. What can be set of it
            are options under its name, such as ``jpeg.quality``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        seed: Seed of weights, shuffles and augmentation.
        backbone: Builds a feature extractor of the user's own (see `fastcil.nn.Network`).
        settings: Ready settings, instead of ``method``, ``codec`` and ``options``.
        **options: Dotted option names -> values, as on the command line.

    Raises:
        FastcilError: An unknown name, or parts that do not fit together.

    Example:
        >>> import numpy as np
        >>> shelf = {"apple": np.zeros((8, 16, 16, 3), np.uint8),
        ...          "pear": np.full((8, 16, 16, 3), 200, np.uint8)}
        >>> learner = Learner("finetune", memory="none", **{
        ...     "engine.epoch_scale": 0.01, "network.width": 4, "engine.progress": False})
        >>> learner.learn(shelf).class_names
        ('apple', 'pear')
        >>> len(learner.predict(shelf["apple"]).names)
        8
    """

    def __init__(
        self,
        method: str = "foster+cim",
        memory: str | Budget = "64MiB",
        *,
        codec: str | None = None,
        device: str = "auto",
        seed: int = 0,
        backbone: Callable[[], torch.nn.Module] | None = None,
        settings: Settings | None = None,
        **options: Any,
    ) -> None:
        self.settings = settings or make_settings(method, options, codec)
        self.budget = memory if isinstance(memory, Budget) else Budget.parse(memory)
        self.device = pick_device(device)
        if seed < 0:
            raise FastcilError(f"seed is {seed}; it must be a whole number from 0 on.")
        self.seed = seed
        self.class_names: tuple[str, ...] = ()
        self.tasks: list[int] = []
        self._backbone = backbone
        self._parts: Parts | None = None

    @property
    def parts(self) -> Parts:
        """Method, addons, memory and how they see images.

        Raises:
            FastcilError: Nothing was learned yet.
        """
        if self._parts is None:
            raise FastcilError("the Learner knows no class yet; call learn(data) first.")
        return self._parts

    @property
    def method(self) -> Method:
        """The method, networks included."""
        return self.parts.method

    @property
    def memory(self) -> Memory:
        """What is kept of the classes learned."""
        return self.parts.memory

    def learn(
        self, data: Any, *, names: Sequence[str] | None = None, few_shot: bool = False
    ) -> Learner:
        """Adds the classes of ``data``; if that fails, the learner is as it was before.

        Images stay where ``engine.data`` says, and exemplars with them.

        Args:
            data: A folder or ``.tar`` of ``<class>/...`` images, a dict from class name to
                images, arrays ``(x, y)``, or anything else `fastcil.data.load_examples` reads.
            names: Class names for arrays, one for each label that occurs, in ascending order.
            few_shot: Whether these are a few images of each class, of which one is held out to
                choose the epoch on, unless ``engine.epoch_choice`` is ``last``. Old classes are
                judged by their exemplars, which are trained on; without any, not at all.

        Returns:
            The learner itself.

        Raises:
            FastcilError: Data that can't be used, or have no room where ``engine.data`` wants them;
                a class that is known already; ``few_shot`` where ``engine.epoch_choice`` is
                ``paper``, which wants test images.
        """
        engine = self.settings.engine
        examples, found = load_examples(data, skip_bad=self.settings.groups["load"].skip_bad)
        if names is not None:
            if len(names) != len(found) or len(set(names)) != len(names):
                raise FastcilError(
                    f"names is {tuple(names)} for data with {len(found)} classes; "
                    f"give each class a name of its own."
                )
            found = tuple(names)
        name = f"task {len(self.tasks) + 1}"
        (examples,) = place_parts([examples], engine, self.device, name)
        task = replace(self.next_task(examples, found), few_shot=few_shot)
        tell = make_progress(engine.progress)
        tell("run", {"method": self.settings.method, "tasks": 1})
        tell("task", {"task": task.index, "tasks": task.index + 1})
        before = self.parts.snapshot() if self.class_names else None
        try:
            self.learn_task(task, found, tell)
            self.method.release()
            self.memory.release()
        except BaseException:
            self._go_back(task.index, before)
            raise
        finally:
            tell("finished", {})
        return self

    def _go_back(self, tasks: int, before: dict[str, Any] | None) -> None:
        """Undoes what was begun: a network with room for half-learned classes fits nothing."""
        del self.tasks[tasks:]
        self.class_names = self.class_names[: sum(self.tasks)]
        if before is None:
            self._parts = None
        else:
            self.parts.restore(before)

    def next_task(self, examples: Examples, names: Sequence[str]) -> Task:
        """The task that brings classes not known yet, with labels moved behind the known ones."""
        again = sorted(set(names) & set(self.class_names))
        if again:
            raise FastcilError(
                f"data brings the class '{again[0]}', which is known already; "
                f"pass new classes only."
            )
        known = len(self.class_names)
        self.prepare(examples.images)
        return Task(
            index=len(self.tasks),
            classes=tuple(range(known, known + len(names))),
            known=known,
            examples=Examples(examples.images, examples.labels + known),
            exemplars=self.memory.examples(),
            name=f"task {len(self.tasks) + 1}",
        )

    def learn_task(
        self,
        task: Task,
        names: Sequence[str],
        tell: Listener,
        save: Callable[[Trainer], None] | None = None,
        resume: dict[str, Any] | None = None,
        begun: Callable[[Task], None] | None = None,
        judges: Examples | None = None,
        first: FirstTask | None = None,
    ) -> Lesson:
        """Trains on one task and updates memory; evaluation and `Method.release` are left.

        Args:
            task: From `next_task`.
            names: Names of the task's new classes.
            tell: Hears the trainer's events.
            save: Called between steps; see `Trainer`.
            resume: A trainer's state to go on from, this learner having been restored to the
                same moment; None to begin.
            begun: Called before the task is trained; see `Lesson`.
            judges: Images to choose the epochs of a few-shot session on; see `Lesson`.
            first: Called instead of training the first task; see `Lesson`.

        Returns:
            The lesson, which knows how epochs were chosen.
        """
        threads = self.settings.engine.threads
        if threads is not None:
            torch.set_num_threads(threads)
        lesson = Lesson(self.parts, self.settings, self.seed, tell, save, begun, judges, first)
        lesson.run(task, resume)
        self.class_names += tuple(names)
        self.tasks.append(len(names))
        return lesson

    def nbytes(self) -> dict[str, int]:
        """Bytes held for old tasks, by entry; those the budget counts are under ``budgeted``.

        Where a codec's exemplars are decoded to be read, ``working_bytes`` is what that takes. It
        is no part of what is held: it can be made anew at any time.
        """
        entries = [self.memory.retained(), *self.parts.others()]
        held = {entry.name: entry.nbytes for entry in entries}
        budgeted = sum(e.nbytes for e in entries if self.budget.counts(e.kind))
        working = self.memory.working_nbytes
        if working:
            held["working_bytes"] = working
        return {
            **held,
            "budgeted": budgeted,
            "all": sum(e.nbytes for e in entries if e.kind != "analysis"),
        }

    def predict(self, images: Any) -> Prediction:
        """Names the class of each image.

        Args:
            images: uint8 [H, W, 3], [B, H, W, 3], a sequence of such arrays, or an ImageStore.

        Raises:
            FastcilError: Nothing was learned yet, or images of another form.
        """
        readout = next(iter(self.method.readouts().values()))
        store = as_images(images)
        examples = Examples(store, torch.zeros(len(store), dtype=torch.int64))
        with evaluating(self.method):
            scores = self.parts.context.scan(readout, examples).float()
        best = scores.argmax(1).tolist()
        return Prediction(tuple(self.class_names[k] for k in best), scores.softmax(1).cpu())

    def export(self, path: str | os.PathLike[str], format: str = "onnx") -> Path:
        """Writes the network that `Method.forward` computes, for use without fastcil.

        Args:
            path: Where to.
            format: ``onnx`` or ``torch`` (a `torch.export` program, ``.pt2``).

        Returns:
            The path. Input ``images``: float32 [B, 3, s, s], normalised; output ``logits``
            [B, K].
        """
        return export_method(self.method, self.parts.augmentation, Path(path), format)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves everything, memory included, in one safetensors file, atomically."""
        save_state(path, self.state())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        backbone: Callable[[], torch.nn.Module] | None = None,
    ) -> Learner:
        """Loads what `save` wrote; nothing in the file is executed.

        Args:
            path: The file.
            device: Where to put it.
            backbone: The user's own backbone, if one was used. A method of the user's own must
                have been registered (`fastcil.register`).

        Raises:
            FastcilError: The file is absent, damaged, or of another kind.
        """
        return cls.from_state(load_state(path), device=device, backbone=backbone)

    def state(self) -> dict[str, Any]:
        """Everything that `from_state` needs, as nested plain data and tensors."""
        return {
            "format": FORMAT,
            "settings": self.settings.as_dict(),
            "budget": str(self.budget),
            "seed": self.seed,
            "class_names": list(self.class_names),
            "tasks": list(self.tasks),
            "own_backbone": self._backbone is not None,
            "parts": None if self._parts is None else self._parts.state(),
        }

    @classmethod
    def from_state(
        cls,
        state: dict[str, Any],
        *,
        device: str = "auto",
        backbone: Callable[[], torch.nn.Module] | None = None,
    ) -> Learner:
        """The learner that `state` describes."""
        if state.get("format") != FORMAT or "settings" not in state:
            raise FastcilError(
                f"the file holds no Learner of format {FORMAT}; load it with the version that "
                f"saved it."
            )
        if state["own_backbone"] and backbone is None:
            raise FastcilError(
                "backbone is None, but the Learner was saved with one of your own; pass it again."
            )
        plain = dict(state["settings"])
        settings = make_settings(plain.pop("method"), codec=plain.pop("codec"), options=plain)
        learner = cls(
            memory=Budget.parse(state["budget"]),
            device=device,
            seed=state["seed"],
            backbone=backbone,
            settings=settings,
        )
        learner.class_names = tuple(state["class_names"])
        learner.tasks = list(state["tasks"])
        parts = state["parts"]
        if parts is not None:
            learner._parts = learner._make(parts["size"], parts["crop"])
            learner.parts.restore(parts)
        return learner

    def checkpoint(self, trainer: Trainer) -> dict[str, Any]:
        """What resuming in the middle of a task needs, the learner's own state included."""
        return {"learner": self.state(), **Lesson.progress(trainer)}

    def prepare(self, images: ImageStore) -> None:
        """Makes method, addons and memory for images of this kind, the first time it is asked.

        Raises:
            FastcilError: Parts that don't fit together, or images that are cut in another way than
                those seen before.
        """
        if self._parts is None:
            parts = self._make(*natural_look(images, self.settings.groups["augment"]))
            parts.check(images)
            self._parts = parts
        # A batch is read from stores on one device: exemplars are where the new images are.
        if self.memory.device != images.device:
            self.memory.to(images.device)
        augmentation = self.parts.augmentation
        check_crop(images, augmentation.size, augmentation.crop)

    def _make(self, size: int, crop: str) -> Parts:
        return Parts.build(self.settings, self.budget, self.device, size, crop, self._backbone)
