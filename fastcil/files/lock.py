"""Folders that one process at a time writes in."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastcil.errors import FastcilError

LOCK = ".lock"


@contextmanager
def locked(
    folder: Path, name: str = "run_dir", advice: str = "use another directory"
) -> Iterator[None]:
    """Holds a folder for this process, as long as it lives: two would write each other's files.

    Args:
        folder: Made if it isn't there.
        name: What the sentence calls what it belongs to.
        advice: What to do instead of waiting for the other process.

    Raises:
        FastcilError: Another process holds it, or nothing can be written there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder)):
        ...     Path(folder, LOCK).exists()
        True
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while (file := _held(folder / LOCK)) is None:
            pass
    except BlockingIOError as error:
        raise FastcilError(
            f"{name}'s '{folder}' is in use by another process; wait for it, or {advice}."
        ) from error
    except OSError as error:
        raise FastcilError(f"'{folder}' can't be written: {error.strerror or error}.") from error
    with file:
        try:
            yield
        finally:
            # Whoever comes now finds the work finished, or a file of this name to hold anew.
            (folder / LOCK).unlink(missing_ok=True)


def _held(path: Path) -> BinaryIO | None:
    """The file, held; None if the one who had it removed it before it could be had."""
    file = open(path, "wb")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
    except BaseException:
        file.close()
        raise
    file.close()
    return None
