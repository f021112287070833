"""Files that are kept with the tests: what was written once decodes for good.

``golden/*.fcl`` were written by `write_golden` when the format was new. Their model is drawn anew
in every run, from a generator of NumPy's whose stream never changes, by operations that round
alike everywhere, so that no weights need to be kept with them.
"""

from __future__ import annotations

import copy
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("constriction")

from fastcil.compression.bitstream import inspect
from fastcil.compression.codec import ImageCodec
from fastcil.compression.errors import BitstreamError
from fastcil.compression.learning import CodecLearner
from fastcil.compression.model import CodecModel
from fastcil.compression.quality import psnr
from fastcil.compression.training import CodecRecipe, CodecTraining
from fastcil.compression.zoo import build_codec

GOLDEN = Path(__file__).parent / "golden"
CASES = {"v1-64x64": (64, 64, 64.0), "v1-1x1": (1, 1, 32.0), "v1-41x70": (41, 70, 1024.0)}
HASH = "5463332d507f10f1"
FIRST, RATE = CASES["v1-64x64"][:2], CASES["v1-64x64"][2]


def golden_model() -> CodecModel:
    """Weights within the bounds that are usual, some larger so that symbols and scales spread."""
    model = build_codec("hierarchical-tiny").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = np.random.RandomState(zlib.crc32(name.encode()))
            draws = 2 * source.random_sample(tuple(parameter.shape)) - 1
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            scale = 1 / np.sqrt(np.float64(fan_in))
            if name.startswith("posteriors") and "project" in name:
                scale *= 15
            parameter.copy_(torch.from_numpy((draws * scale).astype(np.float32)))
    return model


def golden_image(height: int, width: int) -> Tensor:
    """uint8 [H, W, 3] of whole numbers: bands, a disc, and a texture."""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    disc = ((y - height // 2) ** 2 + (x - width // 3) ** 2 < height * width // 9).int() * 70
    red = 40 + (3 * y + x) % 97 + disc
    green = 90 + (y // 8 % 2) * 50 + disc // 2
    blue = 200 - (x * 2) % 120 + (y * x) % 7 * 5
    return torch.stack([red, green.expand_as(red), blue], dim=2).clamp(0, 255).to(torch.uint8)


def write_golden() -> None:
    """Wrote the files; to be called for a new version of the format only, by hand."""
    codec = ImageCodec(golden_model())
    for name, (height, width, lmbda) in CASES.items():
        data = codec.encode(golden_image(height, width), lmbda)
        (GOLDEN / f"{name}.fcl").write_bytes(data)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in sorted(GOLDEN.glob("*.fcl"))}


@pytest.fixture(scope="module")
def old() -> CodecModel:
    """The golden model with a decoder that has learned what the first file shows."""
    model = golden_model()
    x = as_input(golden_image(*FIRST))
    with torch.no_grad():
        latents = [*model(x, RATE)["latents"].values()]
    parameters = [p for part in model.parts()["decoder"] for p in part.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        (model.reconstruct(latents, RATE, FIRST) - x).square().mean().backward()
        optimizer.step()
    return model


def as_input(image: Tensor) -> Tensor:
    return image.permute(2, 0, 1)[None] / 255


def seen(model: CodecModel, files: dict[str, bytes]) -> float:
    """PSNR of what a model makes of the first file."""
    return psnr(ImageCodec(model).decode(files["v1-64x64"]), golden_image(*FIRST))


def finetuned(old: CodecModel, strategy: str) -> CodecModel:
    """A few steps on images unlike the old one, which is replayed where the strategy replays."""
    recipe = CodecRecipe(epochs=1, lr=3e-3, batch_size=2)
    training = CodecTraining(recipe, epoch_steps=1, size=64, strategy=strategy)  # type: ignore
    learner = CodecLearner(copy.deepcopy(old), training, seed=0)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).round()
    replayed = as_input(golden_image(*FIRST)) if strategy == "kr" else None
    optimizer = torch.optim.Adam(learner.trained, lr=3e-3)
    for _ in range(5):
        optimizer.zero_grad()
        losses = learner.losses(noise, replayed)
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()
    return learner.result.eval()


def test_every_case_is_there(files: dict[str, bytes]) -> None:
    assert set(files) == set(CASES)
    for name, (height, width, lmbda) in CASES.items():
        facts = inspect(files[name])
        assert (facts["height"], facts["width"], facts["lmbda"]) == (height, width, lmbda)
        assert (facts["format_version"], facts["entropy_hash"]) == (1, HASH)


def test_the_model_is_the_same_as_ever() -> None:
    assert ImageCodec(golden_model()).entropy_hash.hex() == HASH


@pytest.mark.parametrize("name", CASES)
def test_golden_files_decode(name: str, files: dict[str, bytes]) -> None:
    """What their symbols are is checked by the files themselves."""
    codec = ImageCodec(golden_model())
    codec.verify(files[name])
    assert codec.decode(files[name]).shape == (*CASES[name][:2], 3)


def test_pixels_are_those_of_the_encoder(files: dict[str, bytes]) -> None:
    model = golden_model()
    image = golden_image(*FIRST)
    with torch.no_grad():
        wanted = model(as_input(image), RATE)["x_hat"][0].permute(1, 2, 0) * 255
    decoded = ImageCodec(model).decode(files["v1-64x64"])
    assert (decoded - wanted).abs().mean() < 1


@pytest.mark.parametrize("strategy", ["enc", "kr", "enc-dec"])
def test_golden_files_decode_after_finetuning(
    strategy: str, old: CodecModel, files: dict[str, bytes]
) -> None:
    new = finetuned(old, strategy)
    codec = ImageCodec(new)
    assert codec.entropy_hash.hex() == HASH
    for data in files.values():
        codec.verify(data)
    before, after = seen(old, files), seen(new, files)
    assert before > 13
    changed = {
        name for name, p in new.named_parameters() if not torch.equal(p, old.get_parameter(name))
    }
    assert any(name.startswith("encoder") for name in changed)
    assert any(name.startswith("decoder") for name in changed) == (strategy != "enc")
    if strategy == "enc":
        assert after == before
    elif strategy == "enc-dec":
        # Without replay the decoder forgets what old latents looked like.
        assert after < before - 0.5
    else:
        assert after > before - 0.5


def test_golden_files_are_lost_with_their_entropy_model(files: dict[str, bytes]) -> None:
    model = golden_model()
    with torch.no_grad():
        next(model.entropy.parameters())[0].add_(1e-3)
    with pytest.raises(BitstreamError, match=f"{HASH}; this codec has"):
        ImageCodec(model).decode(files["v1-1x1"])
