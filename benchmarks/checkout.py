"""Modules of a peer's checkout: several call theirs alike, and one process times them all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

# Packages of checkouts: whoever loads one drops the others'.
_PACKAGES = ("backbone", "convs", "datasets", "models", "utils")


def load(folder: Path, marker: str, option: str) -> None:
    """Makes the modules of a checkout importable, and forgets those of another.

    Args:
        folder: The checkout.
        marker: A file that it holds, relative to it.
        option: The command line's name of the folder.
    """
    if not (folder / marker).is_file():
        raise SystemExit(f"--{option} is '{folder}', which holds no {marker}.")
    import torchvision_stand_in

    torchvision_stand_in.install_if_missing()
    for name in [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]:
        del sys.modules[name]
    place = str(folder.resolve())
    sys.path[:] = [place, *(path for path in sys.path if path != place)]


class Endless:
    """A loader whose workers stay: each epoch goes on where the last one stopped.

    Short epochs would else start workers for a few steps each, as whole ones don't. All batches are
    whole.

    Args:
        loader: A ``DataLoader``.

    Attributes:
        steps: Batches of an epoch; None: whoever reads stops by itself.
    """

    def __init__(self, loader: Any) -> None:
        self.dataset = loader.dataset
        self.steps: int | None = None
        self._running = _forever(loader)

    def __len__(self) -> int:
        return self.steps or 0

    def __iter__(self) -> Iterator[Any]:
        return islice(self._running, self.steps)


def _forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from islice(loader, len(loader.dataset) // loader.batch_size)
