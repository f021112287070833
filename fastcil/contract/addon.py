"""The face of what composes with a method by ``+``."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastcil.contract.context import Context
from fastcil.contract.method import Method
from fastcil.contract.persistent import Persistent
from fastcil.contract.record import Record
from fastcil.contract.retained import Retained
from fastcil.contract.stage import Stage
from fastcil.contract.task import Task
from fastcil.data import Examples


class Addon(Persistent):
    """What changes a method's network, stages, data or codec through its public capabilities.

    An addon never asks which method it has; what it needs it takes from the `Method` interface,
    and ``check`` refuses a method that lacks it.

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

    def codec_options(self) -> dict[str, Any]:
        """Settings of the codec it brings."""
        return {}

    def begin_task(self, task: Task) -> None:
        """Called after the method's ``begin_task``."""

    def stages(self, task: Task, stages: list[Stage]) -> list[Stage]:
        """The method's stages, changed or extended."""
        return stages

    def boxes(self, examples: Examples) -> Tensor | None:
        """The box of each image for a codec that wants them, int16 [N, 4], or None."""
        return None

    def end_task(self, task: Task) -> None:
        """Called after memory's update and the method's ``end_task``."""

    def retained(self) -> list[Retained]:
        """What the addon keeps for old tasks."""
        return []

    def records(self) -> list[Record]:
        """What to show in the report."""
        return []
