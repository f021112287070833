"""Codecs in files: the same bits come back, and whatever doesn't fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastcil.compression import CodecModel, entropy_hash, load_codec, load_with_facts, save_codec
from fastcil.compression.codec import ImageCodec
from fastcil.errors import FastcilError


@pytest.fixture
def saved(lively: Callable[[str], CodecModel], tmp_path: Path) -> Path:
    path = tmp_path / "codec.safetensors"
    save_codec(path, lively("hierarchical-tiny"), [{"strategy": "all", "seed": 3}])
    return path


@pytest.mark.parametrize("name", ["hierarchical-tiny", "msh-vr", "msh", "gma-vr"])
def test_a_codec_comes_back_with_its_bits(
    lively: Callable[[str], CodecModel], tmp_path: Path, name: str
) -> None:
    model = lively(name).train()
    path = tmp_path / "deep" / "codec.safetensors"
    save_codec(path, model, [{"seed": 3}])
    before = torch.get_rng_state()
    again, facts = load_with_facts(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.config == model.config and not again.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert facts.lambda_range == (32, 1024) and facts.history == ({"seed": 3},)
    assert facts.entropy_hash == entropy_hash(again) and facts.structure["kind"] == model.kind


def test_old_streams_are_read_by_the_loaded_codec(
    lively: Callable[[str], CodecModel], saved: Path
) -> None:
    photo = torch.arange(64 * 64 * 3).view(64, 64, 3).remainder(251).byte()
    codec = ImageCodec(lively("hierarchical-tiny"))
    stream = codec.encode(photo, 100.0)
    assert torch.equal(ImageCodec(load_codec(saved)).decode(stream), codec.decode(stream))


def change(path: Path, tensors: Any = None, facts: Any = None) -> None:
    """Writes a file anew with some of it changed."""
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["fastcil"])
    weights = load_file(path)
    if tensors is not None:
        tensors(weights)
    if facts is not None:
        facts(described)
    save_file(weights, path, metadata={"fastcil": json.dumps(described)})


def first(weights: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in weights if name.startswith(part) and name.endswith("weight"))


@pytest.mark.parametrize(
    ("tensors", "facts", "says"),
    [
        (None, lambda d: d.pop("codec"), "holds tensors but no codec"),
        (None, lambda d: d["codec"].update(format=9), "of codec format 9"),
        (None, lambda d: d["codec"].pop("history"), "header is incomplete"),
        (None, lambda d: d["codec"].update(lambda_range=[1]), "header is incomplete"),
        (None, lambda d: d["codec"]["structure"].update(kind="jpeg"), "can't build"),
        (None, lambda d: d["codec"]["structure"].update(channels=3), "can't build"),
        (None, lambda d: d["codec"]["structure"].update(embedding=16), "don't fit its structure"),
        (None, lambda d: d["codec"]["structure"].update(embedding=0), "can't build"),
        (
            None,
            lambda d: d["codec"]["structure"].update(channels=[16000] * 5),
            "can't build .16000",
        ),
        (None, lambda d: d["codec"]["structure"].update(last_blocks=10**9), "can't build"),
        (lambda w: w.pop(first(w, "decoder")), None, r"don't fit its structure \(1: decoder"),
        (lambda w: w.update(more=torch.zeros(1)), None, r"don't fit its structure \(1: more"),
        (
            lambda w: w.update({first(w, "encoder"): w[first(w, "encoder")].double()}),
            None,
            r"don't fit its structure \(1: encoder",
        ),
        (lambda w: w[first(w, "entropy")].mul_(1.001), None, "entropy model isn't the one it says"),
        (lambda w: w["embeddings.entropy.range"].mul_(2), None, "isn't the one it says it is"),
    ],
)
def test_what_does_not_fit_is_refused(saved: Path, tensors: Any, facts: Any, says: str) -> None:
    change(saved, tensors, facts)
    with pytest.raises(FastcilError, match=says) as error:
        load_codec(saved)
    assert str(error.value).startswith(f"model is '{saved}', ")


def test_other_files_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FastcilError, match="which is no file"):
        load_codec(tmp_path / "none.safetensors")
    pickled = tmp_path / "codec.pth"
    pickled.write_bytes(b"\x80\x04.")
    with pytest.raises(FastcilError, match="can run code when it is loaded"):
        load_codec(pickled)
    saved.write_bytes(saved.read_bytes()[:5000])
    with pytest.raises(FastcilError, match="can't be read as safetensors"):
        load_codec(saved)
