"""The error of bytes that are not a stream of the learned codec, or not of this one."""

from __future__ import annotations

from fastcil.errors import FastcilError


class BitstreamError(FastcilError):
    """A stream that is damaged, or that another version or another model has written."""
