"""Rate and distortion of codecs, measured on the files that they really write."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from fastcil.compression.anchors import ANCHORS
from fastcil.compression.bitstream import Bitstream
from fastcil.compression.codec import ImageCodec
from fastcil.compression.conditioning import check_range
from fastcil.compression.errors import BitstreamError
from fastcil.compression.quality import ms_ssim, ms_ssim_available, psnr
from fastcil.data import ImageStore
from fastcil.errors import FastcilError


@dataclass(frozen=True)
class Measured:
    """One image, once through a codec.

    Args:
        name: The image.
        height: Rows.
        width: Columns.
        nbytes: Size of the whole file, its header too.
        psnr: In dB, of 8-bit RGB; infinite where the image came back as it was.
        ms_ssim: None where a side is shorter than 161 pixels, or nothing measures it here.
    """

    name: str
    height: int
    width: int
    nbytes: int
    psnr: float
    ms_ssim: float | None

    @property
    def bpp(self) -> float:
        """Bits per pixel of the file."""
        return 8 * self.nbytes / (self.height * self.width)


@dataclass(frozen=True)
class Point:
    """A codec at one setting: figures of each image, and their means.

    Args:
        setting: λ, or a format's quality.
        images: In the order of the data.
        encode_seconds: Per image, mean; None where files were there already.
        decode_seconds: Per image, mean.

    Example:
        >>> images = (Measured("a", 8, 8, 40, 30.0, None), Measured("b", 4, 8, 40, 34.0, None))
        >>> point = Point(64.0, images, None, 0.1)
        >>> point.bpp, point.psnr, point.ms_ssim
        (7.5, 32.0, None)
    """

    setting: float
    images: tuple[Measured, ...]
    encode_seconds: float | None
    decode_seconds: float

    @property
    def bpp(self) -> float:
        """Mean over images, each counting the same."""
        return fmean(image.bpp for image in self.images)

    @property
    def psnr(self) -> float:
        """Mean over images of each one's PSNR, not the PSNR of the mean error."""
        return fmean(image.psnr for image in self.images)

    @property
    def ms_ssim(self) -> float | None:
        """Mean over the images that have one; None where none has."""
        known = [image.ms_ssim for image in self.images if image.ms_ssim is not None]
        return fmean(known) if known else None


@dataclass(frozen=True)
class Photos:
    """Images to measure on, with their names.

    Args:
        names: One per image, none twice.
        images: Raw.

    Raises:
        FastcilError: No image; names of another number; a name that is there twice.

    Example:
        >>> import torch
        >>> store = ImageStore.from_batch(torch.zeros(2, 4, 6, 3, dtype=torch.uint8))
        >>> len(Photos(("a", "b"), store))
        2
    """

    names: tuple[str, ...]
    images: ImageStore

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.images):
            raise FastcilError(
                f"names has {len(self.names)} entries and images {len(self.images)}; both must "
                f"have one per image, and one at least."
            )
        if len(set(self.names)) < len(self.names):
            twice = next(name for name, count in Counter(self.names).items() if count > 1)
            raise FastcilError(f"names holds '{twice}' twice; images are told apart by name.")

    def __len__(self) -> int:
        return len(self.names)


def spread(lambda_range: tuple[float, float], count: int = 4) -> tuple[float, ...]:
    """So many λ from one end of a range to the other, at equal steps of their logarithm.

    Args:
        lambda_range: The smallest and the largest.
        count: How many, at least 1; of one it is the middle, and of a range that is one λ there
            is one.

    Raises:
        FastcilError: No range, or a count below 1.

    Example:
        >>> [round(lmbda) for lmbda in spread((32.0, 1024.0))]
        [32, 102, 323, 1024]
    """
    low, high = check_range("lambda_range", lambda_range)
    if count < 1:
        raise FastcilError(f"count is {count}; it must be at least 1.")
    if count == 1 or low == high:
        return (math.sqrt(low * high),)
    return tuple(low * (high / low) ** (k / (count - 1)) for k in range(count))


def evaluate_codec(
    codec: ImageCodec, photos: Photos, lmbda: float
) -> tuple[Point, dict[str, bytes]]:
    """Rate and distortion of a learned codec at one λ: every image is coded and decoded for real.

    Args:
        codec: The codec.
        photos: The images.
        lmbda: The trade-off.

    Returns:
        The point, and the files by the images' names.

    Raises:
        FastcilError: As `ImageCodec.encode` and `ImageCodec.decode`.

    Example:
        >>> import torch
        >>> from fastcil.compression.zoo import build_codec
        >>> store = ImageStore.from_batch(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
        >>> codec = ImageCodec(build_codec("hierarchical-tiny"))
        >>> point, files = evaluate_codec(codec, Photos(("black",), store), 64.0)
        >>> point.bpp == 8 * len(files["black"]) / 1024
        True
    """
    return _coded(photos, lmbda, lambda image: codec.encode(image, lmbda), codec.decode)


