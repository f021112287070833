"""Few-shot class-incremental streams (Tao et al. 2020): a base session, then a few shots a class.

The base session brings all training images of its classes, every later session K images ("shots")
of each of N classes that are new ("N-way K-shot"). After each session all test images of all
classes seen so far are classified, pooled.

Which images are shots is drawn by seed, or read from published lists: one text file for each
session, `session_1.txt` (the base session's) to `session_T.txt`, a line for each training image.
A line is the image's number in the data set's training part, counted from 0 (as the lists for
CIFAR-100 have it), or its path (those for CUB-200-2011 and mini-ImageNet).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcil.data import Dataset, resolve
from fastcil.data.places import describe_data_folder
from fastcil.data.ranks import rank_in_class
from fastcil.errors import DataError, FastcilError

LISTED = "few:"
_DRAWN = re.compile(r"few-(\d+)-(\d+)x(\d+)")
_SESSION = re.compile(r"session_([1-9]\d*)\.txt")

Sessions = list[tuple[tuple[int, ...], Tensor | None]]
"""Of each session its classes, and its images; None for all images of its classes."""


def is_few_shot(text: str) -> bool:
    """Whether a scenario's name asks for few-shot sessions.

    Example:
        >>> is_few_shot("few-60-5x5"), is_few_shot("few:lists/cub200"), is_few_shot("lfs-5")
        (True, True, False)
    """
    return text.startswith(("few-", LISTED))


def session_sizes(text: str, classes: int) -> list[int]:
    """How many new classes each session of ``few-B-NxK`` brings.

    Args:
        text: B base classes, then N-way K-shot sessions until the classes are used up.
        classes: Of the data set.

    Returns:
        B, and N for each session after it.

    Raises:
        FastcilError: Another form, or classes that don't come out even.

    Example:
        >>> session_sizes("few-60-5x5", 100)
        [60, 5, 5, 5, 5, 5, 5, 5, 5]
    """
    base, ways, _ = _numbers(text)
    rest = classes - base
    if rest < ways or rest % ways:
        left = f"leaves {rest}" if rest > 0 else "leaves none"
        raise FastcilError(
            f"scenario is '{text}', which of {classes} classes {left} after the base session; "
            f"{ways}-way sessions need a multiple of {ways}."
        )
    return [base] + [ways] * (rest // ways)


def draw_sessions(text: str, dataset: Dataset, order: Sequence[int], seed: int | None) -> Sessions:
    """The sessions of ``few-B-NxK``, their shots drawn by seed.

    All training images are shuffled by numpy's legacy generator with ``seed`` (None leaves them in
    order), and the shots of a class are the first K of its images there. So they depend on neither
    the order of classes nor B and N, and fewer shots of the same seed are among more of them.

    Args:
        text: The scenario's name.
        dataset: Whose training images are drawn.
        order: Its labels in learning order.
        seed: Of the shuffle, or None.

    Raises:
        FastcilError: As `session_sizes`, or a class that has fewer images than shots are asked for.

    Example:
        >>> from fastcil.data import Examples, ImageStore
        >>> store = ImageStore.from_batch(np.zeros((6, 4, 4, 3), dtype=np.uint8))
        >>> every = Examples(store, torch.tensor([0, 0, 1, 1, 2, 2]))
        >>> draw_sessions("few-1-1x1", Dataset("d", every, every, ("a", "b", "c")), [2, 0, 1], None)
        [((2,), None), ((0,), tensor([0])), ((1,), tensor([2]))]
    """
    labels = dataset.train.labels.cpu()
    shots = _numbers(text)[2]
    counts = torch.bincount(labels, minlength=len(dataset.class_names)).tolist()
    count = len(labels)
    shuffled = torch.from_numpy(
        np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)
    )
    drawn = shuffled[rank_in_class(labels[shuffled]) < shots].sort().values
    sessions: Sessions = []
    start = 0
    for size in session_sizes(text, len(order)):
        classes = tuple(order[start : start + size])
        start += size
        if not sessions:
            sessions.append((classes, None))
            continue
        for label in classes:
            if counts[label] < shots:
                raise FastcilError(
                    f"scenario is '{text}', but class '{dataset.class_names[label]}' of "
                    f"'{dataset.name}' has {counts[label]} training "
                    f"image{'s' * (counts[label] != 1)}, fewer than {shots} shots; ask for "
                    f"{counts[label]}, or leave the class out."
                )
        sessions.append((classes, drawn[torch.isin(labels[drawn], torch.tensor(classes))]))
    return sessions


def _numbers(text: str) -> tuple[int, int, int]:
    """Base classes, ways and shots."""
    match = _DRAWN.fullmatch(text)
    if match is None or not all(int(number) for number in match.groups()):
        online = text.endswith("-online")
        raise FastcilError(
            f"scenario is '{text}'; "
            + (
                "a few-shot session passes over its shots many times, so leave '-online' away."
                if online
                else "use 'few-B-NxK', as in 'few-60-5x5': 60 base classes, then 5-way 5-shot "
                "sessions."
            )
        )
    base, ways, shots = (int(number) for number in match.groups())
    return base, ways, shots


def read_sessions(text: str, dataset: Dataset) -> Sessions:
    """The sessions that published lists name, ``few:FOLDER``.

    A session's classes are those of the images that it lists, learned in ascending order of the
    data set's labels, however the list is shuffled. Where lines are paths, an image is meant whose
    path is the end of the line's, from the folder of its class on (or, where the images of all
    classes lie in one folder, its name); or the other way round. Empty lines are passed over.

    Args:
        text: ``few:`` and a folder that holds ``session_1.txt`` to ``session_T.txt``; a relative
            one that does not exist is looked for under FASTCIL_DATA.
        dataset: The data set that the lists are of.

    Raises:
        FastcilError: A list that is missing or empty, an image that is not there, is listed twice
            or is not the only one that a line may mean, or a class that an earlier session
            brought.
    """
    labels = dataset.train.labels.tolist()
    images = _Images(dataset)
    brought: dict[int, int] = {}
    sessions: Sessions = []
    for number, file in enumerate(_session_files(text), 1):
        chosen: dict[int, None] = {}
        for row, line in _lines(file):
            place = images.find(line, f"line {row} of {file}")
            if place in chosen:
                raise FastcilError(
                    f"line {row} of {file} lists '{line}' again; an image is one shot of a session."
                )
            before = brought.setdefault(labels[place], number)
            if before != number:
                raise FastcilError(
                    f"line {row} of {file} is '{line}', an image of class "
                    f"'{dataset.class_names[labels[place]]}', which session_{before}.txt brought; "
                    f"a class comes in one session."
                )
            chosen[place] = None
        if not chosen:
            raise FastcilError(f"{file} lists no image; give a line for each one.")
        classes = sorted({labels[place] for place in chosen})
        sessions.append((tuple(classes), torch.tensor(sorted(chosen))))
    return sessions


def _session_files(text: str) -> list[Path]:
    """The lists, in the order of their numbers."""
    name = text.removeprefix(LISTED)
    form = "give the folder that holds session_1.txt, session_2.txt and so on"
    try:
        folder = resolve(name) if name else None
    except DataError:
        folder = None
    if folder is None or not folder.is_dir():
        raise FastcilError(
            f"scenario is '{text}', but there is no folder '{name}' ({describe_data_folder()}); "
            f"{form}."
        )
    matches = (_SESSION.fullmatch(path.name) for path in folder.iterdir())
    found = {int(match[1]): folder / match[0] for match in matches if match}
    last = max([2, *found])
    for number in range(1, last + 1):
        if number not in found:
            raise FastcilError(
                f"scenario is '{text}', but {folder} has no session_{number}.txt; {form}, without "
                f"a gap."
            )
    return [found[number] for number in range(1, last + 1)]


def _lines(file: Path) -> list[tuple[int, str]]:
    """Number and text of the lines that are not empty."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FastcilError(f"{file} cannot be read as text; get it again.") from error
    return [(row, line.strip()) for row, line in enumerate(lines, 1) if line.strip()]


