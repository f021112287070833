"""How large an image file will be once it is decoded, from its first bytes alone."""

from __future__ import annotations

import struct

ENOUGH = 1 << 16  # bytes that hold the headers of nearly every photo, an EXIF block included

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_ALONE = (0x01, *range(0xD0, 0xD8))  # markers of JPEG without a length
_NO_FRAME = (0xC4, 0xC8, 0xCC)  # what lies among the frame headers 0xC0 ... 0xCF and is none
_APP1, _SCAN, _END = 0xE1, 0xDA, 0xD9
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that swap height and width


def image_size(data: bytes) -> tuple[int, int] | None:
    r"""Height and width of a JPEG or PNG file as OpenCV decodes it, its EXIF orientation applied.

    Args:
        data: The file, or its first bytes.

    Returns:
        Height and width; None where the bytes do not tell for sure: another format, headers that
        are longer, damaged or contradict each other. The file then has to be decoded.

    Example:
        >>> png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBII4s", *(13, b"IHDR", 6, 4),
        ...     *(8, 2, 0, 0, 0), *(0, 0, b"IDAT"))
        >>> image_size(png), image_size(png[:20])
        ((4, 6), None)
    """
    try:
        if data.startswith(_JPEG):
            return _jpeg_size(data)
        return _png_size(data) if data.startswith(_PNG) else None
    except (struct.error, IndexError):  # they end too early
        return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    place, size, orientations = 2, None, []
    while True:
        if data[place] != 0xFF:
            return None
        while data[place] == 0xFF:  # any number of them may stand before a marker
            place += 1
        marker, place = data[place], place + 1
        if marker in _ALONE:
            continue
        if marker in (_SCAN, _END):
            break
        (length,) = struct.unpack_from(">H", data, place)
        block = data[place + 2 : place + length]
        if len(block) < length - 2:
            return None
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            if size is not None:
                return None
            height, width = struct.unpack_from(">HH", block, 1)
            size = height, width
        elif marker == _APP1 and block.startswith(_EXIF):
            orientations.append(_orientation(block[len(_EXIF) :]))
        place += length
    if size is None or 0 in size or len(orientations) > 1 or None in orientations:
        return None
    turned = bool(orientations) and orientations[0] in _TURNED
    return (size[1], size[0]) if turned else size


def _orientation(tiff: bytes) -> int | None:
    """The orientation in an EXIF block, 1 where it has none; None if it can't be read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (place,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, place)
        for number in range(entries):
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, place + 2 + 12 * number)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(f"{order}H", tiff, place + 2 + 12 * number + 8)
                return int(value) if (kind, count) == (3, 1) else None
    except struct.error:
        return None
    return 1


def _png_size(data: bytes) -> tuple[int, int] | None:
    place = len(_PNG)
    size = None
    while True:
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IHDR":
            width, height = struct.unpack_from(">II", data, place + 8)
            size = height, width
        elif kind == b"eXIf":
            return None
        elif kind == b"IDAT":
            return size if size is None or 0 not in size else None
        place += 12 + length
