"""Image files written once as packed pixels, for data sets that no memory holds.

Where ``OUT`` is to be, a folder ``.OUT.ingest`` grows beside it: the plan, the pixels, and a
journal of the chunks that are on the disk. It becomes ``OUT`` when it is complete, so that whatever
has that name is whole. Killed at any moment, the same call goes on with the chunks that the journal
lacks; nothing else is decoded again. The plan stays: by it the same call finds, later, whether the
source is still what it was.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcil.cores import usable_cores
from fastcil.data.assemble import assemble
from fastcil.data.ingest_plan import ChangedError, IngestPlan, make_plan, read_plan
from fastcil.data.ingest_work import JOURNAL, Decoders, Journal
from fastcil.data.mapped import PIXELS, is_mapped, read_manifest, write_rest
from fastcil.data.store import Dataset, Examples
from fastcil.errors import DataError
from fastcil.files.lock import LOCK, locked

CHUNK_NBYTES = 1 << 25
_ROW_NBYTES = 64  # of an image in the other files, at most about
_EVERY = 30.0  # seconds from one line of progress to the next


def ingest(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    short_side: int | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
    unlabelled: bool = False,
    chunk_nbytes: int = CHUNK_NBYTES,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes a data set of image files as one that is memory-mapped.

    Every image has the pixels that `fastcil.data.load` gives it, unless it is shrunk.

    Args:
        source: A folder, a tar, or a name, as `fastcil.data.load` takes it, options behind it
            included; its images must be image files.
        out: The folder to write, such as ``imagenet.store``; `fastcil.data.load` reads it.
        short_side: Images whose shorter side is longer are shrunk until it has so many pixels, as
            usual with ImageNet (256), each pixel being the mean over the area that it covers
            (OpenCV's ``INTER_AREA``); None leaves all as they are.
        workers: Processes that decode; None for as many as there are processors.
        skip_bad: As `fastcil.data.load` has it.
        unlabelled: Takes the images that `fastcil.data.load_images` takes, of a tree of any form:
            what a learned codec is trained on. They are all of one class, and none is for testing.
        chunk_nbytes: About how many bytes of pixels are decoded and noted together.
        tell: Hears what is going to be written and how far it is, a line at a time.

    Returns:
        The folder.

    Raises:
        DataError: A source that `fastcil.data.load` refuses too, or one that has changed since an
            ingest of it; an ``out`` that is there already and was made from something else; a
            disk that is too small; a process that died.

    Example:
        >>> import cv2, numpy as np, tempfile
        >>> from fastcil.data import load
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        ...         os.makedirs(f"{root}/pets/{name}")
        ...         _ = cv2.imwrite(f"{root}/pets/{name}/a.png", np.zeros((8, 6, 3), np.uint8))
        ...     data = load(ingest(f"{root}/pets", f"{root}/pets.store", workers=1))
        >>> data.train.images.sizes.tolist(), data.train.images.mapped is None
        ([[8, 6], [8, 6]], False)
    """
    for name, value in (
        ("short_side", short_side),
        ("workers", workers),
        ("chunk_nbytes", chunk_nbytes),
    ):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    source, out = os.fspath(source), Path(out)
    form = {"short_side": short_side, "unlabelled": unlabelled}
    if _is_finished(source, out, form):
        tell(f"{out}: complete already")
        return out
    folder = out.with_name(f".{out.name}.ingest")
    with locked(folder, "out", "give another folder"):
        plan = _plan(source, folder, form, skip_bad, chunk_nbytes, tell)
        journal = Journal.open(folder / JOURNAL)
        count = workers or len(usable_cores())
        _announce(plan, journal, folder, out, count, tell)
        _decode(plan, journal, folder, count, skip_bad, tell)
        data = _complete(plan, journal, folder, source, skip_bad)
        os.replace(folder, out)
        _sync(out.parent)
    _tidy(out)
    bad = f"; {len(data.skipped):,} left out, first {data.skipped[0]}" if data.skipped else ""
    tell(f"{out}: complete, {len(data.train) + len(data.test):,} images{bad}")
    return out


