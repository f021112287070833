"""What LEC-Net's nodes do while they are learned, and how far features drift meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcil.contract import Context, Record, Retained, Task
from fastcil.data import Examples
from fastcil.memory.kept_images import KeptImages
from fastcil.nn import ExpandedBackbone

_LINES = ("share of indicators below 0.1", "share above 0.9", "‖α‖₁ / c", "τ")
_NEAR = 0.1


class Analysis(nn.Module):
    r"""Figures 6 and 7 of Yang et al. (2021): indicators by epoch, and the drift of features.

    The drift after session t is the mean over some images of the first task, which are kept for
    this alone, of

    .. math:: \arccos \frac{f^{(0)}(x)^\top f^{(t)}(x)}{\|f^{(0)}(x)\| \, \|f^{(t)}(x)\|}

    in radians; their formula has no norms, and unit features have none. What a feature of later
    sessions had no part of in the first counts as zero there. Images are drawn from the first
    task by chance, the same ones for every form of the method.

    Args:
        context: Reads images.
        samples: Images of the first task, and of every task those whose indicators are seen.

    Attributes:
        start: f^(0) of the images kept.  # [n, D]
        drift: After each task, the first one's 0 included.  # float64 [T]
        evolution: Of the newest task before every epoch, and after the last one, the four figures
            of the record; -1 where nothing was noted.  # float64 [E + 1, 4]
    """

    start: Tensor
    drift: Tensor
    evolution: Tensor

    def __init__(self, context: Context, samples: int) -> None:
        super().__init__()
        self.context = context
        self.samples = samples
        self.kept = KeptImages()
        self.register_buffer("start", torch.empty(0, 0))
        self.register_buffer("drift", torch.empty(0, dtype=torch.float64))
        self.register_buffer("evolution", torch.empty(0, 4, dtype=torch.float64))

    def begin(self, epochs: int) -> None:
        """Makes room for what a task's epochs bring."""
        self.evolution = self.evolution.new_full((epochs + 1, 4), -1.0)

    def some(self, task: Task) -> Examples:
        """A few of a task's images."""
        order = torch.randperm(len(task.examples), generator=torch.Generator().manual_seed(0))
        return task.examples.select(order[: self.samples].to(task.examples.labels.device))

    def note(self, expanded: ExpandedBackbone, seen: Examples, epoch: int) -> None:
        """Measures the newest indicators, the network being in evaluation mode.

        Args:
            expanded: What they are of.
            seen: `some` of the task's images.
            epoch: Epochs done.
        """
        newest = expanded.newest

        def look(images: Tensor) -> Tensor:
            maps = expanded.own_maps(images)
            alpha = newest.alpha(newest.responses(maps)).expand(len(maps), -1, -1, -1)
            shares = [alpha < _NEAR, alpha > 1 - _NEAR, alpha]
            return torch.stack([share.double().mean((1, 2, 3)) for share in shares], 1)

        means = self.context.scan(look, seen).mean(0)
        row = torch.cat([means, newest.tau.detach()[None].to(means)])
        self.evolution[min(epoch, len(self.evolution) - 1)] = row.to(self.evolution)

    def measure(self, task: Task, features: Callable[[Tensor], Tensor]) -> None:
        """Measures the drift as a task ends; of the first one some images are kept.

        Args:
            task: The task.
            features: Images -> features [B, D], by modules in evaluation mode.
        """
        if task.first:
            self.kept.add(self.some(task).images.reconstruct())
        images = self.kept.store
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        now = self.context.scan(features, Examples(images, labels))
        if task.first:
            self.start = now.clone()
        before = F.pad(self.start, (0, now.shape[1] - self.start.shape[1]))
        cosine = F.cosine_similarity(before.double(), now.double(), dim=1).clamp(-1, 1)
        self.drift = torch.cat([self.drift, cosine.acos().mean()[None].to(self.drift)])

    def retained(self) -> Retained:
        """The images and their features, which no budget counts."""
        held = {**dict(self.kept.named_buffers()), "start": self.start}
        return Retained("images of the first task", "analysis", held)

    def records(self) -> list[Record]:
        """The newest task's indicators by epoch, and the drift by task."""
        noted = self.evolution[self.evolution[:, 0] >= 0].cpu()
        curves = []
        if len(noted):
            lines = dict(zip(_LINES, noted.T.tolist(), strict=True))
            title = "Indicators of the newest nodes"
            curves.append((title, list(range(len(noted))), lines, "epoch", "share"))
        if len(self.drift):
            lines = {"images of the first task": self.drift.tolist()}
            tasks = list(range(len(self.drift)))
            curves.append(("Feature drift", tasks, lines, "task", "mean angle, radians"))
        return [
            Record("curve", title, {"x": x, "y": y, "xlabel": xlabel, "ylabel": ylabel})
            for title, x, y, xlabel, ylabel in curves
        ]
