"""A saved Learner on test data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastcil.data import Examples, load
from fastcil.engine.evaluate import count_correct
from fastcil.engine.learner import Learner
from fastcil.engine.run import LEARNER
from fastcil.errors import FastcilError


def assess(learner: str | Path, data: Any, device: str = "auto") -> dict[str, dict[str, float]]:
    """Accuracy of a saved Learner on the test part of some data, classes matched by name.

    Args:
        learner: A file that `Learner.save` wrote, or a run directory (its first seed).
        data: Anything `fastcil.train` takes.
        device: Where to compute.

    Returns:
        readout -> {"top1", "top5"} in percent, over test images of classes the Learner knows.

    Raises:
        FastcilError: No Learner there, or no class in common.
    """
    path = Path(learner)
    if path.is_dir():
        found = sorted(path.glob(f"**/{LEARNER}"))
        if not found:
            raise FastcilError(f"learner is '{path}', a folder with no finished run in it.")
        path = found[0]
    loaded = Learner.load(path, device=device)
    dataset = load(data)
    place = {name: k for k, name in enumerate(loaded.class_names)}
    labels = torch.tensor([place.get(name, -1) for name in dataset.class_names])
    moved = labels[dataset.test.labels.cpu()]
    known = (moved >= 0).nonzero().flatten()
    if not len(known):
        raise FastcilError(
            f"data is '{dataset.name}', none of whose classes the Learner knows; "
            f"it knows {', '.join(loaded.class_names[:5])} ..."
        )
    test = Examples(dataset.test.select(known).images, moved[known])
    counts = count_correct(loaded.method, loaded.parts.context, test, len(loaded.class_names))
    return {
        name: {top: 100.0 * sum(c[top]) / len(test) for top in ("top1", "top5")}
        for name, c in counts.items()
    }
