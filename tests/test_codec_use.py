"""``fastcil codec encode | decode | inspect | verify | eval``."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("constriction")

from fastcil.cli import main
from fastcil.compression.codec import ImageCodec
from fastcil.compression.saving import load_codec, save_codec
from fastcil.compression.zoo import build_codec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec's file, and two images."""
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    save_codec(folder / "codec.safetensors", build_codec("hierarchical-tiny"))
    (folder / "in").mkdir()
    for k, name in enumerate("ab"):
        image = np.random.default_rng(k).integers(0, 256, (9 + k, 20, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"in/{name}.png"), image)
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def run(text: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    assert main(["codec", *text.split()]) == code
    out, err = capsys.readouterr()
    return out, err


def test_encode_inspect_verify_decode(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run("encode codec.safetensors in --lambda 64 --out streams", capsys)
    codec = ImageCodec(load_codec("codec.safetensors"))
    sizes = {name: (folder / f"streams/{name}.fcl").stat().st_size for name in "ab"}
    lines = [
        f"streams/{name}.fcl: {8 * sizes[name] / (20 * height):.4f} bpp\n"
        for name, height in (("a", 9), ("b", 10))
    ]
    assert (out, err) == ("".join(lines), "")

    out, _ = run("inspect streams/b.fcl", capsys)
    facts = dict(line.split(": ") for line in out.splitlines())
    assert (facts["height"], facts["width"], facts["lmbda"]) == ("10", "20", "64.0")
    assert facts["entropy_hash"] == codec.entropy_hash.hex()

    assert run("verify streams", capsys)[0] == "files: 2, bytes as written\n"
    out, _ = run("verify streams --model codec.safetensors", capsys)
    assert out == "files: 2, bytes and symbols as written\n"

    out, _ = run("decode codec.safetensors streams/a.fcl --out back", capsys)
    assert out == "back/a.png\n"
    wanted = codec.decode((folder / "streams/a.fcl").read_bytes()).numpy()
    assert np.array_equal(cv2.imread("back/a.png")[..., ::-1], wanted)

    damaged = folder / "streams/a.fcl"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    out, err = run("verify streams", capsys, code=2)
    assert out.startswith("streams/a.fcl: The stream's CRC-32") and out.count("\n") == 1
    assert err == "fastcil: 1 of 2 files is bad.\n"


def test_eval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(
        "eval codec.safetensors in --out figures --lambdas 32,500 --anchors=jpeg --device cpu",
        capsys,
    )
    found = json.loads((folder / "figures/result.json").read_text())
    first = found["curves"]["codec"][0]
    lines = out.splitlines()
    assert lines[0] == f"codec at 32: {first['bpp']:.4f} bpp, {first['psnr']:.2f} dB"
    assert lines[2].startswith("jpeg at 5: ") and lines[-1] == "result: figures"
    assert err == ""


def test_eval_beside_others_and_without_ms_ssim(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_codec(folder / "one", build_codec("msh", hidden=4, latent=4, lambda_range=(99.0, 99.0)))
    command = "eval codec.safetensors in --out beside --lambdas 32,500 --beside msh=one"
    out, _ = run(f"{command} --device cpu", capsys)
    assert "MS-SSIM is" not in out
    assert out.splitlines()[2].startswith("msh at 99: ")
    assert "msh: no BD-rate against codec: they share too few PSNRs" in out
    monkeypatch.setattr("fastcil.compression.quality.ms_ssim_available", lambda: False)
    out, _ = run(f"{command} --device cpu", capsys)
    assert out.startswith("MS-SSIM is measured by the package pytorch-msssim, which is not insta")
    assert out.count("MS-SSIM") == 1 and "pip install 'fastcil[codec]'" in out.splitlines()[0]


def test_the_limit_is_the_same_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    run("encode codec.safetensors in/b.png --lambda 64 --out large --max_pixels 200", capsys)
    for command in ("inspect large/b.fcl", "eval codec.safetensors in/b.png --lambdas 64 --out x"):
        _, err = run(f"{command} --max_pixels 199", capsys, code=2)
        assert "199 (max_pixels)" in err
        out, _ = run(f"{command} --max_pixels 200", capsys)
        assert "nbytes" in out or "result: x" in out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("encode codec.safetensors in --out x", "lambda"),
        ("encode codec.safetensors in --lambda 0 --out x", "lambda is 0; the codec was trained"),
        (
            "encode codec.safetensors in --lambda 5e3 --out x",
            "lambda is 5000; the codec was trained",
        ),
        (
            "encode codec.safetensors in --lambda 64 --max_pixels 99 --out x",
            "up to 99 (max_pixels)",
        ),
        ("encode codec.safetensors in --lambda much --out x", "much"),
        ("encode nowhere in --lambda 64 --out x", "nowhere"),
        ("encode codec.safetensors nowhere --lambda 64 --out x", "nowhere does not exist"),
        ("encode in/a.png in --lambda 64 --out x", "in/a.png"),
        ("encode codec.safetensors in --lambda 64 --out codec.safetensors", "can't be written"),
        ("decode codec.safetensors in --out x", "no file whose name ends in .fcl"),
        ("inspect in/a.png", "it is not one of fastcil's learned codec"),
        ("inspect nowhere", "nowhere cannot be read: No such file"),
        ("inspect in/a.png --model x", "option '--model' is unknown"),
        ("eval codec.safetensors in --out x --lambdas 1;2", "lambdas is '1;2'"),
        ("eval codec.safetensors in --out x --anchors gif", "anchors has 'gif'"),
        ("eval codec.safetensors in --out codec.safetensors", "can't be written"),
        ("verify", "required"),
    ],
)
def test_errors_are_one_sentence(
    text: str, sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    out, err = run(text, capsys, code=2)
    assert out == "" and err.startswith("fastcil: ") and err.count("\n") == 1
    assert sentence in err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", ["encode", "decode", "inspect", "verify", "eval"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["codec", command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fastcil codec {command}")
    assert f"  {command} " in run("--help", capsys)[0]
