from __future__ import annotations

import pytest
import torch

from fastcil.contract import registry
from fastcil.errors import FastcilError
from fastcil.memory import Codec, make_codec


@pytest.mark.parametrize("name", sorted(registry.CODECS))
def test_registered_codecs_are_codecs_by_that_name(name):
    codec = make_codec(name)
    assert isinstance(codec, Codec)
    assert codec.name == name


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("box", {}, "codec 'box' is unknown; did you mean 'bbox'?"),
        ("raw", {"ratio": 4}, "option 'ratio' of codec 'raw' is unknown; it has none"),
        ("bbox", {"ration": 4}, "option 'ration' of codec 'bbox' is unknown; did you mean 'ratio'"),
        ("bbox", {"ratio": 0.5}, "ratio is 0.5; it must be"),
        ("bbox", {"ratio": float("nan")}, "ratio is nan"),
        ("bbox", {"ratio": float("inf")}, "ratio is inf"),
        ("bbox", {"ratio": "4"}, "ratio is '4'"),
        ("bbox", {"ratio": True}, "ratio is True"),
    ],
)
def test_bad_names_and_options(name, options, says):
    with pytest.raises(FastcilError) as caught:
        make_codec(name, **options)
    assert says in str(caught.value)


def test_a_codec_of_the_user_s_own(monkeypatch):
    class Halved(Codec):
        name = "halved"

        def encode(self, images, boxes):
            return images

        def units(self, encoded):
            return torch.full((len(encoded),), 0.5, dtype=torch.float64)

    monkeypatch.setattr(registry, "CODECS", dict(registry.CODECS))
    monkeypatch.setitem(registry._KINDS, "codec", registry.CODECS)
    registry.register("codec", "halved", Halved)
    assert isinstance(make_codec("halved"), Halved)
    with pytest.raises(FastcilError, match="it has none"):
        make_codec("halved", much=2)
