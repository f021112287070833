"""Where data are looked for: the path as given, the folder FASTCIL_DATA, the cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastcil.errors import DataError

VARIABLE = "FASTCIL_DATA"


def data_folder() -> Path | None:
    """Give the folder that the environment variable FASTCIL_DATA names, if it is set.

    Returns:
        The folder, existing or not, or None.

    Example:
        >>> import os
        >>> os.environ["FASTCIL_DATA"] = "photos"
        >>> data_folder().name
        'photos'
        >>> del os.environ["FASTCIL_DATA"]
    """
    value = os.environ.get(VARIABLE)
    return Path(value).expanduser() if value else None


def cache_folder() -> Path:
    """Give the folder that downloads go to, ~/.cache/fastcil.

    Returns:
        The folder, existing or not.

    Example:
        >>> cache_folder().name
        'fastcil'
    """
    return Path.home() / ".cache" / "fastcil"


def describe_data_folder() -> str:
    """Say what FASTCIL_DATA is, for an error message.

    Returns:
        A clause such as ``FASTCIL_DATA is not set``.

    Example:
        >>> describe_data_folder().startswith("FASTCIL_DATA is")
        True
    """
    folder = data_folder()
    return f"{VARIABLE} is not set" if folder is None else f"{VARIABLE} is {folder}"


def resolve(name: str | os.PathLike[str]) -> Path:
    """Find a file or folder by its path, or under FASTCIL_DATA.

    Args:
        name: a path; a relative one that does not exist is looked for in FASTCIL_DATA.

    Returns:
        The path of something that exists.

    Raises:
        DataError: If nothing is there.

    Example:
        >>> resolve(".").is_dir()
        True
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    folder = data_folder()
    if not path.is_absolute() and folder is not None and (folder / path).exists():
        return folder / path
    raise DataError(
        f"{path} does not exist ({describe_data_folder()}); give the path of a folder, .tar or"
        ' .npz, or one of "scenes", "cifar10", "cifar100", "cub200", "food101", "imagenet",'
        ' "imagenet100", "mini-imagenet"'
    )


def look_for_folder(folders: Sequence[str]) -> Path | None:
    """Look for a folder under several names, here and in FASTCIL_DATA.

    Args:
        folders: its usual names, the likeliest first.

    Returns:
        The first that is there, or None.

    Example:
        >>> look_for_folder(["no such folder", "."])
        PosixPath('.')
    """
    places = [place for place in (Path(), data_folder()) if place is not None]
    return next((p / f for p in places for f in folders if (p / f).is_dir()), None)


def find_folder(name: str, folders: Sequence[str], wanted: str) -> Path:
    """Find the folder of a data set that goes by a name.

    Args:
        name: what was asked for.
        folders: its usual names on disk.
        wanted: what the folder is, for the error.

    Returns:
        Its path.

    Raises:
        DataError: If none of the folders is here or in FASTCIL_DATA.

    Example:
        >>> find_folder("here", ["."], "any folder").is_dir()
        True
    """
    found = look_for_folder(folders)
    if found is None:
        raise DataError(
            f"data is '{name}', but there is no folder {', '.join(folders)} here or in FASTCIL_DATA"
            f" ({describe_data_folder()}); give the path of {wanted}"
        )
    return found
