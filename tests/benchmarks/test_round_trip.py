"""Files of learned codecs: sizes as estimated, the same symbols however they are decoded."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

pytest.importorskip("constriction")

import round_trip
from round_trip import SIZES, Trip, broken_promises, odd_photos

from fastcil.compression.codec import ImageCodec
from fastcil.compression.errors import BitstreamError
from fastcil.compression.model import CodecModel
from fastcil.compression.saving import save_codec
from fastcil.compression.training import lambda_range
from fastcil.compression.zoo import build_codec
from fastcil.data import resolve
from fastcil.engine.codec_files import load_photos
from fastcil.errors import DataError


@pytest.fixture(scope="module")
def model() -> CodecModel:
    """Blocks that matter from the start, and posteriors that spread the symbols."""
    torch.manual_seed(0)
    model = build_codec("hierarchical-tiny").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                parameter.normal_().mul_(0.3)
            if name.startswith("posteriors") and "project" in name:
                parameter.mul_(4)
    return model


def test_odd_sizes(model: CodecModel) -> None:
    fewer = odd_photos([(1, 1), (63, 41)])
    trips, wrong = broken_promises(
        model, fewer, (64.0,), {"default": round_trip.INSTRUCTIONS["default"]}
    )
    assert not wrong
    assert [trip.name for trip in trips] == ["1x1", "63x41"]
    assert all(trip.estimate > 100 for trip in trips)


def test_what_is_wrong_has_a_line(model: CodecModel, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = odd_photos([(5, 7)])
    monkeypatch.setattr(round_trip, "estimate", lambda *_: 10.0)
    decode = ImageCodec.decode_streams

    def drifts(self: ImageCodec, streams: list[object]) -> list[torch.Tensor]:
        if len(streams) == 8:
            raise BitstreamError("The decoded symbols are not those that were coded.")
        return [image + 2 * torch.get_num_threads() for image in decode(self, streams)]

    monkeypatch.setattr(ImageCodec, "decode_streams", drifts)
    _, wrong = broken_promises(model, photos, (64.0,), {})
    assert wrong[0].startswith("5x7 at 64: ") and wrong[0].endswith(" bytes, 10.0 said")
    assert "at 64, one by one, 2 threads: 5x7 has other pixels" in wrong
    assert "at 64, 8 at a time: The decoded symbols are not those that were coded." in wrong


def test_other_processes_are_asked(model: CodecModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have to say becomes lines."""

    def run(command: list[str], env: dict[str, str], **_: object) -> CompletedProcess[str]:
        assert command[3:5] == ["codec", "verify"] and env["ATEN_CPU_CAPABILITY"] == "avx2"
        assert (Path(command[5]) / "64/a.fcl").read_bytes() == b"data"
        return CompletedProcess(command, 2, "a.fcl: drifted\n", "fastcil: 1 of 1 files is bad.\n")

    monkeypatch.setattr(round_trip.subprocess, "run", run)
    settings = round_trip.INSTRUCTIONS["avx2"]
    lines = [*round_trip._refused_elsewhere(model, {"64/a": b"data"}, "avx2", settings)]
    assert lines == [
        "instructions avx2: a.fcl: drifted",
        "instructions avx2: fastcil: 1 of 1 files is bad.",
    ]


def test_how_far_a_size_may_be() -> None:
    allowed = 0.01 * 1000 + 28 + 4 * 16
    for nbytes in (1000 + allowed, 1000 - allowed):
        assert Trip("a", 1.0, int(nbytes), 1000.0).excess(4) == pytest.approx(0)
    assert Trip("a", 1.0, int(1000 + allowed + 1), 1000.0).excess(4) == pytest.approx(1)


@pytest.mark.slow
def test_kodak_and_odd_sizes(model: CodecModel) -> None:
    """Everything that the script checks, on the photos if they are there."""
    low, high = lambda_range(model)
    _, wrong = broken_promises(model, odd_photos(SIZES), (low, high))
    assert not wrong
    try:
        photos = load_photos([resolve("kodak24.tar")])
    except DataError as error:
        pytest.skip(str(error))
    _, wrong = broken_promises(model, photos, (low,))
    assert not wrong


def test_the_script(
    model: CodecModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codec, kept = str(tmp_path / "codec.safetensors"), tmp_path / "out.json"
    save_codec(codec, model)
    few = odd_photos([(2, 3)])
    monkeypatch.setattr(round_trip, "odd_photos", lambda: few)
    monkeypatch.setattr(round_trip.broken_promises, "__defaults__", ({},))
    assert round_trip.main([codec, "--lambdas=64", f"--json={kept}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("odd sizes: 1 files, 0 wrong") and out.endswith("ok\n")
    found = json.loads(kept.read_text())["odd sizes"]
    assert found["wrong"] == [] and found["files"][0]["name"] == "2x3"
    monkeypatch.setattr(round_trip, "estimate", lambda *_: 1e5)
    assert round_trip.main([codec, "--lambdas=64"]) == 1
    assert capsys.readouterr().out.endswith("100000.0 said\nfailed\n")
