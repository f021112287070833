"""Learned tables are made once, go with the weights, and mean the same with other instructions.

``golden/learned/NAME.safetensors`` and ``NAME-*.fcl`` beside it were written by `write_golden`:
small codecs whose tables were learned, or that code by mixtures, with files that decode for good.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("constriction")

from fastcil.compression import CodecModel, entropy_hash, load_codec, save_codec
from fastcil.compression.bitstream import Bitstream
from fastcil.compression.codec import ImageCodec
from fastcil.compression.errors import BitstreamError
from fastcil.compression.learning import CodecLearner
from fastcil.compression.training import CodecRecipe, CodecTraining
from fastcil.errors import FastcilError

GOLDEN = Path(__file__).parent / "golden" / "learned"
HASHES = {"msh-vr": "0533e901896a3d7e", "gma-vr": "0d6ca77d37537cdc"}
SIZES = {"64x128": (64, 128), "1x1": (1, 1)}
Build = Callable[[str], CodecModel]

# Reads the golden files in any batch and on any threads, and says what tables it would have made.
_SCRIPT = """
import json, sys, torch
from pathlib import Path
from fastcil.compression import load_codec
from fastcil.compression.bitstream import Bitstream
from fastcil.compression.codec import ImageCodec
found = {"capability": torch.backends.cpu.get_cpu_capability().lower()}
for name in sys.argv[2:]:
    path = Path(sys.argv[1], f"{name}.safetensors")
    codec = ImageCodec(load_codec(path))
    (density,) = codec.model.entropy.densities()
    files = [file.read_bytes() for file in sorted(path.parent.glob(f"{name}-*.fcl"))]
    for threads, data in enumerate(files, 1):
        torch.set_num_threads(threads)
        codec.verify_streams([Bitstream.parse(data)] * (8, 1)[len(data) > 60])
    pixels = [codec.decode(data).flatten().tolist()[:300] for data in files]
    found[name] = {
        "hash": codec.entropy_hash.hex(),
        "own": density.tables() == density.computed_tables(),
        "pixels": pixels,
    }
