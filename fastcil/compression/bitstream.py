"""The container of a coded image: what stands before and after the range coder's bytes."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcil.compression.errors import BitstreamError
from fastcil.errors import FastcilError

MAGIC = b"fcl"
VERSION = 1
MAX_PIXELS = 1 << 24
MAX_SIDE = (1 << 16) - 1
HASH_NBYTES = 8
_HEAD = struct.Struct("<3sB8sf")
_SIZE = struct.Struct("<HH")
_CHECK = struct.Struct("<I")
_FIXED_NBYTES = _HEAD.size + _SIZE.size + 2 * _CHECK.size


@dataclass(frozen=True)
class Head:
    """What the streams of one store have in common, 16 bytes.

    ====== ======= ==================================================================
    bytes  type    meaning
    ====== ======= ==================================================================
    0-2    ASCII   ``fcl``
    3      uint8   version of the format, 1
    4-11   bytes   first 8 of the SHA-256 of entropy model and tables
    12-15  float32 lambda, little-endian
    ====== ======= ==================================================================

    The version stands for all that says what the bytes mean: the container, the range coder
    (that of constriction 0.5, whose bytes change only with a version that says so) with its 24 bits
    of precision, escapes, and the order of latents. Another coder would be another version. What
    probabilities are is the hash's.

    Eight bytes of hash are for telling models apart, not for security: any two models share them
    once in 2^64, and even of a million models some two do once in 10^7.

    Args:
        entropy_hash: 8 bytes.
        lmbda: Trade-off that the image was coded at, positive; it is kept as a float32.

    Raises:
        FastcilError: A hash of another length, or a lambda that is not positive and finite.

    Example:
        >>> head = Head(bytes(8), 128.0)
        >>> len(head.pack()), Head.parse(head.pack()) == head
        (16, True)
    """

    entropy_hash: bytes
    lmbda: float

    def __post_init__(self) -> None:
        if len(self.entropy_hash) != HASH_NBYTES:
            raise FastcilError(
                f"entropy_hash has {len(self.entropy_hash)} bytes; it must have {HASH_NBYTES}."
            )
        with np.errstate(over="ignore"):
            kept = float(np.float32(self.lmbda))
        if not (math.isfinite(kept) and kept > 0):
            raise FastcilError(
                f"lmbda is {self.lmbda}; it must be positive and finite as a float32."
            )
        object.__setattr__(self, "lmbda", kept)

    def pack(self) -> bytes:
        """Its 16 bytes."""
        return _HEAD.pack(MAGIC, VERSION, self.entropy_hash, self.lmbda)

    @classmethod
    def parse(cls, data: bytes) -> Head:
        """The head at the start of some bytes.

        Raises:
            BitstreamError: Too few bytes, another magic or version, or an impossible lambda.
        """
        if len(data) < _HEAD.size:
            raise BitstreamError(
                f"The stream has {len(data)} bytes; its head alone has {_HEAD.size}."
            )
        magic, version, entropy_hash, lmbda = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise BitstreamError(
                f"The stream starts with {magic!r} instead of {MAGIC!r}; it is not one of "
                f"fastcil's learned codec."
            )
        if version != VERSION:
            raise BitstreamError(
                f"The stream has format version {version}; this fastcil reads version {VERSION}."
            )
        if not (math.isfinite(lmbda) and lmbda > 0):
            raise BitstreamError(f"The stream's lambda is {lmbda}; it must be positive and finite.")
        return cls(entropy_hash, lmbda)


@dataclass(frozen=True)
class Bitstream:
    """One coded image.

    As a file (`pack`) it is the head, the height and width (uint16 each, little-endian), the check
    (uint32), the payload, and the CRC-32 of all these (uint32): 28 bytes and the payload. The
    payload is one run of a range coder through all latents, so that it ends where the file's last
    four bytes start, and no lengths are needed.

    In a store that keeps the head once and sizes of its own (`pack_body`) it is the check and the
    payload: 4 bytes more than the payload.

    The CRC-32 tells damaged bytes before anything is decoded. The check is the CRC-32 of head,
    size and decoded symbols (int32, little-endian, latent after latent): it tells whether the
    decoder has come to the encoder's symbols, which another machine's rounding can prevent.

    Args:
        head: The head.
        height: Rows of the image, 1 to 65,535.
        width: Columns, likewise.
        check: The check, by `symbol_check`.
        payload: The range coder's bytes.

    Raises:
        FastcilError: A side outside 1 to 65,535.

    Example:
        >>> stream = Bitstream(Head(bytes(8), 128.0), 24, 32, 7, b"payload")
        >>> len(stream.pack()), len(stream.pack_body())
        (35, 11)
        >>> Bitstream.parse(stream.pack()) == stream
        True
        >>> Bitstream.parse_body(stream.pack_body(), stream.head, 24, 32) == stream
        True
    """

    head: Head
    height: int
    width: int
    check: int
    payload: bytes

    def __post_init__(self) -> None:
        check_size(self.height, self.width)

    def pack(self) -> bytes:
        """The bytes of a file."""
        data = self.head.pack() + _SIZE.pack(self.height, self.width) + self.pack_body()
        return data + _CHECK.pack(zlib.crc32(data))

    def pack_body(self) -> bytes:
        """The bytes to keep beside a head and a size that are kept elsewhere."""
        return _CHECK.pack(self.check) + self.payload

    @classmethod
    def parse(cls, data: bytes, max_pixels: int = MAX_PIXELS) -> Bitstream:
        """The stream in a file's bytes, of which nothing is decoded yet.

        Args:
            data: The bytes, from anywhere.
            max_pixels: Larger images are refused: decoding takes memory in proportion to the size
                that a stream claims, which a few bytes can do.

        Raises:
            TypeError: data is not bytes.
            BitstreamError: Bytes that are no such stream, that are damaged, or that claim an
                impossible size.
        """
        data = as_bytes(data)
        head = Head.parse(data)
        if len(data) < _FIXED_NBYTES:
            raise BitstreamError(
                f"The stream has {len(data)} bytes, of at least {_FIXED_NBYTES}; it is cut off."
            )
        (crc,) = _CHECK.unpack_from(data, len(data) - _CHECK.size)
        if crc != zlib.crc32(data[: -_CHECK.size]):
            raise BitstreamError("The stream's CRC-32 does not fit its bytes; it is damaged.")
        height, width = _SIZE.unpack_from(data, _HEAD.size)
        body = data[_HEAD.size + _SIZE.size : -_CHECK.size]
        return cls.parse_body(body, head, height, width, max_pixels)

    @classmethod
    def parse_body(
        cls, data: bytes, head: Head, height: int, width: int, max_pixels: int = MAX_PIXELS
    ) -> Bitstream:
        """The stream of which a store keeps the head and the size elsewhere.

        Args:
            data: What `pack_body` gave.
            head: The stream's head.
            height: Rows of the image.
            width: Columns.
            max_pixels: As in `parse`.

        Raises:
            TypeError: data is not bytes.
            BitstreamError: Too few bytes, or an impossible size.
        """
        data = as_bytes(data)
        if len(data) < _CHECK.size:
            raise BitstreamError(
                f"The stream's body has {len(data)} bytes, of at least {_CHECK.size}; it is cut "
                f"off."
            )
        if min(height, width) < 1 or height * width > max_pixels:
            raise BitstreamError(
                f"The stream claims an image of {height} x {width} pixels; it must have 1 to "
                f"{max_pixels} (max_pixels)."
            )
        (check,) = _CHECK.unpack_from(data)
        return cls(head, height, width, check, data[_CHECK.size :])

    def check_hash(self, known: bytes) -> None:
        """Refuse a stream of another entropy model.

        Args:
            known: The hash of the one there is.

        Raises:
            BitstreamError: The stream's is another.
        """
        if self.head.entropy_hash != known:
            raise BitstreamError(
                f"The stream was coded with the entropy model {self.head.entropy_hash.hex()}; this "
                f"codec has {known.hex()}, so load the model that the stream was coded with."
            )

    def facts(self) -> dict[str, Any]:
        """What the stream says of itself.

        Example:
            >>> Bitstream(Head(bytes(8), 128.0), 24, 32, 7, b"payload").facts()["bits_per_pixel"]
            0.3645833333333333
        """
        nbytes = _FIXED_NBYTES + len(self.payload)
        return {
            "format_version": VERSION,
            "entropy_hash": self.head.entropy_hash.hex(),
            "lmbda": self.head.lmbda,
            "height": self.height,
            "width": self.width,
            "nbytes": nbytes,
            "payload_nbytes": len(self.payload),
            "bits_per_pixel": 8 * nbytes / (self.height * self.width),
            "check": f"{self.check:08x}",
        }


def inspect(data: bytes, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """What a stream says of itself; needs no model.

    Args:
        data: A file's bytes.
        max_pixels: As in `Bitstream.parse`.

    Returns:
        ``format_version, entropy_hash`` (hex), ``lmbda, height, width, nbytes, payload_nbytes,
        bits_per_pixel`` (of the whole file) and ``check`` (hex).

    Raises:
        BitstreamError: As in `Bitstream.parse`.

    Example:
        >>> facts = inspect(Bitstream(Head(bytes(8), 128.0), 24, 32, 7, b"payload").pack())
        >>> facts["lmbda"], facts["nbytes"], facts["check"]
        (128.0, 35, '00000007')
    """
    return Bitstream.parse(data, max_pixels).facts()


def symbol_check(head: Head, height: int, width: int, symbols: Iterable[NDArray[np.int32]]) -> int:
    """The check of a stream: CRC-32 of its head, its size and its symbols.

    Args:
        head: The head.
        height: Rows of the image.
        width: Columns.
        symbols: int32 [N] of each latent, in the order in which they are coded.

    Example:
        >>> symbol_check(Head(bytes(8), 128.0), 24, 32, [np.zeros(3, np.int32)])
        21568261
    """
    check_size(height, width)
    crc = zlib.crc32(head.pack() + _SIZE.pack(height, width))
    for latent in symbols:
        crc = zlib.crc32(latent.astype("<i4").tobytes(), crc)
    return crc


def check_size(height: int, width: int) -> None:
    """Refuse an image that the container has no room for."""
    for name, side in (("height", height), ("width", width)):
        if not 1 <= side <= MAX_SIDE:
            raise FastcilError(f"{name} is {side}; a stream can say 1 to {MAX_SIDE}.")


def as_bytes(data: Any) -> bytes:
    """Bytes of what holds bytes: ``bytes``, ``bytearray``, ``memoryview`` or a uint8 array."""
    try:
        return bytes(memoryview(data))
    except (TypeError, BufferError) as error:
        raise TypeError(
            f"data is {type(data).__name__}; it must be bytes, or what NumPy or Python view so."
        ) from error
