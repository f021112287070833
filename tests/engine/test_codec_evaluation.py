"""Evaluations of codecs as results: their curves, their files, their errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("constriction")

from fastcil.compression.anchors import ANCHORS, VTM_KODAK
from fastcil.compression.bd_rate import bd_rate
from fastcil.compression.codec import ImageCodec
from fastcil.compression.evaluation import Measured, Photos, Point, evaluate_codec
from fastcil.compression.model import CodecModel
from fastcil.compression.saving import save_codec
from fastcil.compression.zoo import build_codec
from fastcil.data import ImageStore
from fastcil.engine.codec_evaluation import CodecResult, evaluate_codecs, evaluate_files
from fastcil.engine.codec_files import encode_files
from fastcil.errors import FastcilError

WRITTEN = {"result.json", "rate_distortion.svg", "rate_distortion.png"}


def model(seed: int = 0) -> CodecModel:
    torch.manual_seed(seed)
    return build_codec("hierarchical-tiny")


def finetuned(old: CodecModel) -> CodecModel:
    """The same entropy model, another decoder."""
    new = build_codec("hierarchical-tiny")
    new.load_state_dict(old.state_dict())
    with torch.no_grad():
        for parameter in new.trainable("kr"):
            parameter.mul_(1.3)
    return new


def photos(*names: str) -> Photos:
    images = np.random.default_rng(0).integers(0, 256, (len(names), 8, 12, 3), dtype=np.uint8)
    return Photos(names, ImageStore.from_batch(images))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images and two codecs' files."""
    tmp_path = tmp_path_factory.mktemp("evaluation")
    (tmp_path / "in").mkdir()
    given = photos("a", "b")
    for k, name in enumerate(given.names):
        pixels = given.images.image(k).numpy()[..., ::-1]
        cv2.imwrite(str(tmp_path / f"in/{name}.png"), pixels)
    old = model()
    save_codec(tmp_path / "old.safetensors", old)
    save_codec(tmp_path / "new.safetensors", finetuned(old))
    return tmp_path


def test_old_bitstreams_keep_their_rates() -> None:
    """Backward compatibility as the paper measures it."""
    old, new = ImageCodec(model()), ImageCodec(finetuned(model()))
    seen: list[tuple[str, float]] = []
    result = evaluate_codecs(
        {"old": old, "new": new},
        photos("a", "b"),
        (32.0, 500.0),
        anchors=("jpeg",),
        notify=lambda curve, point: seen.append((curve, point.setting)),
    )
    assert list(result.curves) == ["old", "new", "new, old bitstreams", "jpeg"]
    assert seen[:6] == [
        *(("old", 32.0), ("old", 500.0), ("new", 32.0), ("new", 500.0)),
        *(("new, old bitstreams", 32.0), ("new, old bitstreams", 500.0)),
    ]
    for before, after in zip(
        result.curves["old"], result.curves["new, old bitstreams"], strict=True
    ):
        assert before.bpp == after.bpp and before.psnr != after.psnr
    for k, point in enumerate(result.curves["old"]):
        assert point.images == evaluate_codec(old, photos("a", "b"), seen[k][1])[0].images
    assert [p.setting for p in result.curves["jpeg"]] == list(ANCHORS["jpeg"].qualities)
    assert result.published == {}
    assert result.environment["device"] == "cpu" and result.environment["opencv"]


def one_rate(lmbda: float, seed: int) -> CodecModel:
    torch.manual_seed(seed)
    return build_codec("msh", hidden=4, latent=4, lambda_range=(lmbda, lmbda))


def test_codecs_of_one_rate_are_one_curve_beside_others() -> None:
    """Duan et al. (2024), Fig. 11: a codec of many rates, and those of one rate each."""
    torch.manual_seed(0)
    many = ImageCodec(build_codec("msh-vr", hidden=4, latent=4, embedding=4))
    ones = [ImageCodec(one_rate(lmbda, k)) for k, lmbda in enumerate((785.2, 29.26125, 100.0))]
    codecs = {"msh-vr": many, "msh": ones, "other": ImageCodec(model()), "last": ones[:1]}
    result = evaluate_codecs(codecs, photos("a", "b"), (50.0, 800.0))
    settings = {name: [p.setting for p in points] for name, points in result.curves.items()}
    # Each at its own rate, whatever is asked of the others; nobody can read another's files.
    assert settings == {
        **{"msh-vr": [50.0, 800.0], "msh": pytest.approx([29.26125, 100.0, 785.2])},
        **{"other": [50.0, 800.0], "last": pytest.approx([785.2])},
    }
    for codec, point in zip((ones[1], ones[2], ones[0]), result.curves["msh"], strict=True):
        wanted = evaluate_codec(codec, photos("a", "b"), point.setting)[0]
        assert point.images == wanted.images
    assert set(result.bd_rates()["msh"]) == {"msh-vr", "other", "last"}


