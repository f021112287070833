"""What is kept between tasks: exemplars, how many of them, which, and in what form."""

from fastcil.memory.budget import Budget
from fastcil.memory.codecs import ByteStore, Codec, Encoded, make_codec
from fastcil.memory.codecs.settings import codec_settings
from fastcil.memory.memory import Memory
from fastcil.memory.overhead import check_codec, codec_overhead
from fastcil.memory.room import allowance, likely_room
from fastcil.memory.selection import SELECTIONS, herding, random_order

__all__ = [
    "SELECTIONS",
    "Budget",
    "ByteStore",
    "Codec",
    "Encoded",
    "Memory",
    "allowance",
    "check_codec",
    "codec_overhead",
    "codec_settings",
    "herding",
    "likely_room",
    "make_codec",
    "random_order",
]
