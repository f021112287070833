"""A part of a data set: some of its classes, and some images of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypeVar

import torch

from fastcil.data.ranks import rank_in_class
from fastcil.data.store import Dataset, Examples
from fastcil.errors import DataError

OPTIONS = ("classes", "train_per_class", "test_per_class")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Subset:
    """Which classes of a data set to take, and how many images of each.

    The classes taken are numbered anew, 0, 1, 2 ..., in ascending order of their old numbers, and
    keep their names. Of a class with n images, k are taken evenly over the data set's order,
    those at floor(i n / k) for i = 0 ... k - 1; all, if it has no more than k.

    Args:
        classes: Numbers of the classes, ascending; None for all.
        train_per_class: Training images of each class; None for all.
        test_per_class: Test images of each class; None for all.

    Example:
        >>> str(Subset((0, 1, 2, 7), train_per_class=5))
        'classes=0-2+7,train_per_class=5'
    """

    classes: tuple[int, ...] | None = None
    train_per_class: int | None = None
    test_per_class: int | None = None

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Subset:
        """Read the options `OPTIONS`.

        Args:
            options: ``classes``: text such as ``"0-49"`` or ``"3+5+7-9"``, ends included, or
                whole numbers; ``train_per_class`` and ``test_per_class``: whole numbers.

        Returns:
            The subset.

        Raises:
            DataError: If one is of another form.

        Example:
            >>> Subset.of_options({"classes": "3+5+7-9"}).classes
            (3, 5, 7, 8, 9)
        """
        classes = options.get("classes")
        counts = {name: options.get(name) for name in OPTIONS[1:]}
        for name, count in counts.items():
            if count is not None and not (_is_whole(count) and count > 0):
                raise DataError(f"{name} is {count!r}; give a whole number from 1 on")
        return cls(None if classes is None else _numbers(classes), **counts)

    def __str__(self) -> str:
        named = {name: getattr(self, name) for name in OPTIONS}
        if self.classes is not None:
            named["classes"] = _ranges(self.classes)
        return ",".join(f"{name}={value}" for name, value in named.items() if value is not None)

    def name(self, whole: str) -> str:
        """Name the part after the whole.

        Args:
            whole: name of the data set.

        Returns:
            The name with what was taken of it, as `fastcil.data.load` reads it.

        Example:
            >>> Subset((0, 1)).name("pets"), Subset().name("pets")
            ('pets:classes=0-1', 'pets')
        """
        return f"{whole}:{self}" if str(self) else whole

    def keep(self, count: int, what: str, least: int = 1) -> list[int]:
        """Tell which of a data set's classes to take.

        Args:
            count: its number of classes.
            what: the data set, for the error.
            least: how few may be taken.

        Returns:
            Their numbers, ascending.

        Raises:
            DataError: If it has not that many classes, or fewer are taken.

        Example:
            >>> Subset().keep(3, "pets"), Subset((0, 2)).keep(3, "pets")
            ([0, 1, 2], [0, 2])
        """
        if self.classes is None:
            return list(range(count))
        if self.classes[-1] >= count:
            raise DataError(
                f"classes is '{_ranges(self.classes)}', but {what} has the classes 0 to {count - 1}"
            )
        if len(self.classes) < least:
            raise DataError(
                f"classes is '{_ranges(self.classes)}', one class of {what}; take at least {least},"
                " as in classes=0-9 or classes=3+5"
            )
        return list(self.classes)

    def rows(
        self, labels: torch.Tensor, keep: Sequence[int], per_class: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the images to take.

        Args:
            labels: int64 [N], from 0 on.
            keep: the classes, from `keep`.
            per_class: images of each; None for all.

        Returns:
            Their positions, ascending, and their new labels, both int64 [M].

        Example:
            >>> Subset().rows(torch.tensor([0, 2, 2, 1, 2]), [1, 2], 2)
            (tensor([1, 2, 3]), tensor([1, 1, 0]))
        """
        lookup = torch.full((max([*keep, int(labels.max()) if len(labels) else 0]) + 1,), -1)
        lookup[torch.tensor(keep)] = torch.arange(len(keep))
        renumbered = lookup[labels]
        rows = (renumbered >= 0).nonzero().flatten()
        if per_class is not None:
            rows = rows[_spread(renumbered[rows], per_class)]
        return rows, renumbered[rows]

    def files(
        self, files: Mapping[str, Sequence[_T]], per_class: int | None
    ) -> dict[str, list[_T]]:
        """Choose among files what `rows` chooses among images.

        Args:
            files: class name to its files, in order.
            per_class: files of each; None for all.

        Returns:
            The same with as many files.

        Example:
            >>> Subset().files({"cat": ["a", "b", "c", "d"]}, 2)
            {'cat': ['a', 'c']}
        """
        return {
            name: list(mine)
            if per_class is None or len(mine) <= per_class
            else [mine[i * len(mine) // per_class] for i in range(per_class)]
            for name, mine in files.items()
        }

    def examples(
        self, examples: Examples, names: Sequence[str], what: str
    ) -> tuple[Examples, tuple[str, ...]]:
        """Take the part of some training examples.

        Args:
            examples: N examples.
            names: name of each label.
            what: what they are, for the error.

        Returns:
            The part and the names of its classes.

        Raises:
            DataError: If there is no such class.

        Example:
            >>> from fastcil.data.store import ImageStore
            >>> store = ImageStore.from_batch(torch.zeros(3, 4, 4, 3, dtype=torch.uint8))
            >>> Subset((1,)).examples(Examples(store, torch.tensor([0, 1, 1])), "ab", "x")[1]
            ('b',)
        """
        if self == Subset():
            return examples, tuple(names)
        keep = self.keep(len(names), what)
        rows, labels = self.rows(examples.labels, keep, self.train_per_class)
        return Examples(examples.images.part(rows), labels), tuple(names[k] for k in keep)

    def of(self, data: Dataset) -> Dataset:
        """Take the part of a data set.

        Args:
            data: the whole.

        Returns:
            A copy of the part, true boxes and names of files included; the whole itself if that is
            all of it.

        Raises:
            DataError: If it has no such class, or fewer than two are taken.

        Example:
            >>> from fastcil.data.store import ImageStore
            >>> store = ImageStore.from_batch(torch.zeros(3, 4, 4, 3, dtype=torch.uint8))
            >>> both = Examples(store, torch.tensor([0, 1, 2]))
            >>> part = Subset((0, 2)).of(Dataset("d", both, both, ("a", "b", "c")))
            >>> part.class_names, part.train.labels
            (('a', 'c'), tensor([0, 1]))
        """
        if self == Subset():
            return data
        keep = self.keep(len(data.class_names), f"'{data.name}'", least=2)
        parts, boxes, taken = [], [], []
        for examples, its_boxes, per_class in (
            (data.train, data.train_boxes, self.train_per_class),
            (data.test, data.test_boxes, self.test_per_class),
        ):
            rows, labels = self.rows(examples.labels, keep, per_class)
            parts.append(Examples(examples.images.part(rows), labels))
            boxes.append(None if its_boxes is None else its_boxes[rows])
            taken.append(rows)
        files = data.train_files
        return replace(
            data,
            name=self.name(data.name),
            train=parts[0],
            test=parts[1],
            class_names=tuple(data.class_names[k] for k in keep),
            train_boxes=boxes[0],
            test_boxes=boxes[1],
            train_files=None if files is None else tuple(files[k] for k in taken[0].tolist()),
        )


WHOLE = Subset()


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _numbers(classes: str | int | Iterable[int]) -> tuple[int, ...]:
    """Read ``3+5+7-9`` or whole numbers, each once, in ascending order."""
    form = "give class numbers from 0 on, each once, as in '0-49' or '3+5+7-9'"
    if isinstance(classes, str):
        found: list[int] = []
        for item in classes.split("+"):
            ends = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", item)
            low, high = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
            if high < low:
                raise DataError(f"classes is '{classes}'; {form}")
            found += range(low, high + 1)
    else:
        given = list(classes) if isinstance(classes, Iterable) else [classes]
        if not given or not all(_is_whole(k) and k >= 0 for k in given):
            raise DataError(f"classes is {classes!r}; {form}")
        found = [int(k) for k in given]
    if len(set(found)) < len(found):
        raise DataError(f"classes is {classes!r}, which names a class twice; {form}")
    return tuple(sorted(found))


def _ranges(classes: Sequence[int]) -> str:
    """Write ascending numbers as `_numbers` reads them."""
    runs: list[list[int]] = []
    for k in classes:
        if runs and k == runs[-1][1] + 1:
            runs[-1][1] = k
        else:
            runs.append([k, k])
    return "+".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _spread(labels: torch.Tensor, per_class: int) -> torch.Tensor:
    """Positions of the images at floor(i n / k) of each class, ascending, int64 [M]."""
    place = rank_in_class(labels)
    n, k = labels.bincount()[labels], per_class
    number = (place * k + n - 1) // n  # the only i whose floor(i n / k) can be this place
    taken = (n <= k) | ((number * n // k == place) & (number < k))
    return taken.nonzero().flatten()