def _is_finished(source: str, out: Path, form: dict[str, Any]) -> bool:
    """Whether the folder is there already, made from this source in this form."""
    if not out.exists():
        return False
    if is_mapped(out):
        manifest = read_manifest(out)
        made = {"unlabelled": False, **manifest}
        if made["source"] == _place(source) and all(made[k] == v for k, v in form.items()):
            _check_unchanged(source, out)
            _tidy(out)
            return True
    raise DataError(f"out is '{out}', which is there already; give another folder, or remove it")


def _check_unchanged(source: str, out: Path) -> None:
    """Raises if what a finished folder was made from has become something else."""
    kept = read_plan(out)
    if kept is None:
        return
    try:
        make_plan(source, skip_bad=True, known=kept.pop("headers"), **kept)
    except ChangedError:
        raise
    except DataError:  # it is gone, which is what one makes the folder for
        return


def _place(source: str) -> str:
    """A source's name, the same from wherever it is given."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _plan(
    source: str,
    folder: Path,
    form: dict[str, Any],
    skip_bad: bool,
    chunk_nbytes: int,
    tell: Callable[[str], None],
) -> IngestPlan:
    """The plan kept in the folder, if the source is still the same; else a new one, kept there."""
    kept = read_plan(folder)
    if kept is not None:
        for name, value in form.items():
            if kept[name] != value:
                raise DataError(
                    f"{name} is {value}, and was {kept[name]} when '{folder}' was begun; leave it"
                    f" so, or remove that folder"
                )
        return make_plan(source, skip_bad=skip_bad, known=kept.pop("headers"), **kept)
    tell(f"{source}: reading the headers of its images")
    plan = make_plan(source, skip_bad=skip_bad, chunk_nbytes=chunk_nbytes, **form)
    plan.save(folder)
    return plan


def _announce(
    plan: IngestPlan,
    journal: Journal,
    folder: Path,
    out: Path,
    workers: int,
    tell: Callable[[str], None],
) -> None:
    """Tells what is left to do and how long it takes; refuses a disk that is too small."""
    there = folder / PIXELS
    held = there.stat().st_blocks * 512 if there.is_file() else 0
    needed = max(0, plan.nbytes - held) + _ROW_NBYTES * len(plan.files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"out is '{out}', which takes {needed:,} bytes more, and its disk has {free:,} free;"
            f" give another place, or a smaller short_side"
        )
    left = len(plan.files) - _images(plan, journal)
    each = plan.seconds_per_image() / workers
    tell(
        f"{out}: {len(plan.files):,} images, {plan.nbytes / 1e9:.3f} GB on a disk with"
        f" {free / 1e9:.1f} GB free; {left:,} left to decode, about {_span(left * each)} at"
        f" {1 / max(each, 1e-9):,.0f} images/s with {workers} process(es)"
    )


def _images(plan: IngestPlan, journal: Journal) -> int:
    """Images in the chunks that are done."""
    counts = plan.ends.diff(prepend=plan.ends.new_zeros(1))
    return int(counts[list(journal.done)].sum())


def _span(seconds: float) -> str:
    """A length of time as people plan with it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _decode(
    plan: IngestPlan,
    journal: Journal,
    folder: Path,
    workers: int,
    skip_bad: bool,
    tell: Callable[[str], None],
) -> None:
    """Decodes the chunks that the journal lacks."""
    left = [chunk for chunk in range(len(plan.ends)) if chunk not in journal.done]
    if not left:
        return
    pixels = folder / PIXELS
    with open(pixels, "ab") as file:
        file.truncate(plan.nbytes)
        os.fsync(file.fileno())
    told, began, before = time.monotonic(), time.monotonic(), _images(plan, journal)

    def take(answer: dict[str, object]) -> None:
        nonlocal told
        bad = answer["bad"]
        if bad and not skip_bad:
            raise DataError(bad[0][1])  # type: ignore[index]
        journal.add(answer)
        if time.monotonic() - told > _EVERY:
            told = time.monotonic()
            done = _images(plan, journal)
            rate = (done - before) / (told - began)
            rest = _span((len(plan.files) - done) / rate)
            tell(f"{done:,} of {len(plan.files):,} images, {rate:,.0f} a second, {rest} left")

    with journal:
        Decoders(plan, pixels, min(workers, len(left))).run(iter(left), take)


