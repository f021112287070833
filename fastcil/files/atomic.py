"""Files that are never half written."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fastcil.errors import FastcilError


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a kill at any moment, sees the old one or the new one.

    Args:
        path: The file; folders above it are made.
        data: Its content.

    Raises:
        FastcilError: The file can't be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder, "a"), b"whole")
        ...     Path(folder, "a").read_bytes(), os.listdir(folder)
        (b'whole', ['a'])
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise FastcilError(f"'{path}' can't be written: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
