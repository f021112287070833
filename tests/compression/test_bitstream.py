"""The container: layout, sizes, and the refusal of anything that is not one of ours."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest

from fastcil.compression.bitstream import MAX_PIXELS, Bitstream, Head, inspect, symbol_check
from fastcil.compression.errors import BitstreamError
from fastcil.errors import FastcilError

HASH = bytes(range(8))
STREAM = Bitstream(Head(HASH, 0.1), 300, 200, 0xDEADBEEF, b"payload")
FILE = STREAM.pack()


def sealed(data: bytes) -> bytes:
    """Bytes with a CRC-32 that fits."""
    return data + struct.pack("<I", zlib.crc32(data))


def test_layout() -> None:
    wanted = b"fcl\x01" + HASH + struct.pack("<f", 0.1) + struct.pack("<HH", 300, 200)
    wanted += struct.pack("<I", 0xDEADBEEF) + b"payload"
    assert sealed(wanted) == FILE
    assert len(FILE) == 28 + len(b"payload")
    assert len(STREAM.pack_body()) == 4 + len(b"payload")


def test_golden_bytes() -> None:
    """A change here is a change of the format: it needs a new version."""
    golden = "66636c010001020304050607cdcccc3d2c01c800efbeadde7061796c6f6164"
    assert FILE[:-4].hex() == golden
    assert Bitstream.parse(FILE) == STREAM


def test_lambda_is_what_a_float32_holds() -> None:
    assert STREAM.head.lmbda == float(np.float32(0.1)) != 0.1
    assert Bitstream.parse(FILE).head.lmbda == STREAM.head.lmbda


def test_facts() -> None:
    assert inspect(FILE) == {
        "format_version": 1,
        "entropy_hash": HASH.hex(),
        "lmbda": float(np.float32(0.1)),
        "height": 300,
        "width": 200,
        "nbytes": 35,
        "payload_nbytes": 7,
        "bits_per_pixel": 8 * 35 / 60_000,
        "check": "deadbeef",
    }


@pytest.mark.parametrize("view", [bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)])
def test_anything_that_holds_bytes(view: Any) -> None:
    assert Bitstream.parse(view(FILE)) == STREAM
    assert Bitstream.parse_body(view(STREAM.pack_body()), STREAM.head, 300, 200) == STREAM


def test_the_check_depends_on_everything() -> None:
    zeros, ones = np.zeros(3, np.int32), np.ones(3, np.int32)
    head = STREAM.head
    checks = {
        symbol_check(*arguments)
        for arguments in (
            (head, 8, 9, [zeros, ones]),
            (head, 8, 9, [ones, zeros]),
            (head, 9, 8, [zeros, ones]),
            (Head(HASH, 0.2), 8, 9, [zeros, ones]),
            (Head(HASH[::-1], 0.1), 8, 9, [zeros, ones]),
            (head, 8, 9, [zeros]),
        )
    }
    assert len(checks) == 6
    # By hand, and the same however the array lies in memory.
    big = np.array([1, -2, 1 << 30], ">i4")
    data = head.pack() + struct.pack("<HH", 8, 9) + struct.pack("<3i", 1, -2, 1 << 30)
    assert symbol_check(head, 8, 9, [big]) == zlib.crc32(data)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "has 0 bytes; its head alone has 16"),
        (b"fcl", "has 3 bytes; its head alone has 16"),
        (b"\x89PNG" + FILE[4:], "starts with b'.PNG|not one of fastcil's"),
        (b"fcl\x02" + FILE[4:], "version 2; this fastcil reads version 1"),
        (FILE[:16], "has 16 bytes, of at least 28; it is cut off"),
        (FILE[:-1], "CRC-32 does not fit its bytes; it is damaged"),
        (FILE + b"\0", "CRC-32"),
        (FILE[:20] + FILE[21:], "CRC-32"),
        (sealed(FILE[:16] + b"\0\0\x01\0" + FILE[20:-4]), "image of 0 x 1 pixels"),
        (sealed(FILE[:16] + b"\xff\xff\xff\xff" + FILE[20:-4]), "65535 x 65535 .*max_pixels"),
        (sealed(FILE[:12] + b"\0\0\xc0\x7f" + FILE[16:-4]), "lambda is nan"),
        (sealed(FILE[:12] + b"\0\0\x80\x7f" + FILE[16:-4]), "lambda is inf"),
        (sealed(FILE[:12] + b"\0\0\0\x80" + FILE[16:-4]), "lambda is -0.0"),
    ],
)
def test_hostile_files(data: bytes, sentence: str) -> None:
    with pytest.raises(BitstreamError, match=sentence):
        Bitstream.parse(data)
    with pytest.raises(BitstreamError, match=sentence):
        inspect(data)


def test_every_flipped_bit_is_noticed() -> None:
    for bit in range(8 * len(FILE)):
        data = bytearray(FILE)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            Bitstream.parse(bytes(data))


def test_the_limit_on_pixels_is_the_callers() -> None:
    with pytest.raises(BitstreamError, match=r"300 x 200 pixels; it must have 1 to 59999"):
        Bitstream.parse(FILE, max_pixels=59_999)
    large = Bitstream(STREAM.head, 4096, 4097, 0, b"").pack()
    with pytest.raises(BitstreamError, match=str(MAX_PIXELS)):
        Bitstream.parse(large)
    assert Bitstream.parse(large, max_pixels=1 << 25).width == 4097


def test_bad_bodies() -> None:
    with pytest.raises(BitstreamError, match="body has 3 bytes, of at least 4"):
        Bitstream.parse_body(b"abc", STREAM.head, 8, 8)
    with pytest.raises(BitstreamError, match="image of 0 x 8 pixels"):
        Bitstream.parse_body(b"abcd", STREAM.head, 0, 8)
    with pytest.raises(BitstreamError, match="image of -3 x -8 pixels"):
        Bitstream.parse_body(b"abcd", STREAM.head, -3, -8)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="data is str"):
        Bitstream.parse("fcl")  # type: ignore[arg-type]
    with pytest.raises(FastcilError, match="entropy_hash has 32 bytes"):
        Head(bytes(32), 1.0)
    for lmbda in (0.0, -1.0, float("nan"), float("inf"), 1e39):
        with pytest.raises(FastcilError, match="lmbda is"):
            Head(HASH, lmbda)
    for side in (0, 65_536):
        with pytest.raises(FastcilError, match=f"width is {side}; a stream can say 1 to 65535"):
            Bitstream(STREAM.head, 8, side, 0, b"")
        with pytest.raises(FastcilError, match=f"height is {side}"):
            symbol_check(STREAM.head, side, 8, [])
