"""What is lost where pixels of exemplars are dropped and completed: outputs, bytes, pictures."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastcil.addons.completed import Completed
from fastcil.addons.exemplar_pictures import scaled, side_by_side
from fastcil.contract import Context, Record, Task
from fastcil.data import Examples, ImageStore
from fastcil.memory.codecs.sparse_store import form_nbytes

_GREY = 128
_AT_ONCE = 16
_FORMS = ("coo", "runs", "bitmask", "smallest")
_COMPLETED = ("by the rule", "completed")


def output_errors(
    context: Context,
    scores: Callable[[Tensor], Tensor],
    before: Examples,
    after: ImageStore,
    threshold: float,
) -> Tensor:
    r"""How much completion changes the score of the class, and by how much it should at most.

    .. math:: \lvert y^c_x - y^c_{\tilde x} \rvert
        \approx \lvert \langle \partial y^c / \partial x, \tilde x - x \rangle \rvert
        \le \lVert \partial y^c / \partial x \rVert \, \lVert \tilde x - x \rVert
        \le \mu \, \Delta_x \sqrt d

    (Bai et al. 2023, Lemma 4.2 and Eq. I.8), with :math:`\Delta_x = \max_i \lvert x_i - \tilde x_i
    \rvert`. The square root is the proof's; Eq. 4.11 prints d to the power of -2. The last step
    takes the norm of the gradient for the saliency and this for at most mu where pixels were
    dropped, which nothing assures: it is the step to be looked at.

    Images are seen whole at the network's size: x has d = 3 s s values from 0 to 1.

    Args:
        context: Reads the images.
        scores: Normalised images -> [B, K], by modules in evaluation mode.
        before: N originals and their classes c.
        after: The completed images.
        threshold: mu.

    Returns:
        The first, the third and the last of these terms, float64 [N, 3].
    """
    std = torch.tensor(context.augmentation.std)
    errors = [torch.empty(0, 3, dtype=torch.float64)]

    def read(images: Tensor, labels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        return images, labels

    originals, labels = context.scan_labelled(read, before, look="whole")
    completed, _ = context.scan_labelled(read, Examples(after, before.labels), look="whole")
    scale = std.to(originals)[:, None, None]
    for rows in torch.arange(len(before)).split(_AT_ONCE):
        rows = rows.to(labels.device)
        x, change = originals[rows].requires_grad_(), (completed - originals)[rows] * scale
        own = labels[rows][:, None]
        with torch.enable_grad():
            y = scores(x).gather(1, own)
            (slope,) = torch.autograd.grad(y.sum(), [x])
        with torch.no_grad():
            changed = scores(completed[rows]).gather(1, own)
        steep = (slope / scale).flatten(1).double().norm(dim=1)
        moved = change.flatten(1).double()
        found = [
            (y.detach() - changed)[:, 0].double().abs(),
            steep * moved.norm(dim=1),
            threshold * moved.abs().amax(1) * moved.shape[1] ** 0.5,
        ]
        errors.append(torch.stack(found, 1).cpu())
    return torch.cat(errors)


class CompletionRecords(nn.Module):
    """Figures of every task's exemplars, and pictures of the last one's.

    Attributes:
        errors: For each task measured, the means of `output_errors`, and the shares of exemplars
            whose error is within the second and the third, float64 [T, 6], the task first.
            Exemplars kept whole are left out: their error and its bounds are 0.
        whole: For each, the share of exemplars kept whole, float64 [T, 2], the task first.
        flat: For each task, the share of its images whose saliency map has no contrast, so that
            they are kept whole, float64 [T, 2], the task first.
        taken: For each, exemplars of a class, and of a raw image's bytes what the pixels kept, and
            with them the mask in each form, take, float64 [T, 7], the task first.
        holes: For each, the mean squared error of dropped pixels, of values from 0 to 1, as the
            rule fills them and as memory gives them back, float64 [T, 3], the task first.
    """

    errors: Tensor
    flat: Tensor
    whole: Tensor
    taken: Tensor
    holes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("holes", torch.empty(0, 3, dtype=torch.float64))
        self.register_buffer("errors", torch.empty(0, 6, dtype=torch.float64))
        for name in ("flat", "whole"):
            self.register_buffer(name, torch.empty(0, 2, dtype=torch.float64))
        self.register_buffer("taken", torch.empty(0, 7, dtype=torch.float64))
        self._pictures: Record | None = None

    def see(self, task: Task, maps: Tensor) -> None:
        """Adds how many of a task's saliency maps, float32 [N, h, w], are one number everywhere."""
        low, high = maps.flatten(1).aminmax(dim=1)
        share = (~(high > low)).double().mean()  # NaN is no contrast
        self.flat = _append(self.flat, task.index, share[None])

    def note(
        self, task: Task, shown: Completed, filled: ImageStore, errors: Tensor, pictures: int
    ) -> None:
        """Adds a task.

        Args:
            task: Its exemplars those that memory holds now.
            shown: Exemplars of its classes.
            filled: The same as the rule alone completes them.
            errors: Their `output_errors`, float64 [N, 3].
            pictures: How many of them to show.
        """
        sizes = shown.originals.images.sizes
        nbytes = form_nbytes(shown.masks, sizes)
        raw = nbytes["raw"].double()
        image = torch.arange(len(shown)).to(sizes.device).repeat_interleave(sizes.prod(1))
        kept = raw.new_zeros(len(shown)).index_add_(0, image, shown.masks.to(raw))
        whole = (kept == sizes.prod(1)).to(errors.device)
        # Their error and its bounds are 0, or tell of the autoencoder alone.
        counted = errors[~whole]
        within = (counted[:, :1] <= counted[:, 1:]).double()
        row = torch.cat([counted.mean(0), within.mean(0)])
        self.errors = _append(self.errors, task.index, row)
        self.whole = _append(self.whole, task.index, whole.double().mean()[None])
        shares = [(3 * kept / raw).mean(), *((nbytes[form] / raw).mean() for form in _FORMS)]
        held = len(task.exemplars) / task.total
        self.taken = _append(self.taken, task.index, torch.stack([raw.new_tensor(held), *shares]))
        missed = [shown.missed(images) for images in (filled, shown.images)]
        self.holes = _append(self.holes, task.index, torch.stack(missed))
        title = f"Saliency and completion of {task.name or f'task {task.index + 1}'}"
        self._pictures = completion_pictures(title, shown, pictures)

    def records(self, threshold: float) -> list[Record]:
        """Curves over tasks, the table of Lemma 4.2, and the pictures.

        Args:
            threshold: mu, for the title.
        """
        flat = self._flat_record()
        if not len(self.taken):
            return flat
        tasks, held, kept, *forms = (column.tolist() for column in self.taken.cpu().T)
        x = [int(task) + 1 for task in tasks]
        numbers = {"exemplars of a class": held}
        shares = {"pixels kept": kept}
        shares |= {f"with their mask: {n}": f for n, f in zip(_FORMS, forms, strict=True)}
        figures = {**_LEMMA}
        whole = {task: f"{100 * share:.0f} %" for task, share in self.whole.tolist()}
        table = [
            [
                int(row[0]) + 1,
                *("none" if isnan(v) else f"{v:.4g}" for v in row[1:4]),
                *("none" if isnan(v) else f"{100 * v:.0f} %" for v in row[4:]),
                whole.get(row[0], "counted"),  # by an earlier version
            ]
            for row in self.errors.tolist()
        ]
        found = [_drawn(column) for column in self.errors.cpu().T[1:4].tolist()]
        records = [
            _curve("Images of a class, pixels dropped", x, numbers, "images"),
            _curve(f"Of an exemplar's raw bytes, mu = {threshold:g}", x, shares, "share"),
            _curve(
                "Dropped pixels",
                x,
                {
                    name: _drawn(errors)
                    for name, errors in zip(
                        _COMPLETED, self.holes.cpu().T[1:].tolist(), strict=True
                    )
                },
                "mean squared error",
            ),
            _curve(
                "Lemma 4.2: change of an exemplar's score by completion",
                x,
                dict(zip(figures.values(), found, strict=True)),
                "score, mean over exemplars not kept whole",
            ),
            Record(
                "table",
                "Lemma 4.2, with the proof's square root of d (Eq. 4.11 prints d to the -2)",
                {
                    "columns": ["task", *figures.values(), *_SHARES],
                    "rows": table,
                },
            ),
            *flat,
        ]
        return records if self._pictures is None else [*records, self._pictures]

    def _flat_record(self) -> list[Record]:
        """The curve of `flat`, if there is one."""
        if not len(self.flat):
            return []
        tasks, shares = self.flat.cpu().T.tolist()
        x, y = [int(task) + 1 for task in tasks], {"of the task's images": shares}
        return [_curve("Images kept whole: saliency without contrast", x, y, "share")]