def _complete(
    plan: IngestPlan, journal: Journal, folder: Path, source: str, skip_bad: bool
) -> Dataset:
    """Writes what makes the folder a data set, and gives it, without its pixels."""
    answers = [journal.done[chunk] for chunk in range(len(plan.ends))]
    first = [0, *plan.ends.tolist()]
    bad = {first[k] + n: s for k, answer in enumerate(answers) for n, s in answer["bad"]}
    turned = {
        first[k] + n: size for k, answer in enumerate(answers) for n, *size in answer["turned"]
    }
    places = [*plan.offsets.tolist(), plan.nbytes]
    chunks = torch.tensor(
        [
            [places[end], end, answer["crc32"]]
            for end, answer in zip(plan.ends.tolist(), answers, strict=True)
        ]
    )
    data = _turn(plan.data, turned)
    if bad and not skip_bad:  # noted when they were to be left out
        raise DataError(next(iter(bad.values())))
    if bad:
        data = _without(data, bad, source, plan.unlabelled)
    about = {
        "source": _place(source),
        "short_side": plan.short_side,
        "unlabelled": plan.unlabelled,
    }
    write_rest(folder, data, plan.nbytes, chunks, about)
    return data


def _turn(data: Dataset, turned: dict[int, list[int]]) -> Dataset:
    """With the sizes of images that turned out otherwise than their headers said."""
    for place, (height, width) in turned.items():
        part, row = (data.train, place) if place < len(data.train) else (data.test, place)
        row -= 0 if part is data.train else len(data.train)
        part.images.geometry[row] = torch.tensor([height, width, 0, 0, height, width, 0, 0]).short()
    return data


def _without(data: Dataset, bad: dict[int, str], source: str, unlabelled: bool) -> Dataset:
    """Without the images that did not decode, and classes that have none any more."""
    kept = torch.ones(len(data.train) + len(data.test), dtype=torch.bool)
    kept[list(bad)] = False
    train, test = kept.split([len(data.train), len(data.test)])
    if unlabelled:
        skipped = (*data.skipped, *bad.values())
        return replace(data, train=data.train.view(train), skipped=skipped)
    files = data.train_files
    if files is not None:
        files = tuple(f for f, keep in zip(files, train.tolist(), strict=True) if keep)
    whole = assemble(
        data.name,
        source,
        data.train.view(train),
        data.test.view(test),
        data.class_names,
        ("train", "test"),
        True,
        [*data.skipped, *bad.values()],
        files,
    )
    return replace(
        whole,
        train_boxes=_rows(data.train_boxes, data.train, whole.train),
        test_boxes=_rows(data.test_boxes, data.test, whole.test),
    )


def _rows(boxes: Tensor | None, before: Examples, after: Examples) -> Tensor | None:
    """The boxes of the images that are left, which their offsets tell."""
    if boxes is None:
        return None
    return boxes[torch.searchsorted(before.images.offsets, after.images.offsets)]


def _sync(folder: Path) -> None:
    """Waits until what a folder is said to hold is on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _tidy(out: Path) -> None:
    """Removes what only the ingest needed."""
    for name in (JOURNAL, LOCK):
        with suppress(OSError):
            (out / name).unlink(missing_ok=True)
