"""What every reader ends with: labels and classes that hold together, or one sentence why not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastcil.data.store import Dataset, Examples, ImageStore
from fastcil.errors import DataError


def check_labels(
    labels: torch.Tensor,
    classes: int | None,
    where: str,
    skip_bad: bool,
    skipped: list[str],
) -> torch.Tensor:
    """Find the labels that are in range.

    Args:
        labels: integers [N].
        classes: number of classes; None where the labels themselves tell.
        where: what holds the labels, for the error.
        skip_bad: leave out what is out of range and add it to `skipped`.
        skipped: gains a line for each label left out.

    Returns:
        Positions of the good labels, int64 [M].

    Raises:
        DataError: If a label is negative or not below `classes`, and `skip_bad` is false.

    Example:
        >>> check_labels(torch.tensor([0, 3, 1]), 2, "y", skip_bad=True, skipped=[])
        tensor([0, 2])
    """
    bad = labels < 0
    if classes is not None:
        bad |= labels >= classes
    rows = bad.nonzero().flatten().tolist()
    known = "start at 0" if classes is None else f"are 0 to {classes - 1}"
    for row in rows:
        sentence = f"{where}[{row}] is {int(labels[row])}, out of range; labels {known}"
        if not skip_bad:
            more = f" ({len(rows) - 1} more are out of range)" if len(rows) > 1 else ""
            raise DataError(sentence + more)
        skipped.append(sentence)
    return (~bad).nonzero().flatten()


def make_examples(
    images: ImageStore,
    labels: torch.Tensor,
    classes: int | None,
    where: str,
    skip_bad: bool,
    skipped: list[str],
) -> Examples:
    """Put images and labels together, without the rows whose label is out of range.

    Args:
        images: N images.
        labels: integers [N].
        classes: number of classes; None where the labels themselves tell.
        where: what holds the labels, for the error.
        skip_bad: leave out what is out of range and add it to `skipped`.
        skipped: gains a line for each label left out.

    Returns:
        The examples.

    Raises:
        DataError: If a label is out of range and `skip_bad` is false.

    Example:
        >>> store = ImageStore.from_batch(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
        >>> len(make_examples(store, torch.tensor([0, 1]), 2, "y", False, []))
        2
    """
    good = check_labels(labels, classes, where, skip_bad, skipped)
    if len(good) < len(labels):
        images, labels = images.part(good), labels[good]
    return Examples(images, labels.to(torch.int64))


def class_count(labels: torch.Tensor, where: str) -> int:
    """Count the classes of labels that must be 0, 1, 2 ... without a gap.

    Args:
        labels: non-negative integers [N].
        where: what holds the labels, for the error.

    Returns:
        The largest label plus one.

    Raises:
        DataError: If a number below the largest label does not occur.

    Example:
        >>> class_count(torch.tensor([1, 0, 1]), "y_train")
        2
    """
    present = labels.unique()  # sorted
    gaps = (present != torch.arange(len(present))).nonzero().flatten()
    if len(gaps):
        first = int(gaps[0])
        raise DataError(
            f"{where} has no label {first} but has label {int(present[first])}; labels number the"
            " classes 0, 1, 2 ... without a gap"
        )
    return len(present)


def keep_classes(examples: Examples, keep: Sequence[int]) -> Examples:
    """Leave only some classes and number them anew.

    Args:
        examples: N examples.
        keep: labels to keep, in their new order.

    Returns:
        The examples of these classes, labelled 0 to len(keep) - 1.

    Example:
        >>> store = ImageStore.from_batch(torch.zeros(3, 4, 4, 3, dtype=torch.uint8))
        >>> keep_classes(Examples(store, torch.tensor([0, 2, 1])), [1, 2]).labels
        tensor([1, 0])
    """
    wanted = torch.tensor(keep, dtype=torch.int64)
    match = examples.labels[:, None] == wanted  # [N, K]
    rows = match.any(1).nonzero().flatten()
    return Examples(examples.images.part(rows), match[rows].int().argmax(1))


def assemble(
    name: str,
    origin: str,
    train: Examples,
    test: Examples,
    class_names: Sequence[str],
    parts: tuple[str, str],
    skip_bad: bool,
    skipped: Sequence[str],
    train_files: Sequence[str] | None = None,
) -> Dataset:
    """Make a Dataset of two parts in which every class has images of both.

    Args:
        name: of the data set.
        origin: its path or a description, for errors.
        train: training examples.
        test: test examples.
        class_names: name of each label.
        parts: what the source calls the two parts, such as ``("train", "test")``.
        skip_bad: leave out a class that lacks a part instead of raising.
        skipped: what the reader left out before.
        train_files: what each training image is called, if it is a file.

    Returns:
        The data set; with classes left out, the others are numbered anew in the same order.

    Raises:
        DataError: If a class lacks a part and `skip_bad` is false, if two classes share a name,
            or if fewer than two classes are left.

    Example:
        >>> store = ImageStore.from_batch(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
        >>> both = Examples(store, torch.tensor([0, 1]))
        >>> data = assemble("d", "d", both, both, ("cat", "dog"), ("train", "test"), False, ())
        >>> data.class_names
        ('cat', 'dog')
    """
    check_names(class_names, origin)
    skipped = list(skipped)
    have = [set(examples.labels.tolist()) for examples in (train, test)]
    complete = []
    for label, class_name in enumerate(class_names):
        missing = [part for part, labels in zip(parts, have, strict=True) if label not in labels]
        if not missing:
            complete.append(label)
            continue
        sentence = f"{origin}: class {class_name!r} has no image in {' or '.join(missing)}"
        if not skip_bad:
            raise DataError(
                f"{sentence}; every class needs at least one in each"
                " (skip_bad=True leaves such classes out)"
            )
        skipped.append(sentence)
    if len(complete) < 2:
        raise DataError(
            f"{origin}: {len(complete)} of its classes have images in both {parts[0]} and"
            f" {parts[1]}; at least 2 are needed"
        )
    if len(complete) < len(class_names):
        if train_files is not None:
            kept = torch.isin(train.labels, torch.tensor(complete)).tolist()
            train_files = [f for f, keep in zip(train_files, kept, strict=True) if keep]
        train, test = keep_classes(train, complete), keep_classes(test, complete)
        class_names = [class_names[label] for label in complete]
    files = None if train_files is None else tuple(train_files)
    return Dataset(name, train, test, tuple(class_names), skipped=tuple(skipped), train_files=files)


def assemble_numbered(
    name: str,
    origin: str,
    train: Examples,
    test: Examples,
    class_names: Sequence[str] | None,
    skip_bad: bool,
    skipped: Sequence[str],
) -> Dataset:
    """Assemble data whose classes may have no names: the labels' decimal forms are theirs then.

    Args:
        name: see `assemble`, as for the others.
        origin: as there.
        train: as there.
        test: as there.
        class_names: name of each label, or None.
        skip_bad: as there.
        skipped: as there.

    Returns:
        The data set.

    Raises:
        DataError: As `assemble`, or if unnamed labels leave a gap.

    Example:
        >>> store = ImageStore.from_batch(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
        >>> both = Examples(store, torch.tensor([0, 1]))
        >>> assemble_numbered("d", "d", both, both, None, False, ()).class_names
        ('0', '1')
    """
    if class_names is None:
        every = torch.cat([train.labels, test.labels])
        class_names = [str(label) for label in range(class_count(every, f"{origin}: labels"))]
    return assemble(name, origin, train, test, class_names, ("train", "test"), skip_bad, skipped)


def check_names(class_names: Sequence[str], origin: str) -> None:
    """Refuse two classes of one name, and names that are not strings.

    Args:
        class_names: name of each label.
        origin: where they are from, for the error.

    Raises:
        DataError: If a name occurs twice or is not a string.

    Example:
        >>> check_names(("cat", "dog"), "classes.txt")
    """
    seen = set()
    for name in class_names:
        if not isinstance(name, str):
            raise DataError(f"{origin}: class name {name!r} is not a string")
        if name in seen:
            raise DataError(f"{origin}: class name {name!r} occurs twice; give every class its own")
        seen.add(name)