_LEMMA = {
    "error": "|y(x) - y(x~)|",
    "first": "first order: ‖dy/dx‖ ‖x~ - x‖",
    "bound": "bound: mu Δx √d",
}
_SHARES = ("within first order", "within bound", "kept whole: left out")


def completion_pictures(title: str, shown: Completed, count: int) -> Record:
    """Originals, their saliency, what is stored of them, and what is made of that.

    (Bai et al. 2023, Figs. 4 and 6, with what is stored between.)

    Args:
        title: Of the record.
        shown: Exemplars.
        count: How many of them, the first ones.

    Returns:
        A record of kind ``images``: the saliency map lies over the image, blue for 0 and red for
        1; dropped pixels are grey.
    """
    payload: dict[str, list[Any]] = {"images": [], "captions": [], "labels": []}
    for place in range(min(count, len(shown))):
        original = shown.originals.images.image(place).cpu().numpy()
        mask = shown.mask(place).cpu().numpy()
        stored = np.where(mask[:, :, None], original, np.uint8(_GREY))
        row = [
            original,
            _heated(original, shown.maps[place].cpu().numpy()),
            stored,
            shown.images.image(place).cpu().numpy(),
        ]
        payload["images"].append(side_by_side([scaled(picture) for picture in row]))
        maps = shown.maps[place]
        dead = " (a map without contrast keeps all)" if bool(maps.amax() == maps.amin()) else ""
        payload["labels"].append(int(shown.originals.labels[place]))
        payload["captions"].append(
            f"original, saliency{dead}, stored ({100 * mask.mean():.0f} % of the pixels), completed"
        )
    return Record("images", title, payload)


def _heated(image: NDArray[np.uint8], values: NDArray[Any]) -> NDArray[np.uint8]:
    """An image under its map's colours."""
    size = image.shape[1], image.shape[0]
    heat = cv2.resize(values.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    coloured = cv2.applyColorMap((255 * heat.clip(0, 1)).astype(np.uint8), cv2.COLORMAP_JET)
    mixed = cv2.addWeighted(image, 0.5, cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB), 0.5, 0.0)
    return np.asarray(mixed, dtype=np.uint8)


def _append(held: Tensor, task: int, row: Tensor) -> Tensor:
    """One more row, the task in front."""
    row = torch.cat([row.new_tensor([task]), row])
    return torch.cat([held, row[None].to(held)])


def _drawn(values: list[float]) -> list[float | None]:
    """Values of a line, which is broken where there is none: JSON has no NaN."""
    return [None if isnan(value) else value for value in values]


def _curve(title: str, x: list[int], y: dict[str, Any], ylabel: str) -> Record:
    """A record of lines over tasks."""
    return Record("curve", title, {"x": x, "y": y, "xlabel": "task", "ylabel": ylabel})
