"""A folder is held by one process at a time, whatever the others do meanwhile."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from fastcil.errors import FastcilError
from fastcil.files.lock import LOCK, locked


def test_a_lock_that_is_removed_before_it_is_had_is_none(tmp_path: Path, monkeypatch) -> None:
    """The one who had it ended between this one's opening and locking of the file."""
    calls, flock = [], fcntl.flock

    def remove_first(file, how: int) -> None:
        flock(file, how)
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with locked(tmp_path):
        assert len(calls) == 2 and calls[0].closed
        with pytest.raises(FastcilError, match="in use by another process"), locked(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
