"""Exemplars compressed around the box of their class activation map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastcil.addons.compression import (
    BoxConfig,
    Compression,
    check_exemplars,
    check_network,
    check_sizes,
)
from fastcil.addons.regions import Regions
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

    Without a network asked, or otherwise changed, it is a line of Table 3 (`BoxConfig` and
    `fastcil.addons.regions.Regions` say how):

    ======================= =======================================================
    row                     options
    ======================= =======================================================
    1 baseline              the method without addon
    2 artifact aug.         ``store=False``
    3 full compression      ``boxes="none"``, 1/4 of the pixels
    4 random activation     ``boxes="random"``
    5 centre activation     ``boxes="centre"``, 7/16 of the pixels
    6 class activation      as it is
    7 phase-wise threshold  ``threshold="held-out"``
    ======================= =======================================================

    Rows 8 to 11 are `fastcil.addons.cim.CIM`'s.

    Example:
        >>> CAM.Config(threshold=0.5).ratio
        4.0
    """

    @dataclass(frozen=True)
    class Config(BoxConfig):
        """Settings of CAM-based compression; see `BoxConfig` for the others.

        Args:
            boxes: What stays sharp: the box of the activation map (``cam``), the ``centre``, a
                ``random`` part, or nothing (``none``).
        """

        boxes: Literal["cam", "centre", "random", "none"] = "cam"

    config: Config
    brings_codec: ClassVar[str | None] = "bbox"

    def __init__(self, config: Any, context: Context, method: Method) -> None:
        super().__init__(config, context, method)
        self.compression = Compression(config)
        self.regions = Regions(config, config.boxes)

    def check(self, method: Method) -> None:
        """Raises `CompositionError` if there are no exemplars, or no activation maps."""
        check_exemplars("cam", method)
        regions = Regions(self.config, self.config.boxes)
        regions.check("cam", method)
        check_sizes("cam", self.config, self.context)
        check_network("cam", method, ("maps", "cam_weights") if regions.asks else ())

    def codec_options(self) -> dict[str, Any]:
        """The downsampling ratios."""
        return self.config.codec_options()

    def begin_task(self, task: Task) -> None:
        """Starts the task without boxes."""
        self.check(self.method)
        self.regions.begin_task()
        self.compression.begin_task(task)

    def stages(self, task: Task, stages: list[Stage]) -> list[Stage]:
        """The method's stages, shown new images compressed at times."""
        self.regions.hold_out(task, stages)
        self.compression.simulate(task, stages, self._locate)
        return stages

    def marks(self, examples: Examples) -> Tensor:
        """The box of each image, int16 [N, 4]."""
        return self.compression.offer(examples, self._locate)

    def end_task(self, task: Task) -> None:
        """Lets go of what only training needed."""
        self.compression.end_task()

    def _locate(self, examples: Examples) -> Tensor:
        """Boxes by the network as it is, if they depend on it."""
        return self.regions.locate(examples, self._activated, self.method, self.context)

    def _activated(self, examples: Examples, threshold: float) -> Tensor:
        """The boxes of the network's activation maps."""
        network = self.method.localiser()
        with evaluating(network):
            return class_boxes(self.context, examples, network.maps, network.cam_weights, threshold)

    def records(self) -> list[Record]:
        """How large the boxes are, and where they were cut."""
        return [self.compression.record(), *self.regions.records()]