def test_old_bitstreams_go_through_all_that_read_them() -> None:
    old = model()
    codecs = {
        **{"old": old, "new": finetuned(old), "newer": finetuned(finetuned(old))},
        "foreign": model(seed=5),
    }
    given = {name: ImageCodec(codec) for name, codec in codecs.items()}
    result = evaluate_codecs(given, photos("a"), (64.0,))
    curves = ["old", *(c for name in ("new", "newer") for c in (name, f"{name}, old bitstreams"))]
    assert list(result.curves) == [*curves, "foreign"]
    with pytest.raises(FastcilError, match=r"codecs has \[\]; give one codec at least"):
        evaluate_codecs({}, photos("a"))
    with pytest.raises(FastcilError, match="and of each name"):
        evaluate_codecs({"old": given["old"], "none": []}, photos("a"))


@pytest.mark.parametrize(
    ("limits", "wanted"), [((32, 1024), (32, 101.594, 322.54, 1024)), ((4, 108), (4, 12, 36, 108))]
)
def test_lambdas_are_those_of_the_models_range(
    limits: tuple[float, float], wanted: tuple[float, ...]
) -> None:
    codec = ImageCodec(build_codec("hierarchical-tiny", lambda_range=limits))
    result = evaluate_codecs({"m": codec}, photos("a"))
    assert [p.setting for p in result.curves["m"]] == pytest.approx(wanted, rel=1e-5)


def test_vtm_stands_beside_kodak_only() -> None:
    kodak = photos(*(f"kodim{k:02}" for k in range(1, 25)))
    result = CodecResult({}, {})
    assert result.published == {}
    names = {"kodak": kodak, "others": photos(*kodak.names[:23], "kodim25")}
    for name, given in names.items():
        found = evaluate_codecs({"m": Stub()}, given, (64.0,))  # type: ignore[dict-item]
        assert found.published == ({"vtm-22.0": VTM_KODAK} if name == "kodak" else {})


