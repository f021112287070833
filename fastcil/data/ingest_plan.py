"""What an ingest is going to write: every image's size and place, from the headers alone."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from fastcil.data.image_files import file_name, labelled
from fastcil.data.listing import Listing, Parts, Source, Stretch, read_source
from fastcil.data.mapped import scale_boxes
from fastcil.data.sources import load_by
from fastcil.data.store import Dataset, Examples, ImageStore
from fastcil.data.unlabelled import tree_by
from fastcil.errors import DataError
from fastcil.files.atomic import write_atomically
from fastcil.files.decode import check_side, decode_image, shrink, shrunk_size
from fastcil.files.decoder import read_stretch
from fastcil.files.headers import ENOUGH, image_size

PLAN, SIZES = "plan.json", "sizes.safetensors"
_TOGETHER = 256  # headers that a thread reads before it takes more
_THREADS = 16  # they wait for the disk rather than compute
_SAMPLED = 16


@dataclass
class Headers:
    """What the headers of a source's files said, in the order in which they were asked for.

    Args:
        digests: Of each part's list of files, with their sizes and times.
        sizes: Heights and widths as decoded, int64 [M, 2]; zeros where a file is bad.
        bad: Number of a file -> what is wrong with it.
    """

    digests: list[str] = field(default_factory=list)
    sizes: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    bad: dict[int, str] = field(default_factory=dict)


class ChangedError(DataError):
    """A source is not what it was when its ingest was planned."""


class HeaderReader:
    """Reads headers where `fastcil.data.image_files.read_files` reads images.

    Its examples have the images' sizes, and for offsets the numbers of their files in ``files``;
    there are no pixels.

    Args:
        known: What the headers said before; None to read them.
    """

    def __init__(self, known: Headers | None = None) -> None:
        self.known = known
        self.headers = Headers()
        self.files: list[tuple[Listing, Parts]] = []

    def __call__(
        self,
        listing: Listing,
        files: Mapping[str, Sequence[Parts]],
        names: Sequence[str],
        skip_bad: bool,
        skipped: list[str],
        read: list[str] | None = None,
    ) -> Examples:
        """The sizes of a part's images; see `fastcil.data.image_files.read_files`."""
        wanted = labelled(files, names)
        first = len(self.files)
        self.files += [(listing, file) for _, file in wanted]
        digest = _digest(listing, wanted, names)
        if self.known is None:
            sizes, bad = _measure(listing, [file for _, file in wanted])
            bad = {first + number: sentence for number, sentence in bad.items()}
        else:
            if digest not in self.known.digests[len(self.headers.digests) :][:1]:
                raise ChangedError(
                    f"{listing.path} has changed since its ingest was planned: other files, sizes"
                    f" or times; put it back as it was, or begin anew with another folder"
                )
            sizes = self.known.sizes[first : first + len(wanted)]
            bad = {n: s for n, s in self.known.bad.items() if first <= n < len(self.files)}
        joined = torch.cat([self.headers.sizes, sizes])
        self.headers = Headers([*self.headers.digests, digest], joined, {**self.headers.bad, **bad})
        if bad and not skip_bad:
            raise DataError(next(iter(bad.values())))
        skipped.extend(bad.values())
        good = torch.tensor([n for n in range(first, len(self.files)) if n not in bad])
        labels = torch.tensor([label for label, _ in wanted], dtype=torch.int64)
        if read is not None:
            read += [
                file_name(file, names[label])
                for number, (label, file) in enumerate(wanted, first)
                if number not in bad
            ]
        rows = good.long() - first
        return Examples(_blank(good.long(), sizes[rows]), labels[rows])


def _blank(offsets: Tensor, sizes: Tensor) -> ImageStore:
    """A store without pixels."""
    none = torch.empty(0, dtype=torch.uint8)
    geometry = ImageStore.from_pixels(none, sizes).geometry
    return ImageStore(none, offsets, geometry, shared=True, mapped="a plan")


def _digest(listing: Listing, wanted: Sequence[tuple[int, Parts]], names: Sequence[str]) -> str:
    """What changes if a part's files do."""
    digest = hashlib.blake2b(json.dumps(list(names)).encode(), digest_size=16)
    archive = _stamp(listing.path) if listing.path.is_file() else ""
    for label, file in wanted:
        source = listing.files[file]
        stamp = _stamp(source) if isinstance(source, Path) else archive
        digest.update(f"{label} {'/'.join(file)} {stamp}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _stamp(path: Path) -> str:
    """A file's size and time."""
    try:
        found = path.stat()
    except OSError:
        return "absent"
    return f"{found.st_size} {found.st_mtime_ns}"


def _measure(listing: Listing, files: Sequence[Parts]) -> tuple[Tensor, dict[int, str]]:
    """Heights and widths, zeros for bad files, and what is wrong with these."""
    batches = [files[start : start + _TOGETHER] for start in range(0, len(files), _TOGETHER)]

    def measure(batch: Sequence[Parts]) -> list[tuple[int, int] | str]:
        return [_size(path_of(listing, file), listing.files[file]) for file in batch]

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [size for batch in pool.map(measure, batches) for size in batch]
    bad = {number: size for number, size in enumerate(found) if isinstance(size, str)}
    rows = [(0, 0) if isinstance(size, str) else size for size in found]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2), bad


