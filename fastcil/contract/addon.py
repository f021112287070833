"""The face of what composes with a method by ``+``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from fastcil.contract.context import Context
from fastcil.contract.method import Method
from fastcil.contract.persistent import Persistent
from fastcil.contract.record import Record
from fastcil.contract.retained import Retained
from fastcil.contract.stage import Stage
from fastcil.contract.task import Task
from fastcil.data import Examples, ImageStore
from fastcil.errors import CompositionError

Fitting = Callable[[Tensor, Tensor], int]
"""(costs in the papers' images [N], bytes [N]) of exemplars of one class, the most wanted first ->
how many of them from the front the budget lets the class keep once the task is learned."""


class Addon(Persistent):
    """What changes a method's network, stages, data or codec through its public capabilities.

    An addon never asks which method it has; what it needs it takes from the `Method` interface,
    and ``check`` refuses a method that lacks it.

    The engine calls, for each task, after the method's own: ``begin_task``; ``stages``;
    ``prepare_memory`` and ``marks``, for the memory's update; ``refinements``, the stages that
    work on the exemplars chosen, and when they are done ``refined``, by which memory takes what
    became of them; ``end_task``. What trains in a refinement is state of the addon: a run that
    stops in the middle of one goes on with the memory it had then, and without the stages before.

    Args:
        config: The addon's frozen Config.
        context: Services of the engine.
        method: The method it was added to.
    """

    Config: ClassVar[type]
    brings_codec: ClassVar[str | None] = None

    def __init__(self, config: Any, context: Context, method: Method) -> None:
        super().__init__()
        self.config = config
        self.context = context
        # A tuple hides the method from nn.Module, which would save its weights twice.
        self._method = (method,)
        self.check(method)

    @property
    def method(self) -> Method:
        """The method it was added to."""
        return self._method[0]

    def check(self, method: Method) -> None:
        """Raises `CompositionError`, with the reason, if it can't work with ``method``."""

    def primary(self, name: str, stages: list[Stage]) -> list[Stage]:
        """Those of a method's stages that learn the new data.

        Args:
            name: The addon's own, for the sentence.
            stages: All of them.

        Raises:
            CompositionError: There is none.
        """
        found = [stage for stage in stages if stage.primary]
        if not found:
            raise CompositionError(
                f"addon '{name}' accompanies the stage that learns the new data, and "
                f"{type(self.method).__name__} marks none of its stages with primary=True."
            )
        return found

    def codec_options(self) -> dict[str, Any]:
        """Settings of the codec it brings; asked anew after each ``prepare_memory``."""
        return {}

    def begin_task(self, task: Task) -> None:
        """Called after the method's ``begin_task``."""

    def stages(self, task: Task, stages: list[Stage]) -> list[Stage]:
        """The method's stages, changed or extended."""
        return stages

    def marks(self, examples: Examples) -> Tensor | None:
        """What matters in each image, in the form its codec asks for (`Codec.marks`), or None."""
        return None

    def refinements(self, task: Task) -> list[Stage]:
        """Describes training that follows the memory's update; changes nothing.

        The method is then as its stages left it; its ``end_task`` comes afterwards. As with
        `Method.stages`, a run that resumes in the middle of one of them asks again and must hear
        of the same stages; work that changes something belongs in their ``begin``.

        Args:
            task: The task, its ``exemplars`` those that memory holds now, of its own classes too.
        """
        return []

    def refined(self, task: Task) -> tuple[Tensor, ImageStore] | None:
        """What the refinements made of exemplars, asked when all of them are done.

        Args:
            task: As in ``refinements``.

        Returns:
            Positions in ``task.exemplars``, int64 [M], and the raw images, of the same sizes, that
            memory encodes and keeps in their place; None to leave memory as it is.
        """
        return None

    def prepare_memory(self, task: Task, fitting: Fitting) -> None:
        """Called when the stages are done, right before memory's update.

        It is the time to look at what is about to be kept, the method being in evaluation mode.
        ``codec_options`` are asked again afterwards: a codec may change its settings with every
        task, as long as it reads what it has encoded before.

        Args:
            task: The task.
            fitting: How many exemplars a class may keep; see `Fitting`.
        """

    def end_task(self, task: Task) -> None:
        """Called after memory's update and the method's ``end_task``."""

    def retained(self) -> list[Retained]:
        """What the addon keeps for old tasks."""
        return []

    def records(self) -> list[Record]:
        """What to show in the report."""
        return []
