"""Settings that every test shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

# Figures are written to files, never shown.
os.environ.setdefault("MPLBACKEND", "Agg")

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    # The same examples on every run, however slow the machine is.
    settings.register_profile("fastcil", derandomize=True, deadline=None, database=None)
    settings.load_profile("fastcil")


def pytest_collection_finish() -> None:
    """What is there by now stays to the end: collecting garbage need not go through it again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """No file waits for the disk: a test's process can be killed, but the power stays on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
