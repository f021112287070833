"""What addons that compress images around a box share: simulating it, and measuring it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fastcil.contract import (
    Context,
    Method,
    Record,
    Stage,
    Stream,
    Task,
    Views,
    check_choices,
    check_not_negative,
)
from fastcil.data import Examples
from fastcil.errors import CompositionError, FastcilError
from fastcil.memory.boxes import box_shares, whole_boxes

Locator = Callable[[Examples], Tensor]
"""Examples -> boxes int16 [N, 4], by the network as it is now."""


@dataclass(frozen=True)
class BoxConfig:
    """Settings of compression around a box; the defaults are those of Luo et al. 2023.

    Args:
        threshold: tau: what the activation map shows above it is inside the box. ``held-out``
            chooses it in each task from ``thresholds``, on a tenth of the new images that is kept
            from training (Table 3, row 7; see `fastcil.addons.regions.Regions`).
        thresholds: What ``held-out`` chooses from.
        tolerance: By how much of 1 the share of images recognised may fall in that choice.
        ratio: eta: pixels outside the box are kept at 1/eta of their number.
        foreground_ratio: eta': pixels inside it are kept at 1/eta' of theirs, 2 in Table 3,
            row 11, and else 1. What views show compressed while training stays sharp inside.
        store: Whether exemplars are compressed; if not, they are kept whole at the price of raw
            ones, and new images are only shown compressed (Table 3, row 2).
        artifact: Whether new images are sometimes shown compressed while training, so that the
            network learns to bear the artifacts (Luo et al. 2023, Sec. 4.1 and supplement 1).
        refresh: Epochs between new boxes, each of which raises the chance of being shown
            compressed.
        artifact_step: By how much it raises it, from 0.
        artifact_max: The highest chance; 0.4 is where 200 epochs lead.
        compression_stage: Whether stages that see the new data without being the one that learns
            it (FOSTER's compression, DER's classifier) go on at the last chance, as in the
            released code (0.4). The paper doesn't say.
    """

    threshold: float | Literal["held-out"] = 0.6
    thresholds: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8)
    tolerance: float = 0.01
    ratio: float = 4.0
    foreground_ratio: float = 1.0
    store: bool = True
    artifact: bool = True
    refresh: int = field(default=40, metadata={"epochs": True})
    artifact_step: float = 0.1
    artifact_max: float = 0.4
    compression_stage: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        if self.threshold != "held-out" and not _is_threshold(self.threshold):
            raise FastcilError(
                f"threshold is {self.threshold}; it must lie from 0 to below 1 (0.6 in the "
                f"paper), or be 'held-out'."
            )
        if not self.thresholds or not all(map(_is_threshold, self.thresholds)):
            raise FastcilError(
                f"thresholds is {self.thresholds}; give one or more from 0 to below 1."
            )
        if not (self.ratio >= 1 and math.isfinite(self.ratio)):
            raise FastcilError(f"ratio is {self.ratio}; it must be a number of at least 1.")
        if not 1 <= self.foreground_ratio <= self.ratio:
            raise FastcilError(
                f"foreground_ratio is {self.foreground_ratio}; it must lie from 1 to ratio, "
                f"which is {self.ratio}."
            )
        check_not_negative("tolerance", self.tolerance)
        if self.refresh < 1:
            raise FastcilError(f"refresh is {self.refresh}; it must be at least 1 epoch.")
        for name in ("artifact_step", "artifact_max"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise FastcilError(f"{name} is {value}; it is a chance and must lie in [0, 1].")

    def chance(self, epoch: int) -> float:
        """The chance that a new image is shown compressed in epoch ``epoch``.

        ``min(artifact_max, artifact_step * floor(epoch / refresh))`` (Luo et al. 2023,
        supplement 1).

        Example:
            >>> [BoxConfig().chance(epoch) for epoch in (0, 39, 40, 80, 199)]
            [0.0, 0.0, 0.1, 0.2, 0.4]
        """
        return min(self.artifact_max, self.artifact_step * (epoch // self.refresh))

    def codec_options(self) -> dict[str, float]:
        """Settings of the codec ``bbox``."""
        return {"ratio": self.ratio, "foreground_ratio": self.foreground_ratio}


def _is_threshold(value: float | str) -> bool:
    """Whether something of a map may lie above it, and something below."""
    return not isinstance(value, str) and 0 <= value < 1


class Compression(nn.Module):
    """Simulated compression of a task's new data, and how large the boxes of each task are.

    Both are state: a run that resumes within an epoch reads the same pixels.

    Args:
        config: An addon's settings.

    Attributes:
        boxes: The boxes in force, int16 [N, 4], one per new image.
        chance: The chance in force, float64 [].
        footprints: For each task the sum of the box shares and the count of images, [T, 2].
    """

    boxes: Tensor
    chance: Tensor
    footprints: Tensor

    def __init__(self, config: BoxConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("boxes", torch.empty(0, 4, dtype=torch.int16))
        self.register_buffer("chance", torch.zeros((), dtype=torch.float64))
        self.register_buffer("footprints", torch.empty(0, 2, dtype=torch.float64))

    def begin_task(self, task: Task) -> None:
        """Forgets the last task's boxes and opens a line for this one's footprint."""
        self.boxes = whole_boxes(task.examples.images.sizes).to(self.boxes.device)
        self.chance = torch.zeros_like(self.chance)
        self.footprints = torch.cat([self.footprints, self.footprints.new_zeros(1, 2)])

    def end_task(self) -> None:
        """Lets go of the boxes, which the next task has no use for."""
        self.boxes = self.boxes[:0].clone()
        self.chance = torch.zeros_like(self.chance)

    def simulate(self, task: Task, stages: Iterable[Stage], locate: Locator) -> None:
        """Shows new images compressed, at times, in every stage that reads them.

        The chance is 0 up to the first refresh, so the boxes that the paper makes at the start of
        training show in no image; the first are made when the first image needs one.

        Args:
            task: Its ``examples`` mark the streams concerned: those whose part 0 they are.
            stages: The method's stages; changed in place.
            locate: Makes boxes.

        Raises:
            CompositionError: Another addon simulates compression already.
        """
        if not self.config.artifact:
            return
        views = Views(self.boxes.cpu(), self.config.ratio, float(self.chance))

        def refresh(epoch: int) -> None:
            if epoch % self.config.refresh:
                return
            chance = self.config.chance(epoch)
            if chance:
                self.boxes = locate(task.examples).to(self.boxes.device)
                views.boxes = self.boxes.cpu()
            self.chance = torch.full_like(self.chance, chance)
            views.probability = chance

        for stage in stages:
            if stage.primary:
                stage.before_epoch.append(refresh)
            elif not self.config.compression_stage:
                continue
            stage.streams = tuple(_viewed(s, task.examples, views) for s in stage.streams)

    def offer(self, examples: Examples, locate: Locator) -> Tensor:
        """The boxes with which a task's images are offered to memory, counted.

        Where nothing is to be compressed they are the whole images, which then take the bytes of
        raw ones.
        """
        boxes = locate(examples) if self.config.store else whole_boxes(examples.images.sizes)
        self.count(boxes, examples)
        return boxes

    def count(self, boxes: Tensor, examples: Examples) -> None:
        """Adds the boxes by which a task's images were offered to memory."""
        shares = box_shares(boxes, examples.images.sizes).to(self.footprints.device)
        added = torch.stack([shares.sum(), shares.new_tensor(float(len(shares)))])
        self.footprints = torch.cat([self.footprints[:-1], self.footprints[-1:] + added])

    def record(self) -> Record:
        """Mean share of an image inside its box, and the memory it takes (Eq. 4), by task.

        With b the share, ``b / eta' + (1 - b) / eta``: 1 is an image uncompressed (Fig. S2).
        """
        seen = self.footprints[:, 1].cpu() > 0
        sums, counts = self.footprints.cpu()[seen].unbind(1)
        share = sums / counts
        rate = share / self.config.foreground_ratio + (1 - share) / self.config.ratio
        return Record(
            "curve",
            "Compression",
            {
                "x": seen.nonzero().flatten().tolist(),
                "y": {
                    "mean share inside the box": share.tolist(),
                    "mean memory per image (1 = uncompressed)": rate.tolist(),
                },
                "xlabel": "task",
                "ylabel": "share of an image",
            },
        )