def _size(path: str, source: Source) -> tuple[int, int] | str:
    """Height and width of an image file as decoded, or what is wrong with it."""
    try:
        size = image_size(_beginning(source))
        if size is None:
            height, width = decode_image(read_source(source), path).shape[:2]
            return height, width
        check_side(*size, path)
        return size
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def _beginning(source: Source) -> bytes:
    """The first bytes of a listed file."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, Stretch):
        return read_stretch(source.file, source.first, min(source.length, ENOUGH))
    with open(source, "rb") as file:
        return file.read(ENOUGH)


def path_of(listing: Listing, file: Parts) -> str:
    """What errors call a listed file.

    Args:
        listing: What lists it.
        file: A key of its ``files``.

    Example:
        >>> path_of(Listing(Path("photos")), ("train", "a.jpg"))
        'photos/train/a.jpg'
    """
    return f"{listing.path}/{'/'.join(file)}"


@dataclass(frozen=True)
class IngestPlan:
    """What is written where.

    Args:
        data: The data set without its pixels; offsets are places in the file of pixels, sizes
            those that are stored.
        files: What each image is read from, the training images first.
        nbytes: Of all pixels.
        ends: Images up to the end of each chunk, int64 [C].
        short_side: What shorter sides are shrunk to, or None.
        chunk_nbytes: About how many bytes a chunk has.
        headers: What the plan was made from.
        unlabelled: Whether the images have no classes.
    """

    data: Dataset
    files: list[tuple[Listing, Parts]]
    nbytes: int
    ends: Tensor
    short_side: int | None
    chunk_nbytes: int
    headers: Headers
    unlabelled: bool = False

    @property
    def sizes(self) -> Tensor:
        """Heights and widths of all images as they are stored, int64 [N, 2]."""
        return torch.cat([self.data.train.images.sizes, self.data.test.images.sizes])

    @property
    def offsets(self) -> Tensor:
        """First byte of each image, int64 [N]."""
        return torch.cat([self.data.train.images.offsets, self.data.test.images.offsets])

    def save(self, folder: Path) -> None:
        """Keeps what `read_plan` needs to make the same plan again."""
        plan = {
            "short_side": self.short_side,
            "chunk_nbytes": self.chunk_nbytes,
            "digests": self.headers.digests,
            "bad": list(self.headers.bad.items()),
            "unlabelled": self.unlabelled,
        }
        write_atomically(folder / SIZES, bytes_of({"sizes": self.headers.sizes}))
        write_atomically(folder / PLAN, json.dumps(plan).encode())

    def seconds_per_image(self) -> float:
        """How long one process takes for an image, by a few of them, evenly spaced."""
        count = min(_SAMPLED, len(self.files))
        began = time.perf_counter()
        for k in range(count):
            listing, file = self.files[k * len(self.files) // count]
            try:
                data = read_source(listing.files[file])
                shrink(decode_image(data, path_of(listing, file)), self.short_side)
            except (DataError, OSError):  # told when its turn comes
                continue
        return (time.perf_counter() - began) / count


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What `IngestPlan.save` kept: ``short_side``, ``chunk_nbytes``, ``unlabelled``, ``headers``.

    Args:
        folder: Where.

    Returns:
        It, or None if no plan was kept.

    Example:
        >>> read_plan(Path("photos")) is None
        True
    """
    if not (folder / PLAN).is_file():
        return None
    plan = json.loads((folder / PLAN).read_bytes())
    sizes = tensors_of((folder / SIZES).read_bytes())["sizes"]
    plan["headers"] = Headers(plan.pop("digests"), sizes, dict(plan.pop("bad")))
    return {"unlabelled": False, **plan}


def make_plan(
    source: str,
    short_side: int | None,
    skip_bad: bool,
    chunk_nbytes: int,
    known: Headers | None = None,
    unlabelled: bool = False,
) -> IngestPlan:
    """Reads the headers of all images and gives each its place.

    Args:
        source: As `fastcil.data.load` takes it; its images must be image files.
        short_side: See `fastcil.files.decode.shrunk_size`.
        skip_bad: As there.
        chunk_nbytes: About how many bytes a chunk is to have.
        known: What the headers said before; they are not read again.
        unlabelled: Whether its images are taken as `fastcil.data.load_images` takes them.

    Raises:
        DataError: As `fastcil.data.load`; or if the source changed since its headers were read.
    """
    reader = HeaderReader(known)
    data = (tree_by if unlabelled else load_by)(source, reader, skip_bad=skip_bad)
    parts = [data.train, data.test]
    numbers = torch.cat([part.images.offsets for part in parts])
    old = torch.cat([part.images.sizes for part in parts])
    new = torch.tensor(
        [shrunk_size(height, width, short_side) for height, width in old.tolist()]
    ).reshape(-1, 2)
    nbytes = 3 * new.prod(1)
    offsets = nbytes.cumsum(0) - nbytes
    train, test = (slice(0, len(data.train)), slice(len(data.train), None))
    boxes = [
        None if its is None else scale_boxes(its, old[rows], new[rows])
        for its, rows in ((data.train_boxes, train), (data.test_boxes, test))
    ]
    placed = [
        Examples(_blank(offsets[rows], new[rows]), part.labels)
        for part, rows in zip(parts, (train, test), strict=True)
    ]
    data = replace(data, train=placed[0], test=placed[1], train_boxes=boxes[0], test_boxes=boxes[1])
    _, counts = (offsets // chunk_nbytes).unique_consecutive(return_counts=True)
    return IngestPlan(
        data,
        [reader.files[number] for number in numbers.tolist()],
        int(nbytes.sum()),
        counts.cumsum(0),
        short_side,
        chunk_nbytes,
        reader.headers,
        unlabelled,
    )
