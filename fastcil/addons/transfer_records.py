"""Whether gradients on completed exemplars stand for those on the originals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcil.addons.completed import Completed
from fastcil.contract import Batch, Context, Record, Retained, Stage, Task, evaluating, total
from fastcil.curvature.anchor import draws
from fastcil.data import Examples, ImageStore
from fastcil.memory.kept_images import KeptImages
from fastcil.memory.originals import find_original

Completer = Callable[[ImageStore, Tensor], ImageStore]
"""Images and their saliency maps -> the images as memory gives them back."""

Gradient = Sequence[Tensor | None]
"""One entry for each parameter; None where the loss doesn't depend on it."""

_FIGURES = ("<g, g~k>", "<g, gk>", "cos(g, g~k)", "cos(g, gk)", "cos(gk, g~k)", "loss on memory")
_COSINES = slice(2, 5)
_LOSS = 5
# Of a step's length, that of all parameters.
_STEP = 1e-5
# A completion is repeated to within rounding.
_SAME = 1.0


class Transfer(nn.Module):
    r"""Compares gradients as each task begins and ends (Bai et al. 2023, Sec. 4.3).

    With g the gradient of the method's loss on some of a task's new images, :math:`\tilde g_k` that
    on completed exemplars of an earlier task k, and :math:`g_k` that on the originals of the same
    exemplars,

    - Lemma 4.1: :math:`\langle g, \tilde g_k \rangle \ge 0` implies that a small enough step to
      :math:`\theta - \alpha g` doesn't raise the loss on memory, for it changes by :math:`-\alpha
      \langle g, \tilde g_k \rangle` to first order (Eq. I.5). Here: how often it didn't where the
      product is above 0 (at 0 the second order decides), and how often it did where it is below,
      with :math:`\alpha \lVert g \rVert = 10^{-5} (1 + \lVert \theta \rVert)`, near the least step
      whose effect float32 shows. Beside it, how often that loss has fallen by the end of a task
      which began so: its steps are not small, and method and memory change g.
    - Theorem 4.1: :math:`\langle g, \tilde g_k \rangle > 0` implies :math:`\langle g, g_k \rangle
      > 0` as :math:`\tilde x \to x`. Here: how often it does.

    The loss is that of the stage that learns the new data, the method in evaluation mode and the
    images by the test transform; the originals are kept for this alone. As a task begins and as it
    ends this takes a pass forward and backward over the new images, two over the exemplars of each
    earlier task, and one forward over them after the step, for which parameters are changed in
    place and put back bit by bit, from a copy.

    Args:
        context: Reads images.
        samples: New images that g is taken on.

    Attributes:
        begun: What was found as the task began, float64 [K, 7]: k, then the six figures.
        rows: Task, k, the figures as it began, and as it ended, float64 [R, 14].
        steps: Task, k, 0 as it began or 1 as it ended, <g, g~k>, and by how much the step lowered
            the loss on memory, over alpha, float64 [S, 5].
    """

    labels: Tensor
    tasks: Tensor
    maps: Tensor
    begun: Tensor
    rows: Tensor
    steps: Tensor

    def __init__(self, context: Context, samples: int) -> None:
        super().__init__()
        self.context = context
        self.samples = samples
        self.originals = KeptImages()
        for name in ("labels", "tasks"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64))
        self.register_buffer("maps", torch.empty(0, 0, 0))
        self.register_buffer("begun", torch.empty(0, 7, dtype=torch.float64))
        self.register_buffer("rows", torch.empty(0, 14, dtype=torch.float64))
        self.register_buffer("steps", torch.empty(0, 5, dtype=torch.float64))

    def keep(self, task: Task, shown: Completed) -> None:
        """Keeps the originals of some exemplars of a task."""
        device = self.labels.device
        self.originals.add(shown.originals.images)
        labels = shown.originals.labels.to(device)
        self.labels = torch.cat([self.labels, labels])
        self.tasks = torch.cat([self.tasks, torch.full_like(labels, task.index)])
        maps = shown.maps.to(device)
        self.maps = torch.cat([self.maps, maps]) if len(self.maps) else maps.clone()

    def watch(self, task: Task, stage: Stage, complete: Completer) -> None:
        """Measures as a stage begins and as it ends; changes the stage in place.

        Args:
            task: The task.
            stage: What learns its new data.
            complete: What memory does to exemplars.
        """
        begin, finish = stage.begin, stage.finish

        def started() -> None:
            if begin is not None:
                begin()
            self.begun = self._measure(task, stage, complete, ended=False)

        def finished() -> None:
            ended = self._measure(task, stage, complete, ended=True)[:, 1:]
            first = torch.full_like(self.begun[:, :1], task.index)
            self.rows = torch.cat([self.rows, torch.cat([first, self.begun, ended], 1)])
            self.begun = self.begun[:0].clone()
            if finish is not None:
                finish()

        stage.begin, stage.finish = started, finished

    def _measure(self, task: Task, stage: Stage, complete: Completer, ended: bool) -> Tensor:
        """The figures of every earlier task of which there is an exemplar, float64 [K, 7].

        What the small step does is added to `steps`.
        """
        found = self.begun[:0]
        earlier = self.tasks.unique().tolist()
        if not earlier:
            return found
        drawn = draws(task.index, torch.initial_seed())
        order = torch.randperm(len(task.examples), generator=drawn)[: self.samples]
        new = task.examples.select(order.to(task.examples.labels.device))
        g, _ = _gradient(stage, self._batch(new, order, 0))
        for k in earlier:
            mine = (self.tasks == k).nonzero().flatten()
            originals = self.originals.store.select(mine)
            completed = complete(originals, self.maps[mine])
            held = Examples(completed, self.labels[mine])
            rows, index = _where(task.exemplars, held)
            if not len(index):
                continue
            seen = held.select(rows.to(held.labels.device))
            true = Examples(originals.select(rows.to(originals.device)), seen.labels)
            remembered = self._batch(seen, index, 1)
            g_completed, loss = _gradient(stage, remembered)
            g_original, _ = _gradient(stage, self._batch(true, index, 1))
            figures = [*_figures(g, g_completed, g_original), loss]
            found = torch.cat([found, found.new_tensor([[k, *figures]])])
            step = [task.index, k, ended, figures[0], _fall(stage, remembered, g, loss)]
            self.steps = torch.cat([self.steps, self.steps.new_tensor([step])])
        return found

    def _batch(self, examples: Examples, index: Tensor, part: int) -> Batch:
        """Images as a stage's loss takes them.

        ``index`` are their positions in the part that the stage knows: 0, the task's images, or 1,
        its exemplars, in whose place the originals may stand.
        """

        def read(images: Tensor, labels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
            return images, labels

        images, labels = self.context.scan_labelled(read, examples, look="centre")
        return Batch(images, labels, torch.full_like(labels, part), index.to(labels.device))

    def retained(self) -> Retained:
        """The originals, which no budget counts."""
        held = {name: getattr(self, name) for name in ("labels", "tasks", "maps")}
        held |= dict(self.originals.named_buffers())
        return Retained("originals of exemplars", "analysis", held)

    def records(self) -> list[Record]:
        """Mean cosines of every task, and how often what the lemma and the theorem say holds."""
        if not len(self.rows):
            return []
        rows = self.rows.cpu()
        start, end = rows[:, 2:8], rows[:, 8:]
        tasks = rows[:, 0].unique()
        lines = {
            f"{name}, {when}": [_finite(v) for v in _means(rows[:, 0], tasks, values)]
            for when, figures in (("as it begins", start), ("as it ends", end))
            for name, values in zip(_FIGURES[_COSINES], figures.T[_COSINES], strict=True)
        }
        fell = end[:, _LOSS] <= start[:, _LOSS]
        table = [
            _count("Theorem 4.1, tasks beginning", start[:, 0] > 0, start[:, 1] > 0),
            _count("Theorem 4.1, tasks ending", end[:, 0] > 0, end[:, 1] > 0),
            *self._lemma(),
            _count("Lemma 4.1's condition, and less loss at the end", start[:, 0] > 0, fell),
        ]
        return [
            Record(
                "curve",
                "Gradients on new images, completed exemplars and their originals",
                {
                    "x": [int(task) + 1 for task in tasks.tolist()],
                    "y": lines,
                    "xlabel": "task",
                    "ylabel": "cosine, mean over earlier tasks",
                },
            ),
            Record(
                "table",
                "Does a step that is good for completed exemplars serve the originals?",
                {
                    "columns": ["", "pairs of tasks", "condition met", "and what follows from it"],
                    "rows": table,
                },
            ),
        ]

    def _lemma(self) -> list[list[Any]]:
        """How often a small step does what the sign of the product says."""
        ended, product, fall = self.steps.cpu()[:, 2:].T
        kinds = {"beginning": ended == 0, "ending": ended == 1}
        return [
            row
            for when, now in kinds.items()
            for row in (
                _count(f"Lemma 4.1, a small step, tasks {when}", product[now] > 0, fall[now] >= 0),
                _count(f"<g, g~k> < 0, a rise, tasks {when}", product[now] < 0, fall[now] <= 0),
            )
        ]


def _loss(stage: Stage, batch: Batch) -> Tensor:
    """A stage's loss in evaluation mode."""
    devices = [batch.images.device] if batch.images.is_cuda else []
    # A loss may draw random numbers; training must not notice that it was looked at.
    with evaluating(stage.method), torch.random.fork_rng(devices):
        return total(stage.call(stage.objective, batch))


def _gradient(stage: Stage, batch: Batch) -> tuple[Gradient, float]:
    """The gradient of a stage's loss, and the loss."""
    parameters = list(stage.parameters())
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            loss = _loss(stage, batch)
            if not loss.requires_grad:
                return [None] * len(parameters), float(loss)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
    return gradients, float(loss.detach())


@torch.no_grad()
def _fall(stage: Stage, batch: Batch, g: Gradient, loss: float) -> float:
    """By how much a small step along g lowers a loss, over alpha; 0 without a gradient."""
    pairs = [(p, d) for p, d in zip(stage.parameters(), g, strict=True) if d is not None]
    moved = [parameter for parameter, _ in pairs]
    length = math.sqrt(_dot(g, g))
    if not length:
        return 0.0
    alpha = _STEP * (1 + math.sqrt(_dot(moved, moved))) / length
    before = [parameter.clone() for parameter in moved]
    try:
        for parameter, slope in pairs:
            parameter.sub_(slope, alpha=alpha)
        return (loss - float(_loss(stage, batch))) / alpha
    finally:
        for parameter, value in zip(moved, before, strict=True):
            parameter.copy_(value)


def _where(exemplars: Examples, completed: Examples) -> tuple[Tensor, Tensor]:
    """Which completed images memory still holds, and their positions there, int64 [n] each."""
    pairs = []
    for row, label in enumerate(completed.labels.tolist()):
        image = completed.images.image(row)
        place = find_original(exemplars, label, image)
        if place is None or exemplars.images.image(place).shape != image.shape:
            continue
        change = exemplars.images.image(place).cpu().int() - image.cpu().int()
        if float(change.abs().float().mean()) < _SAME:
            pairs.append((row, place))
    both = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return both[:, 0], both[:, 1]


def _figures(g: Gradient, completed: Gradient, original: Gradient) -> list[float]:
    """Both products with g, and the three cosines."""
    pairs = ((g, completed), (g, original), (original, completed))
    return [_dot(*pairs[0]), _dot(*pairs[1]), *(_cosine(*pair) for pair in pairs)]


def _dot(a: Gradient, b: Gradient) -> float:
    """Inner product over all parameters, in float64; what has no gradient has a zero one."""
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return float(sum((x.double() * y.double()).sum() for x, y in both))


def _cosine(a: Gradient, b: Gradient) -> float:
    """NaN where one of them is zero."""
    length = math.sqrt(_dot(a, a) * _dot(b, b))
    return _dot(a, b) / length if length else math.nan


def _means(which: Tensor, tasks: Tensor, values: Tensor) -> list[float]:
    """Mean over the rows of each task that have a value."""
    return [float(values[which == task].nanmean()) for task in tasks]


def _finite(value: float) -> float | None:
    """Without a value the line is broken."""
    return value if math.isfinite(value) else None


def _count(name: str, condition: Tensor, conclusion: Tensor) -> list[Any]:
    """A row of the table: pairs, those that meet the condition, and how many of these conclude."""
    met, both = int(condition.sum()), int((condition & conclusion).sum())
    return [name, len(condition), met, f"{both} ({100 * both / met:.0f} %)" if met else "none"]