class Stub:
    """Codes to four bytes, and back to black."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)
        self.model.embeddings = {}
        self.model.config = SimpleNamespace(lambda_range=(32.0, 1024.0))

    def encode(self, image: torch.Tensor, lmbda: float) -> bytes:
        return bytes(4)

    def decode(self, data: bytes) -> torch.Tensor:
        return torch.zeros(8, 12, 3, dtype=torch.uint8)


def point(setting: float, nbytes: int, psnr: float) -> Point:
    return Point(setting, (Measured("a", 8, 8, nbytes, psnr, None),), 0.1, 0.2)


def test_bd_rates_of_all_pairs() -> None:
    curves = {
        "x": [point(1, 10, 30.0), point(2, 20, 33.0), point(3, 40, 36.0)],
        "y": [point(1, 9, 30.5), point(2, 19, 33.2), point(3, 38, 36.4)],
        "far": [point(1, 10, 50.0), point(2, 20, 60.0)],
        "lossless": [point(1, 10, 30.0), point(2, 20, math.inf)],
    }
    rates = CodecResult({}, {}, curves).bd_rates()
    x, y = ([(p.bpp, p.psnr) for p in curves[name]] for name in "xy")
    assert rates["y"]["x"] == {"cubic": bd_rate(x, y), "akima": bd_rate(x, y, "akima")}
    assert rates["y"]["x"]["cubic"] < 0 < rates["x"]["y"]["cubic"]
    assert rates["x"]["far"] == rates["lossless"]["x"] == {"cubic": None, "akima": None}
    assert list(rates["x"]) == ["y", "far", "lossless"]


def read(folder: Path) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    text = (folder / "result.json").read_text()
    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


def test_what_is_saved(tmp_path: Path) -> None:
    curves = {"x": [point(1, 10, 30.0), point(2, 20, math.inf)], "all": [point(1, 10, math.inf)]}
    CodecResult({"model": "m"}, {"torch": "t"}, curves, {"vtm": [(0.1, 28.0)]}).save(tmp_path)
    found = read(tmp_path)
    assert (found["config"], found["environment"]) == ({"model": "m"}, {"torch": "t"})
    assert found["curves"]["x"][0] == {
        **{"setting": 1, "bpp": 1.25, "psnr": 30.0, "ms_ssim": None},
        **{"encode_seconds": 0.1, "decode_seconds": 0.2},
        "images": [
            {
                **{"name": "a", "height": 8, "width": 8, "nbytes": 10},
                **{"psnr": 30.0, "ms_ssim": None, "bpp": 1.25},
            }
        ],
    }
    assert found["curves"]["x"][1]["psnr"] is None
    assert found["published"] == {"vtm": [[0.1, 28.0]]}
    assert found["bd_rate"]["x"]["vtm"] == {"cubic": None, "akima": None}
    plots = [(tmp_path / f"rate_distortion.{kind}").read_bytes() for kind in ("svg", "png")]
    assert ElementTree.fromstring(plots[0]).tag.endswith("svg")
    shown = cv2.imdecode(np.frombuffer(plots[1], np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape[1] > 600 and len(np.unique(shown.reshape(-1, 3), axis=0)) > 10
    CodecResult({}, {}, curves, {"vtm": [(0.1, 28.0)]}).save(tmp_path)
    for kind, plot in zip(("svg", "png"), plots, strict=True):
        assert (tmp_path / f"rate_distortion.{kind}").read_bytes() == plot
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN


def test_files(folder: Path, tmp_path: Path) -> None:
    old = folder / "old.safetensors"
    codec = ImageCodec(model())
    for lmbda in (40, 400):
        list(encode_files(codec, [folder / "in"], lmbda, tmp_path / f"streams/{lmbda}"))
    result = evaluate_files(
        str(old),
        [str(folder / "in")],
        str(tmp_path / "out"),
        lambdas=(64.0,),
        old_bitstreams=str(tmp_path / "streams"),
        new_checkpoint=str(folder / "new.safetensors"),
        device="cpu",
    )
    settings = {name: [p.setting for p in points] for name, points in result.curves.items()}
    assert settings == {
        **{"old": [64.0], "old, old bitstreams": [40.0, 400.0]},
        **{"new": [64.0], "new, old bitstreams": [40.0, 400.0]},
    }
    found = read(tmp_path / "out")
    assert found["config"] == {
        **{"model": str(old), "images": [str(folder / "in")], "lambdas": [64.0], "anchors": []},
        "old_bitstreams": str(tmp_path / "streams"),
        "new_checkpoint": str(folder / "new.safetensors"),
        **{"beside": [], "device": "cpu", "max_pixels": 1 << 24},
    }
    sizes = [path.stat().st_size for path in sorted((tmp_path / "streams/40").iterdir())]
    images = found["curves"]["new, old bitstreams"][0]["images"]
    assert [image["nbytes"] for image in images] == sizes
    assert {path.name for path in (tmp_path / "out").iterdir()} == WRITTEN


def test_files_beside(folder: Path, tmp_path: Path) -> None:
    for k, lmbda in enumerate((100.0, 40.0)):
        save_codec(tmp_path / f"{lmbda:g}", one_rate(lmbda, k))
    result = evaluate_files(
        str(folder / "old.safetensors"),
        [str(folder / "in")],
        str(tmp_path / "out"),
        lambdas=(64.0,),
        beside=[f"msh={tmp_path / '100'}", str(folder / "new.safetensors"), f"msh={tmp_path}/40"],
        device="cpu",
    )
    settings = {name: [p.setting for p in points] for name, points in result.curves.items()}
    assert settings == {
        **{"old": [64.0], "new": [64.0], "new, old bitstreams": [64.0], "msh": [40.0, 100.0]},
    }
    assert read(tmp_path / "out")["config"]["beside"][1] == str(folder / "new.safetensors")


def test_a_foreign_checkpoint_is_no_newer_one(folder: Path, tmp_path: Path) -> None:
    save_codec(tmp_path / "foreign", model(seed=5))
    given = (str(folder / "old.safetensors"), [str(folder / "in")], str(tmp_path / "out"))
    with pytest.raises(FastcilError, match=r"has another entropy model .* pass it as beside"):
        evaluate_files(*given, new_checkpoint=str(tmp_path / "foreign"), device="cpu")
    with pytest.raises(FastcilError, match="beside names 'old', as another codec is"):
        evaluate_files(*given, beside=[f"old={tmp_path / 'foreign'}"], device="cpu")
    with pytest.raises(FastcilError, match=r"8 x 12 pixels; the codec takes up to 95"):
        evaluate_files(*given, device="cpu", max_pixels=95)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambdas": ()}, r"lambdas is \[\]; it must have one"),
        ({"lambdas": (32.0, 32.0)}, "and none twice"),
        ({"lambdas": (-1.0, 2e9)}, r"lambdas is \[-1.0, 2000000000.0\]; 'old' was trained from"),
        ({"anchors": ("gif",)}, "anchors has 'gif'; those that can be used here are jpeg"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"new_checkpoint": "same"}, "is given twice; pass another codec"),
        ({"beside": ["nowhere"]}, "nowhere"),
        ({"old_bitstreams": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_bad_arguments(folder: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    old = str(folder / "old.safetensors")
    options = {name: old if value == "same" else value for name, value in options.items()}
    with pytest.raises(FastcilError, match=message):
        evaluate_files(old, [str(folder / "in")], str(tmp_path / "out"), **options)
    assert not list(tmp_path.glob("out/*"))
