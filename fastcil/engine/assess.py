"""A saved Learner on test data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastcil.data import Examples, load
from fastcil.engine.evaluate import count_correct
from fastcil.engine.learner import Learner
from fastcil.engine.seed_run import LEARNER
from fastcil.errors import FastcilError


def assess(learner: str | Path, data: Any, device: str = "auto") -> dict[str, dict[str, float]]:
    """Accuracy of a saved Learner on the test part of some data, classes matched by name.

    Args:
        learner: A file that `Learner.save` wrote, a run directory (its lowest seed), or one seed's
            folder there.
        data: Anything `fastcil.train` takes.
        device: Where to compute.

    Returns:
        readout -> {"top1", "top5"} in percent, over test images of classes the Learner knows.

    Raises:
        FastcilError: No Learner there, or no class in common.
    """
    loaded = Learner.load(_find(Path(learner)), device=device)
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


def _find(path: Path) -> Path:
    """The file of a learner, of a seed's folder or of a run directory."""
    if not path.is_dir():
        return path
    if (path / LEARNER).is_file():
        return path / LEARNER
    seeds = {int(f.parent.name[5:]): f for f in path.glob(f"seed-*/{LEARNER}")}
    if not seeds:
        raise FastcilError(
            f"learner is '{path}', a folder with no finished run in it; pass a run directory, of a "
            f"comparison the one of a single method."
        )
    return seeds[min(seeds)]
