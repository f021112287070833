"""Sizes from headers are those of the decoded images."""

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from fastcil.files.decode import decode_image, shrink, shrunk_size
from fastcil.files.decoder import read_stretch
from fastcil.files.headers import image_size


def block(marker, content):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def exif(orientation, order="<", kind=3, before=()):
    """An EXIF block; ``before`` are tags in front of the orientation."""
    tags = [*((tag, 4, 7) for tag in before), (0x0112, kind, orientation)]
    rows = b"".join(
        struct.pack(f"{order}HHI", tag, t, 1) + struct.pack(f"{order}{'HH' if t == 3 else 'I'}", *v)
        for tag, t, v in ((tag, t, (v, 0) if t == 3 else (v,)) for tag, t, v in tags)
    )
    head = {"<": b"II*\0", ">": b"MM\0*"}[order]
    ifd = struct.pack(f"{order}IH", 8, len(tags)) + rows + bytes(4)
    return block(0xE1, b"Exif\0\0" + head + ifd)


def jpeg(*blocks, mode="RGB", size=(10, 6), **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "jpeg", **options)
    data = file.getvalue()
    return data[:2] + b"".join(blocks) + data[2:]


def png(orientation=None):
    file, tags = io.BytesIO(), Image.Exif()
    if orientation is not None:
        tags[0x0112] = orientation
    Image.new("RGB", (10, 6)).save(file, "png", exif=tags)
    return file.getvalue()


XMP = block(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>")
TOLD = {
    **{f"{o}{order}": jpeg(exif(o, order)) for o in range(10) for order in "<>"},
    "none": jpeg(),
    "grey": jpeg(mode="L"),
    "cmyk": jpeg(mode="CMYK"),
    "progressive": jpeg(exif(6), progressive=True),
    "xmp first": jpeg(XMP, exif(6)),
    "other tags": jpeg(exif(8, before=(0x0100, 0x0101))),
    "no orientation": jpeg(block(0xE1, b"Exif\0\0II*\0" + struct.pack("<IH", 8, 0) + bytes(4))),
    "an image in a block": jpeg(block(0xEC, jpeg(size=(3, 2))), exif(6)),
    "padding": jpeg(b"\xff\xff", exif(5)),
    "png": png(),
}
NOT_TOLD = {
    "two": jpeg(exif(1), exif(6)),
    "long": jpeg(exif(6, kind=4)),
    "png with exif": png(6),
    "cut": jpeg()[:100],
    "cut png": png()[:30],
    "empty": b"",
    "webp": cv2.imencode(".webp", np.zeros((6, 10, 3), np.uint8))[1].tobytes(),
    "garbage": b"\xff\xd8\xff" + bytes(100),
}


@pytest.mark.parametrize("name", TOLD)
def test_told_as_decoded(name):
    assert image_size(TOLD[name]) == decode_image(TOLD[name], "x").shape[:2]


@pytest.mark.parametrize("name", NOT_TOLD)
def test_not_told_where_it_is_not_sure(name):
    assert image_size(NOT_TOLD[name]) is None


@pytest.mark.parametrize("short_side", [1, 7, 256, None])
@pytest.mark.parametrize("size", [(500, 375), (64, 7), (7, 7), (1, 900)])
def test_shrunk_to_the_short_side_in_proportion(size, short_side):
    height, width = shrunk_size(*size, short_side)
    if short_side is None or min(size) <= short_side:
        assert (height, width) == size
    else:
        assert min(height, width) == short_side
        assert abs(height * size[1] - width * size[0]) <= max(size) / 2 + 0.5
    image = np.full((*size, 3), 9, np.uint8)
    small = shrink(image, short_side)
    assert small.shape == (height, width, 3) and (small == 9).all()
    assert (small is image) == ((height, width) == size)


def test_a_halved_image_has_the_means_of_its_pixels():
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    means = image.reshape(4, 2, 6, 2, 3).astype(float).mean((1, 3))
    assert np.abs(shrink(image, 4) - means).max() <= 0.5


def test_a_stretch_that_is_not_there(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert read_stretch(tmp_path / "a", 1, 2) == b"bc"
    with pytest.raises(OSError, match="ends before"):
        read_stretch(tmp_path / "a", 1, 3)
