"""The forms in which exemplars are kept."""

from fastcil.memory.codecs.byte_store import ByteStore
from fastcil.memory.codecs.codec import Codec, Encoded, make_codec

__all__ = ["ByteStore", "Codec", "Encoded", "make_codec"]
