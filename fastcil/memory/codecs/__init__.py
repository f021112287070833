"""The forms in which exemplars are kept."""

from fastcil.memory.codecs.codec import Codec, make_codec

__all__ = ["Codec", "make_codec"]
