"""Which part of an exemplar stays sharp: what the network sees in it, or what it is compared to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastcil.addons.compression import BoxConfig
from fastcil.contract import Context, Method, Record, Stage, Stream, Task, evaluating
from fastcil.data import Examples
from fastcil.errors import CompositionError
from fastcil.memory import make_codec

Activated = Callable[[Examples, float], Tensor]
"""Examples and tau -> the boxes of their activation maps, int16 [N, 4]."""

HELD_OUT = "held-out"
_ACTIVATED = ("cam", "learned")
_TENTH, _NONE = 10, -1.0


class Regions(nn.Module):
    """The boxes of an addon's images, by the rule that its config names.

    These are the regions of Luo et al. 2023, Table 3: of ``none`` (row 3) nothing stays sharp;
    ``random`` (row 4) and ``centre`` (row 5) ask no network; ``cam`` (row 6) and ``learned``
    (row 9) are boxes of activation maps at tau. Where tau is ``held-out`` (row 7) a tenth of each
    task's new images is shown to no stage, and tau is the highest of ``thresholds`` at which the
    method still recognises as many of these compressed as uncompressed, less ``tolerance``; the
    lowest if there is none. It is chosen anew whenever boxes are made, by the network as it is.
    The paper says no more of row 7 than that a tenth is held out; what it measured there, and
    whether the network learned without it, is ours.

    Args:
        config: The addon's settings.
        choice: ``none``, ``random``, ``centre``, ``cam`` or ``learned``.

    Attributes:
        seed: What this task's draws start from, int64 [].
        thresholds: The tau chosen last in each task, float64 [T]; -1 where none was yet.
    """

    seed: Tensor
    thresholds: Tensor

    def __init__(self, config: BoxConfig, choice: str) -> None:
        super().__init__()
        self.config = config
        self.choice = choice
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("thresholds", torch.empty(0, dtype=torch.float64))

    @property
    def asks(self) -> bool:
        """Whether boxes come from activation maps."""
        return self.choice in _ACTIVATED

    @property
    def holds_out(self) -> bool:
        """Whether tau is chosen on images held out."""
        return self.asks and self.config.threshold == HELD_OUT

    @property
    def threshold(self) -> float:
        """tau as it is: the config's, or what was chosen last in this task."""
        tau = self.config.threshold
        if not isinstance(tau, str):
            return tau
        chosen = float(self.thresholds[-1])
        return min(self.config.thresholds) if chosen == _NONE else chosen

    def check(self, addon: str, method: Method) -> None:
        """Raises if images can't be held out of a method's training."""
        if self.holds_out and method.selection == "own":
            raise CompositionError(
                f"option '{addon}.threshold' is '{HELD_OUT}', and {type(method).__name__} chooses "
                f"its exemplars as it trains, among all new images; give a number."
            )

    def begin_task(self) -> None:
        """Draws of this task follow its seed of weights, which the engine sets for each task."""
        self.seed = torch.full_like(self.seed, torch.initial_seed() % 2**62)
        self.thresholds = torch.cat([self.thresholds, self.thresholds.new_tensor([_NONE])])

    def hold_out(self, task: Task, stages: Iterable[Stage]) -> None:
        """Keeps the images held out from every stage; changes the stages in place."""
        if not self.holds_out:
            return
        held = self.held(len(task.examples))
        for stage in stages:
            for part in (stage, *stage.companions):
                part.streams = tuple(_without(s, task.examples, held) for s in part.streams)

    def held(self, count: int) -> Tensor:
        """Which of a task's ``count`` new images are held out: a tenth, int64, ascending."""
        order = torch.randperm(count, generator=self._generator())
        return order[: max(1, count // _TENTH)].sort().values

    def locate(
        self, examples: Examples, activated: Activated, method: Method, context: Context
    ) -> Tensor:
        """The box of each new image of the task.

        Args:
            examples: The task's new images.
            activated: Makes the boxes of activation maps.
            method: Recognises images held out.
            context: Reads images.

        Returns:
            int16 [N, 4], (y0, x0, y1, x1) with exclusive ends; (0, 0, 0, 0) where nothing is to
            stay sharp.
        """
        sizes = examples.images.sizes
        if self.choice == "none":
            return torch.zeros(len(examples), 4, dtype=torch.int16, device=sizes.device)
        if self.choice == "centre":
            return centre_boxes(sizes)
        if self.choice == "random":
            return random_boxes(sizes, self._generator())
        if self.holds_out:
            tau = self._choose(examples, activated, method, context)
            self.thresholds = torch.cat([self.thresholds[:-1], self.thresholds.new_tensor([tau])])
        return activated(examples, self.threshold)

    def _choose(
        self, examples: Examples, activated: Activated, method: Method, context: Context
    ) -> float:
        """The highest threshold whose compression the images held out bear."""
        images = examples.select(self.held(len(examples)))
        codec = make_codec("bbox", **self.config.codec_options())

        def recognised(images: Examples) -> float:
            with evaluating(method):
                scores = context.scan(method.logits, images)
            return float((scores.argmax(1) == images.labels.to(scores.device)).double().mean())

        wanted = recognised(images) - self.config.tolerance
        falling = sorted(self.config.thresholds, reverse=True)
        for tau in falling[:-1]:
            kept = codec.decode(codec.encode(images.images, activated(images, tau)))
            if recognised(Examples(kept, images.labels)) >= wanted:
                return tau
        return falling[-1]

    def _generator(self) -> torch.Generator:
        """The same draws whenever they are asked for within a task."""
        return torch.Generator().manual_seed(int(self.seed))

    def records(self) -> list[Record]:
        """The threshold of each task, where it is chosen."""
        if not self.holds_out:
            return []
        return [
            Record(
                "curve",
                "Threshold chosen on images held out",
                {
                    "x": list(range(len(self.thresholds))),
                    "y": {"tau": [None if v == _NONE else v for v in self.thresholds.tolist()]},
                    "xlabel": "task",
                    "ylabel": "tau",
                },
            )
        ]


def _without(stream: Stream, new: Examples, held: Tensor) -> Stream:
    """The stream without some of the task's new images, if its part 0 are these."""
    if not stream.parts or stream.parts[0] is not new:
        return stream
    subset = stream.subset
    if callable(subset):
        return replace(stream, subset=lambda: _excluding(subset(), held))
    return replace(stream, subset=_excluding(stream.pool(), held))


def _excluding(positions: Tensor, held: Tensor) -> Tensor:
    """Those positions that are not held out."""
    return positions[~torch.isin(positions, held.to(positions.device))]


def centre_boxes(sizes: Tensor) -> Tensor:
    """The middle of each image, half as high and half as wide: 1/4 of it (Table 3, row 5).

    Args:
        sizes: Heights and widths, int64 [N, 2].

    Returns:
        int16 [N, 4]; halves are rounded down.

    Example:
        >>> centre_boxes(torch.tensor([[40, 61]]))
        tensor([[10, 15, 30, 45]], dtype=torch.int16)
    """
    sides = sizes // 2
    begin = (sizes - sides) // 2
    return torch.cat([begin, begin + sides], 1).to(torch.int16)


def random_boxes(sizes: Tensor, generator: torch.Generator) -> Tensor:
    """A part of each image drawn by chance (Luo et al. 2023, Table 3, row 4).

    The paper doesn't say how large. Here the share of the area is uniform in [0, 1/2], so that
    its mean is the centre row's 1/4; the box has the image's proportions, and lies anywhere in it
    with equal chance.

    Args:
        sizes: Heights and widths, int64 [N, 2].
        generator: Of the draws, on the CPU.

    Returns:
        int16 [N, 4], every side at least 1 pixel.

    Example:
        >>> box = random_boxes(torch.tensor([[40, 60]]), torch.Generator().manual_seed(0))[0]
        >>> float((box[2] - box[0]) * (box[3] - box[1]) / (40 * 60)) <= 0.5
        True
    """
    draws = torch.rand(len(sizes), 3, generator=generator, dtype=torch.float64).to(sizes.device)
    scale = (0.5 * draws[:, :1]).sqrt()  # [N, 1], of each side
    sides = (sizes * scale).round().long().clamp_min(1)
    begin = (draws[:, 1:] * (sizes - sides + 1)).long()
    return torch.cat([begin, begin + sides], 1).to(torch.int16)