class _Images:
    """Finds training images by number, or by the path that a list has."""

    def __init__(self, dataset: Dataset) -> None:
        self.name, self.count = dataset.name, len(dataset.train)
        self.files = dataset.train_files
        self._by_end: dict[str, list[int]] | None = None

    def find(self, line: str, where: str) -> int:
        """Position in the training part.

        Args:
            line: What the list has.
            where: Which line it is, for errors.
        """
        if line.isdecimal():
            if int(line) >= self.count:
                raise FastcilError(
                    f"{where} is {line}, but '{self.name}' has training images 0 to "
                    f"{self.count - 1}; the lists are of another data set, or of all of this one."
                )
            return int(line)
        if self.files is None:
            raise FastcilError(
                f"{where} is '{line}', but the images of '{self.name}' are no files; give lists of "
                f"numbers, or data that are read from image files."
            )
        found = self._named(line)
        if len(found) != 1:
            several = [self.files[k] for k in found[:2]]
            what = f"may be {' or '.join(several)}" if found else "is no training image"
            raise FastcilError(
                f"{where} is '{line}', which {what} of '{self.name}'; the lists are of another "
                f"data set, or its files are named otherwise."
            )
        return found[0]

    def _named(self, line: str) -> list[int]:
        """Images of which the shorter path, the line's or theirs, is the end of the other."""
        assert self.files is not None
        if self._by_end is None:
            self._by_end = {}
            for place, file in enumerate(self.files):
                for end in _ends(file):
                    self._by_end.setdefault(end, []).append(place)
        ends = ((end, self._by_end.get(end, ())) for end in _ends(line))
        return [k for end, found in ends for k in found if end in (line, self.files[k])]


def _ends(path: str) -> list[str]:
    """The path, and what is left of it without its first folders, longest first."""
    parts = path.split("/")
    return ["/".join(parts[k:]) for k in range(len(parts))]
