"""The face of a learner."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastcil.contract.context import Context
from fastcil.contract.persistent import Persistent
from fastcil.contract.record import Record
from fastcil.contract.retained import Retained
from fastcil.contract.stage import Stage
from fastcil.contract.task import Task
from fastcil.nn import Network


class Method(Persistent):
    """A learner: a network, its losses, and what happens before and after a task.

    The engine calls, for each task: ``begin_task``; the stages that ``stages`` describes; the
    memory's update, with features from ``embed``, and what addons then make of the exemplars;
    ``end_task``, whose task carries them; the evaluation of every readout; ``release``.

    A method with ``selection = "own"`` chooses its exemplars itself, while it trains: it is told
    in ``task.room`` how many there will be room for, and answers ``chosen``. One whose tasks bring
    extractors of their own says so by ``adds_extractors``: their batch norms must train.
    ``published_network`` says what a Config is published with of ``network.last_relu`` and
    ``network.zero_init_residual``, where these are left open. ``likelihood`` tells by which loss
    its primary stages learn: softmax cross-entropy is ``categorical``, squared error ``gaussian``.

    Args:
        config: The method's frozen Config.
        context: Services of the engine.
    """

    Config: ClassVar[type]
    keeps: ClassVar[Literal["exemplars", "everything", "nothing"]] = "exemplars"
    selection: ClassVar[Literal["herding", "random", "own"]] = "herding"
    auto_augment: ClassVar[bool] = False
    adds_extractors: ClassVar[bool] = False
    likelihood: Literal["categorical", "gaussian"] = "categorical"
    network: Network

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__()
        self.config = config
        self.context = context

    @classmethod
    def published_network(cls, config: Any) -> dict[str, bool]:
        """``last_relu`` and ``zero_init_residual`` as a Config is published; {} for the usual."""
        return {}

    @abstractmethod
    def begin_task(self, task: Task) -> None:
        """Makes room for the task's classes."""

    @abstractmethod
    def stages(self, task: Task) -> list[Stage]:
        """Describes the training of this task; changes nothing."""

    def end_task(self, task: Task) -> None:
        """What remains to do once memory is updated; ``task.exemplars`` are the new ones."""

    def release(self) -> None:
        """Drops what only this task's evaluation needed."""

    def logits(self, images: Tensor) -> Tensor:
        """Scores of all known classes, [B, K]."""
        scores: Tensor = self.network(images)
        return scores

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the first readout, as `Learner.predict` has them: what is exported."""
        return next(iter(self.readouts().values()))(images)

    def embed(self, images: Tensor) -> Tensor:
        """Features [B, D] by which exemplars are selected."""
        return self.network.features(images)

    def beside(self, classes: int) -> int:
        """Bytes kept beside each exemplar once ``classes`` are known; they take their room."""
        return 0

    def chosen(self) -> Tensor:
        """For ``selection = "own"``: what memory is to keep, asked when the stages are done.

        Returns:
            int64 [n], positions in the task's examples followed by its exemplars, the most wanted
            first; one may occur several times. Memory keeps as many from the front as fit, in
            this order.
        """
        raise NotImplementedError(f"{type(self).__name__} has selection 'own' but no chosen().")

    def localiser(self) -> Network:
        """The network whose class activation maps show where an object is."""
        return self.network

    def readouts(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Named ways to classify, images -> scores [B, K]; the first is the method's own."""
        return {"linear": self.logits}

    def retained(self) -> list[Retained]:
        """What the method keeps for old tasks beside exemplars: networks, logits, curvature."""
        return []

    def records(self) -> list[Record]:
        """What to show in the report."""
        return []
