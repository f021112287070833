"""The error that fastcil raises for bad input."""

from __future__ import annotations


class FastcilError(ValueError):
    """Bad input, in one sentence: which argument, what it was, and what would do.

    Every error class of fastcil's own derives from it, and it is a ``ValueError``, so callers may
    catch either.

    Example:
        >>> try:
        ...     raise FastcilError("ratio is 0.5; it must be at least 1")
        ... except ValueError as error:
        ...     print(error)
        ratio is 0.5; it must be at least 1
    """


class CompositionError(FastcilError):
    """A method and its addons, or a codec, do not fit together; the sentence says why."""


class DataError(FastcilError):
    """Data that cannot be read or do not hold together; the sentence names the path or array."""


class RankLostError(FastcilError):
    """One of several processes that train together ended, or did not answer in time.

    What it has written is whole, and the run can be gone on with.
    """