def _viewed(stream: Stream, new: Examples, views: Views) -> Stream:
    """The stream, with views if its part 0 is the task's new data."""
    if not stream.parts or stream.parts[0] is not new:
        return stream
    if stream.views is not None:
        raise CompositionError(
            "two addons simulate compression of the same images; compose with one of them."
        )
    return dataclasses.replace(stream, views=views)


def check_exemplars(addon: str, method: Method) -> None:
    """Raises unless the method keeps exemplars, for there is nothing to compress otherwise."""
    if method.keeps != "exemplars":
        raise CompositionError(
            f"addon '{addon}' compresses exemplars, and {type(method).__name__} keeps "
            f"{method.keeps}; compose it with a method that keeps exemplars, as 'er' does."
        )


def check_sizes(addon: str, config: BoxConfig, context: Context) -> None:
    """Raises if exemplars would be smaller than a way of cropping bears that counts pixels."""
    look = context.augmentation
    counts = look.crop == "padded" or (look.crop == "window" and look.resize is None)
    if config.foreground_ratio > 1 and counts:
        raise CompositionError(
            f"option '{addon}.foreground_ratio' is {config.foreground_ratio}, which keeps "
            f"exemplars at a smaller size, and augment.crop '{look.crop}' cuts squares of as many "
            f"pixels from images of all sizes; set augment.crop to 'resized'."
        )


def check_network(addon: str, method: Method, needs: Collection[str]) -> None:
    """Raises unless the method's network, if there is one yet, has what an addon needs of it."""
    if getattr(method, "network", None) is None:
        return
    network = method.localiser()
    missing = [name for name in needs if not hasattr(network, name)]
    if missing:
        raise CompositionError(
            f"addon '{addon}' makes class activation maps, and the {type(network).__name__} that "
            f"{type(method).__name__} shows it has no {' and no '.join(missing)}; build it as a "
            f"fastcil.nn.Network."
        )
    if "cam_weights" in needs:
        try:
            network.cam_weights(torch.empty(0, dtype=torch.int64))
        except FastcilError as error:
            raise CompositionError(
                f"addon '{addon}' makes class activation maps; {error}"
            ) from error