print(json.dumps(found))
"""


def picture(height: int, width: int) -> torch.Tensor:
    y, x = torch.arange(height)[:, None, None], torch.arange(width)[None, :, None]
    return ((3 * y + 2 * x + torch.tensor([0, 40, 90]) + (x * y) % 11 * 5) % 256).to(torch.uint8)


def write_golden(build: Build) -> None:
    """Wrote the files; to be called for a new version of the format only, by hand."""
    for name in ("msh-vr", "gma-vr"):
        model = build(name)
        with torch.no_grad():
            for bias in model.entropy.densities()[0].biases:
                bias.add_(torch.linspace(-1, 1, len(bias)).view(-1, 1, 1))
        save_codec(GOLDEN / f"{name}.safetensors", model)
        for size, sides in SIZES.items():
            data = ImageCodec(model).encode(picture(*sides), 100.0)
            (GOLDEN / f"{name}-{size}.fcl").write_bytes(data)


@pytest.mark.parametrize("name", ["msh-vr", "gma-vr"])
def test_golden_files_decode(name: str) -> None:
    path = GOLDEN / f"{name}.safetensors"
    assert path.stat().st_size < 200_000
    codec = ImageCodec(load_codec(path))
    assert codec.entropy_hash.hex() == HASHES[name]
    for size, sides in SIZES.items():
        data = (GOLDEN / f"{name}-{size}.fcl").read_bytes()
        assert codec.decode(data).shape == (*sides, 3)
        assert codec.encode(picture(*sides), 100.0) == data


def test_other_instructions_read_the_same_files() -> None:
    """Though they would make other tables of the same weights."""
    settings = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    command = [sys.executable, "-c", _SCRIPT, str(GOLDEN), *HASHES]
    environment = {**os.environ, **settings, "MKL_CBWR": "COMPATIBLE"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, check=True)
    said = json.loads(done.stdout)
    if said["capability"] != "default":
        pytest.skip("this build of PyTorch has one set of instructions")
    for name, known in HASHES.items():
        assert said[name]["hash"] == known
        codec = ImageCodec(load_codec(GOLDEN / f"{name}.safetensors"))
        files = [path.read_bytes() for path in sorted(GOLDEN.glob(f"{name}-*.fcl"))]
        for data, seen in zip(files, said[name]["pixels"], strict=True):
            again = codec.decode(data).flatten().tolist()[:300]
            assert max(abs(a - b) for a, b in zip(seen, again, strict=True)) <= 1
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert not all(said[name]["own"] for name in HASHES), "the files were written with AVX2"


@pytest.mark.parametrize("name", ["msh-vr", "gma"])
def test_tables_are_made_once_and_go_with_the_weights(
    name: str, lively: Build, tmp_path: Path
) -> None:
    codec, image = ImageCodec(lively(name)), picture(64, 64)
    data = codec.encode(image, 100.0)
    (density,) = codec.model.entropy.densities()
    tables, digest = density.tables(), entropy_hash(codec.model)
    save_codec(tmp_path / "codec.safetensors", codec.model)
    for other in (load_codec(tmp_path / "codec.safetensors"), copy.deepcopy(codec.model)):
        assert other.entropy.densities()[0].tables() == tables
        assert entropy_hash(other) == digest
        ImageCodec(other).verify(data)
    # As if this machine made other tables of the same weights.
    row = density.table_frequencies[: int(density.table_slots[0])]
    row[row.argmax()] -= 1
    row[-1] += 1
    elsewhere = ImageCodec(codec.model)
    with pytest.raises(BitstreamError, match="coded with the entropy model"):
        elsewhere.verify(data)
    stream = elsewhere.encode(image, 100.0)
    elsewhere.verify(stream)
    assert density.tables() != tables, "what is kept is what codes"
    save_codec(tmp_path / "other.safetensors", codec.model)
    ImageCodec(load_codec(tmp_path / "other.safetensors")).verify(stream)


def test_only_an_update_makes_others(lively: Build) -> None:
    model = lively("msh")
    assert model.update() and not model.update()
    (density,) = model.entropy.densities()
    tables = density.tables()
    with torch.no_grad():
        density.biases[-1].add_(3.0)
    data = ImageCodec(model).encode(picture(32, 32), 100.0)
    assert density.tables() == tables
    model.trainable("kr")
    assert not model.update() and density.tables() == tables
    ImageCodec(model).verify(data)
    assert model.update(force=True) and density.tables() != tables
    with pytest.raises(BitstreamError, match="this codec has"):
        ImageCodec(model).verify(data)


@pytest.mark.parametrize("strategy", ["all", "enc-dec"])
def test_training_forgets_tables_only_where_they_are_learned(
    strategy: str, lively: Build, tmp_path: Path
) -> None:
    model = lively("msh-vr")
    model.update()
    tables = model.entropy.densities()[0].tables()
    recipe = CodecRecipe(epochs=1, lr=1e-2, batch_size=1)
    training = CodecTraining(recipe, epoch_steps=1, size=64, ema=0.5, strategy=strategy)  # type: ignore[arg-type]
    learner = CodecLearner(model, training, seed=0)
    optimiser = torch.optim.Adam(learner.trained, lr=1e-2)
    torch.stack([*learner.losses(torch.rand(1, 3, 64, 64), None).values()]).sum().backward()
    optimiser.step()
    learner.average.update_parameters(learner.model)  # type: ignore[union-attr]
    kept = copy.deepcopy(learner.state())
    learner.load_state(kept)
    save_codec(tmp_path / "codec.safetensors", learner.result)
    (density,) = load_codec(tmp_path / "codec.safetensors").entropy.densities()
    assert (density.tables() == tables) == (strategy == "enc-dec")
    (learned,) = learner.result.entropy.densities()
    assert density.tables() == learned.tables()
    if strategy == "all":
        assert density.tables() == learned.computed_tables()


def test_a_file_whose_tables_are_none_is_refused(lively: Build) -> None:
    model = lively("msh")
    data = ImageCodec(model).encode(picture(16, 16), 100.0)
    (density,) = model.entropy.densities()
    density.table_frequencies[0] = -5
    with pytest.raises(FastcilError, match="frequencies must be at least 1"):
        ImageCodec(model).decode(data)
    assert Bitstream.parse(data).height == 16
