"""Exemplars compressed around the box of their class activation map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastcil.addons.compression import (
    BoxConfig,
    Compression,
    check_exemplars,
    check_network,
)
from fastcil.contract import Addon, Context, Method, Record, Stage, Task, evaluating
from fastcil.data import Examples
from fastcil.memory.boxes import class_boxes


class CAM(Addon):
    """CAM-based compression, the baseline of Luo et al. 2023 (Sec. 4.1; Table 3, row 6).

    An exemplar is kept sharp inside a box and at 1/eta of its pixels outside,
    ``M * x + (1 - M) * x_eta`` (Eq. 3), so that a budget holds more of them. The box is the tight
    one around what the class activation map of the method's own network shows above tau (Eqs. 1,
    2). While a task is learned, a growing part of its new images is shown compressed in the same
    way, at boxes that follow the network, for it to bear the artifacts; exemplars are compressed
    already.

    Example:
        >>> CAM.Config(threshold=0.5).ratio
        4.0
    """

    @dataclass(frozen=True)
    class Config(BoxConfig):
        """Settings of CAM-based compression; see `BoxConfig`."""

    config: Config
    brings_codec: ClassVar[str | None] = "bbox"

    def __init__(self, config: Any, context: Context, method: Method) -> None:
        super().__init__(config, context, method)
        self.compression = Compression(config)

    def check(self, method: Method) -> None:
        """Raises `CompositionError` if there are no exemplars, or no activation maps."""
        check_exemplars("cam", method)
        check_network("cam", method, ("maps", "cam_weights"))

    def codec_options(self) -> dict[str, Any]:
        """The downsampling ratio."""
        return {"ratio": self.config.ratio}

    def begin_task(self, task: Task) -> None:
        """Starts the task without boxes."""
        self.check(self.method)
        self.compression.begin_task(task)

    def stages(self, task: Task, stages: list[Stage]) -> list[Stage]:
        """The method's stages, shown new images compressed at times."""
        self.compression.simulate(task, stages, self._locate)
        return stages

    def boxes(self, examples: Examples) -> Tensor:
        """The box of each image, int16 [N, 4]."""
        boxes = self._locate(examples)
        self.compression.count(boxes, examples)
        return boxes

    def end_task(self, task: Task) -> None:
        """Lets go of what only training needed."""
        self.compression.end_task()

    def _locate(self, examples: Examples) -> Tensor:
        """Boxes by the network as it is."""
        network = self.method.localiser()
        with evaluating(network):
            return class_boxes(
                self.context,
                examples,
                network.maps,
                network.cam_weights,
                self.config.threshold,
            )

    def records(self) -> list[Record]:
        """How large the boxes are."""
        return [self.compression.record()]
