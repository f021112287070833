"""Features of the images that memory chooses from, looked at as they will be remembered."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastcil.contract import Task
from fastcil.data import Examples
from fastcil.errors import FastcilError
from fastcil.memory.codecs import Codec, Encoded

Embed = Callable[[Examples], Tensor]
"""Examples -> features [N, D], by which exemplars are selected."""
Look = Callable[[Encoded, int], Tensor]
"""Candidates of a class, encoded, and the class -> their features [N, D]."""


def looks(task: Task, held: Callable[[], Examples], codec: Codec[Any], embed: Embed) -> Look:
    """How features of a class's candidates, its exemplars and then its new images, are had.

    Where the codec leaves images as they are, all are looked at in one go, the first time that any
    are asked for, and where they lie: classes of a few images would make batches of a few. Else
    each class is decoded by itself, so that never more than one lies there decoded.

    Args:
        task: The new images.
        held: Gives the exemplars of before, as they are read.
        codec: How images are remembered.
        embed: Gives features.

    Raises:
        FastcilError: When asked, not one row per image.
    """

    def each(candidates: Encoded, label: int) -> Tensor:
        images = codec.decode(candidates)
        labels = torch.full((len(images),), label, device=images.pixels.device)
        return _rows(embed, Examples(images, labels))

    @cache
    def all_at_once() -> tuple[Tensor, Tensor]:
        parts = [task.examples]
        before = held()
        classes = torch.tensor(task.classes, dtype=torch.int64, device=before.labels.device)
        again = torch.isin(before.labels, classes).nonzero().flatten()
        if len(again):
            parts.insert(0, before.view(again))
        rows = torch.cat([_rows(embed, part) for part in parts])
        return rows, torch.cat([part.labels.to(rows.device) for part in parts])

    def found(candidates: Encoded, label: int) -> Tensor:
        rows, labels = all_at_once()
        return rows[labels == label]

    return found if codec.leaves_images else each


def _rows(embed: Embed, examples: Examples) -> Tensor:
    """One row of features for each image."""
    rows = embed(examples)
    if len(rows) != len(examples):
        raise FastcilError(f"embed gave {len(rows)} rows of features for {len(examples)} images.")
    return rows