def evaluate_anchor(name: str, photos: Photos, quality: int) -> Point:
    """Rate and distortion of an image format at one quality.

    Args:
        name: One of `ANCHORS`.
        photos: The images.
        quality: 0 to 100.

    Raises:
        FastcilError: No such format, or it is not installed or refuses an image.

    Example:
        >>> import torch
        >>> store = ImageStore.from_batch(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
        >>> evaluate_anchor("jpeg", Photos(("black",), store), 50).psnr
        inf
    """
    if name not in ANCHORS:
        raise FastcilError(f"name is {name!r}; the anchors are {', '.join(ANCHORS)}.")
    anchor = ANCHORS[name]
    return _coded(photos, quality, lambda image: anchor.encode(image, quality), anchor.decode)[0]


def evaluate_streams(
    codec: ImageCodec, photos: Photos, files: Sequence[tuple[str, bytes]]
) -> dict[float, Point]:
    """Rate and distortion of files that are there already: how a paper measures compatibility.

    Old bitstreams keep their rate whatever becomes of the model; what moves with a new decoder is
    their PSNR (Duan et al. 2024).

    Args:
        codec: The codec to decode with.
        photos: The images that were coded.
        files: Image's name and file; those of one λ must be of different images.

    Returns:
        λ to its point, ascending, each over the images that have a file of that λ.

    Raises:
        BitstreamError: A file that the codec refuses, with its name and λ.
        FastcilError: No file; a file of no image, of another size, or that is there twice.

    Example:
        >>> import torch
        >>> from fastcil.compression.zoo import build_codec
        >>> photos = Photos(("a",), ImageStore.from_batch(torch.zeros(1, 8, 8, 3).byte()))
        >>> codec = ImageCodec(build_codec("hierarchical-tiny"))
        >>> point, made = evaluate_codec(codec, photos, 64.0)
        >>> evaluate_streams(codec, photos, [*made.items()])[64.0].psnr == point.psnr
        True
    """
    if not files:
        raise FastcilError("files is empty; pass the streams of one image at least.")
    by_rate: dict[float, dict[str, bytes]] = {}
    for name, data in files:
        if name not in photos.names:
            raise FastcilError(f"files holds '{name}', of which there is no image.")
        stream = _parsed(name, data, codec.max_pixels)
        if name in by_rate.setdefault(stream.head.lmbda, {}):
            raise FastcilError(f"files holds '{name}' twice at lambda {stream.head.lmbda:g}.")
        by_rate[stream.head.lmbda][name] = data
    return {lmbda: _decoded(codec, photos, lmbda, by_rate[lmbda]) for lmbda in sorted(by_rate)}


def _parsed(name: str, data: bytes, max_pixels: int) -> Bitstream:
    """A file's stream; what is wrong with it names the file."""
    try:
        return Bitstream.parse(data, max_pixels)
    except BitstreamError as error:
        raise BitstreamError(f"'{name}': {error}") from error


def _decoded(codec: ImageCodec, photos: Photos, lmbda: float, files: Mapping[str, bytes]) -> Point:
    """The point of files of one λ, in the order of the images."""
    found, seconds = [], 0.0
    for k, name in enumerate(photos.names):
        if name not in files:
            continue
        start = time.perf_counter()
        try:
            decoded = codec.decode(files[name])
        except BitstreamError as error:
            raise BitstreamError(f"'{name}' at lambda {lmbda:g}: {error}") from error
        seconds += time.perf_counter() - start
        found.append(_measured(name, photos.images.image(k), decoded, len(files[name])))
    return Point(lmbda, tuple(found), None, seconds / len(found))


def _coded(
    photos: Photos,
    setting: float,
    encode: Callable[[Tensor], bytes],
    decode: Callable[[bytes], Tensor],
) -> tuple[Point, dict[str, bytes]]:
    """The point of a codec, one image after the other, and its files."""
    found, files, spent = [], {}, [0.0, 0.0]
    for k, name in enumerate(photos.names):
        image = photos.images.image(k)
        start = time.perf_counter()
        files[name] = encode(image)
        between = time.perf_counter()
        decoded = decode(files[name])
        spent[0] += between - start
        spent[1] += time.perf_counter() - between
        found.append(_measured(name, image, decoded, len(files[name])))
    encoding, decoding = (seconds / len(found) for seconds in spent)
    return Point(setting, tuple(found), encoding, decoding), files


def _measured(name: str, image: Tensor, decoded: Tensor, nbytes: int) -> Measured:
    """The figures of one image."""
    if decoded.shape != image.shape:
        raise FastcilError(
            f"'{name}' is an image of {image.shape[0]} x {image.shape[1]} pixels; its file holds "
            f"one of {decoded.shape[0]} x {decoded.shape[1]}."
        )
    similarity = ms_ssim(decoded, image) if ms_ssim_available() else None
    height, width = image.shape[:2]
    return Measured(name, height, width, nbytes, psnr(decoded, image), similarity)
