"""Images to bytes and back, and what becomes of bytes that are not what was written."""

from __future__ import annotations

import multiprocessing
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("constriction")

from fastcil.compression.bitstream import Bitstream, Head, inspect
from fastcil.compression.codec import ImageCodec
from fastcil.compression.coder import information
from fastcil.compression.errors import BitstreamError
from fastcil.compression.gaussian import SIGMAS, Gaussian
from fastcil.compression.gaussian_tables import gaussian_tables
from fastcil.compression.model import CodecModel, EntropyModel
from fastcil.compression.phases import Phases
from fastcil.compression.saving import load_codec, save_codec
from fastcil.compression.tables import Tables
from fastcil.errors import FastcilError


@dataclass(frozen=True)
class StubConfig:
    embedding: int = 0
    lambda_range: tuple[float, float] = (1.0, 1024.0)
    entropy_dtype: str = "float64"


class StubEncoder(nn.Module):
    def forward(self, x: Tensor, embedding: None) -> list[Tensor]:
        coarse, fine = x[..., ::8, ::8], x[..., ::4, ::4]
        return [16 * coarse, 32 * (fine - coarse.repeat_interleave(2, 2).repeat_interleave(2, 3))]


class StubEntropy(EntropyModel):
    """Sums of halves and quarters, exact on any machine."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SIGMAS
        self.scale = nn.Parameter(torch.tensor([0.25, 2.0]))

    def start(self, batch: int, height: int, width: int) -> Tensor:
        return self.scale.new_zeros(batch, 3, height // 8, width // 8)

    def ahead(self, i: int, state: Tensor, embedding: None) -> tuple[Tensor, Gaussian]:
        spread = self.scale[1] - (state * self.scale[0]).clamp(-4, 1) if i else self.scale[1]
        return state, Gaussian(state * self.scale[0], spread.expand(state.shape))

    def advance(self, i: int, state: Tensor, z: Tensor, embedding: None) -> tuple[Tensor, Tensor]:
        return z, F.interpolate(z / 16, scale_factor=2)

    def tables(self, i: int) -> Tables:
        return gaussian_tables()


class StubDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, latents: list[Tensor], features: list[Tensor], embedding: None) -> Tensor:
        coarse = F.interpolate(latents[0] / 16, scale_factor=8)
        return (coarse + F.interpolate(latents[1] / 32, scale_factor=4)) * self.gain


class Stub(CodecModel):
    """Two latents without a network: the image at stride 8, and what stride 4 adds to it."""

    kind, latent_names, latent_strides, multiple = "stub", ("coarse", "fine"), (8, 4), 8

    def __init__(self) -> None:
        super().__init__(StubConfig())
        self.encoder, self.entropy, self.decoder = StubEncoder(), StubEntropy(), StubDecoder()
        self.latent_channels = (3, 3)

    def posterior(self, i: int, features: Any, state: Tensor, embedding: None) -> Tensor:
        return features[i]


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth waves, with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width][..., None] / 20
    waves = np.sin(y * rng.uniform(0.5, 2, 3) + x * rng.uniform(0.5, 2, 3)) * 100 + 128
    noisy = waves + rng.normal(0, 4, (height, width, 3))
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))


Build = Callable[[str], CodecModel]
FORKS = multiprocessing.get_context("forkserver")
TABLED = ("stub", "hierarchical-tiny", "msh-vr", "msh")
REAL = (*TABLED, "gma-vr", "gma")


@pytest.fixture
def build(lively: Build) -> Build:
    return lambda name: Stub() if name == "stub" else lively(name)


@pytest.fixture
def codec() -> ImageCodec:
    return ImageCodec(Stub(), max_pixels=1 << 16)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (50, 71), (8, 129)])
@pytest.mark.parametrize("name", REAL)
def test_round_trip(build: Build, name: str, size: tuple[int, int]) -> None:
    codec = ImageCodec(build(name))
    image = picture(*size)
    data = codec.encode(image, 100.0)
    codec.verify(data)
    decoded = codec.decode(data)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == image.shape
    out = codec.model.eval()(image.permute(2, 0, 1)[None] / 255, 100.0)
    wanted = out["x_hat"][0].permute(1, 2, 0) * 255
    # The forward pass is in float32, so that a symbol or two may be rounded the other way.
    assert (decoded - wanted).abs().mean() < 0.6
    facts = inspect(data)
    assert (facts["height"], facts["width"], facts["lmbda"]) == (*size, 100.0)
    assert facts["entropy_hash"] == codec.entropy_hash.hex()
    assert facts["nbytes"] == len(data)


@pytest.mark.parametrize("name", TABLED)
def test_size_is_the_information_and_28_bytes(build: Build, name: str) -> None:
    codec = ImageCodec(build(name))
    image = picture(120, 128)
    phases = Phases(codec.model, 120, 128, 100.0)
    features = codec.model.features(image.permute(2, 0, 1)[None] / 255, 100.0)
    bits = 0.0
    for i in range(phases.count):
        index = phases.prior(i)[1]
        symbols = phases.quantise(i, features)
        phases.feed(i, symbols)
        bits += information(symbols.flatten().numpy(), index.flatten().numpy(), phases.tables(i))
    data = codec.encode(image, 100.0)
    assert bits / 8 > 100
    assert abs(len(data) - 28 - bits / 8) <= 0.01 * bits / 8 + 2


def test_threads_do_not_matter(build: Build, threads: None) -> None:
    codec = ImageCodec(build("hierarchical-tiny"))
    streams = []
    for count in (1, 2):
        torch.set_num_threads(count)
        streams.append(codec.encode(picture(64, 64), 64.0))
        assert torch.get_num_threads() == count
    codec.verify(streams[0])
    torch.set_num_threads(1)
    codec.verify(streams[1])


def test_several_at_once(codec: ImageCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcil.compression.codec._BATCH_PIXELS", 2 * 24 * 32)
    images = [picture(*size, seed=k) for k, size in enumerate([(24, 32), (8, 9), *[(24, 32)] * 4])]
    streams = codec.encode_streams(images, 50.0)
    codec.verify_streams(streams)
    decoded = codec.decode_streams(streams)
    for image, stream, pixels in zip(images, streams, decoded, strict=True):
        data = codec.encode(image.numpy(), 50.0)
        assert stream.pack() == data
        assert torch.equal(codec.decode(data), pixels)
    assert codec.encode_streams([], 50.0) == codec.decode_streams([]) == []


def test_streams_of_several_rates_at_once(build: Build) -> None:
    codec = ImageCodec(build("hierarchical-tiny"))
    streams = [codec.encode_streams([picture(64, 64)], rate)[0] for rate in (32.0, 900.0)]
    assert streams[0].payload != streams[1].payload
    for stream, pixels in zip(streams, codec.decode_streams(streams), strict=True):
        assert (pixels.int() - codec.decode(stream.pack()).int()).abs().max() <= 1


def test_a_shared_head(codec: ImageCodec) -> None:
    (stream,) = codec.encode_streams([picture(40, 40)], 0.1 + 64)
    body = stream.pack_body()
    assert len(body) == len(stream.payload) + 4 == len(stream.pack()) - 24
    head = Head.parse(stream.head.pack())
    again = Bitstream.parse_body(body, head, 40, 40)
    assert torch.equal(codec.decode_streams([again])[0], codec.decode(stream.pack()))
    for size in ((40, 39), (48, 40)):
        with pytest.raises(BitstreamError, match=r"not those that were coded|of a smaller image"):
            codec.decode_streams([Bitstream.parse_body(body, head, *size)])


def test_golden_stream(codec: ImageCodec) -> None:
    """A change here is a change of the format: streams that exist would no longer decode."""
    image = torch.arange(11)[:, None, None] * 20 + torch.arange(13)[:, None] * 3
    image = (image + torch.tensor([0, 9, 40])).to(torch.uint8)  # [11, 13, 3]
    golden = (
        "66636c01422f9341fc87287d000080420b000d0015865d81036ac71b2b5e6c5d5ac814591c8082d1588b03aefe"
        "92336f0dfab1221cf7614a736d874ac60e2e5c5b92d90eb0cce1d3b923b22a355294"
    )
    assert codec.encode(image, 64.0).hex() == golden
    codec.verify(bytes.fromhex(golden))


def test_only_the_entropy_model_decides(build: Build) -> None:
    codec = ImageCodec(build("hierarchical-tiny"))
    data = codec.encode(picture(64, 64), 64.0)
    before = codec.decode(data)
    with torch.no_grad():
        for part in (codec.model.encoder, codec.model.decoder):
            for parameter in part.parameters():
                parameter.mul_(1.5)
    codec.verify(data)
    assert not torch.equal(codec.decode(data), before)
    with torch.no_grad():
        next(codec.model.entropy.parameters()).mul_(1.5)
    with pytest.raises(BitstreamError, match=f"{data[4:12].hex()}; this codec has"):
        codec.decode(data)


def test_other_tables_are_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = ImageCodec(Stub())
    data = codec.encode(picture(8, 8), 64.0)
    other = gaussian_tables(0.11, 19.0)
    monkeypatch.setattr(StubEntropy, "tables", lambda self, i: other)
    with pytest.raises(BitstreamError, match="coded with the entropy model"):
        codec.verify(data)


@pytest.mark.parametrize("drifting", [0, 1])
def test_drift_is_noticed(
    codec: ImageCodec, monkeypatch: pytest.MonkeyPatch, drifting: int
) -> None:
    """One index that falls into the next bucket on another machine."""
    streams = codec.encode_streams([picture(32, 32), picture(32, 32, 1), picture(8, 8)], 64.0)
    prior = Phases.prior

    def drifted(self: Phases, i: int) -> tuple[Tensor, Tensor]:
        mean, index = prior(self, i)
        index = index.clone()
        if i == drifting and len(index) == 2:
            index[1, 0, 0, 0] += 1
        return mean, index

    monkeypatch.setattr(Phases, "prior", drifted)
    with pytest.raises(BitstreamError, match=r"streams\[1\]: The (decoded symbols|payload)"):
        codec.decode_streams(streams)


def test_bad_arguments(codec: ImageCodec) -> None:
    good = picture(8, 8)
    with pytest.raises(TypeError, match=r"image is torch.float32; it must be uint8"):
        codec.encode(good.float(), 64.0)
    with pytest.raises(FastcilError, match=r"shape \[8, 8\]; it must be \[H, W, 3\]"):
        codec.encode(good[..., 0], 64.0)
    with pytest.raises(FastcilError, match="height is 0"):
        codec.encode(good[:0], 64.0)
    with pytest.raises(FastcilError, match="lmbda is -1"):
        codec.encode(good, -1.0)
    large = torch.zeros(257, 256, 3, dtype=torch.uint8)
    with pytest.raises(FastcilError, match=r"257 x 256 pixels; the codec takes up to 65536"):
        codec.encode(large, 64.0)
    data = ImageCodec(codec.model).encode(large, 64.0)
    with pytest.raises(BitstreamError, match=r"257 x 256 pixels; it must have 1 to 65536"):
        codec.decode(data)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with something changed, half of the time with a CRC that fits."""
    body = bytearray(data[:-4])
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, max(len(body), 1)))
        kind = rng.integers(0, 8)
        if kind == 0:
            del body[at:]
        elif kind <= 3 and body:
            body[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 4:
            body[at:at] = rng.bytes(int(rng.integers(1, 40)))
        elif kind == 5:
            body[at : at + int(rng.integers(1, 9))] = b""
        elif kind == 6 and len(body) >= 20:
            struct.pack_into("<HH", body, 16, *rng.integers(0, 1 << rng.integers(1, 17), 2))
        elif len(body) > 24:
            body[24:] = rng.bytes(len(body) - 24)
    crc = zlib.crc32(body) if rng.integers(0, 2) else int(rng.integers(0, 1 << 32))
    return bytes(body) + struct.pack("<I", crc)


def fuzz(codec: ImageCodec, count: int, seed: int, seconds: float) -> int:
    """Decode mutated files; how many were let through."""
    rng = np.random.default_rng(seed)
    files = [codec.encode(picture(*size), 64.0) for size in ((16, 24), (64, 64), (1, 1))]
    codec.decode(files[0])
    memory, passed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for _ in range(count):
        data = mutated(files[int(rng.integers(0, len(files)))], rng)
        start = time.monotonic()
        try:
            image = codec.decode(data)
        except BitstreamError as error:
            assert str(error).count("\n") == 0
        else:
            facts = inspect(data)
            assert image.shape == (facts["height"], facts["width"], 3)
            passed += 1
        assert time.monotonic() - start < seconds
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 200 * 1024  # KiB
    return passed


def test_a_thousand_mutated_files(codec: ImageCodec) -> None:
    # What is let through has the right symbols, as after a mutation that undid the one before.
    assert fuzz(codec, 1000, seed=0, seconds=5) < 20


def fuzz_within(path: Path, count: int, seed: int, seconds: float, nbytes: int) -> None:
    """Fuzzes the codec in a file, in a process that can't have more memory than so much besides."""
    torch.set_num_threads(1)
    codec = ImageCodec(load_codec(path))
    # What is made once, such as tables, and the code that torch loads on its first use.
    codec.decode(codec.encode(picture(64, 64), 64.0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    assert fuzz(codec, count, seed, seconds) < 0.02 * count + 3


def fuzz_network(model: CodecModel, folder: Path, count: int, seed: int, minutes: float) -> None:
    """`fuzz_within` 600 MB and so many minutes, at the sizes that are taken by default."""
    path = folder / "codec.safetensors"
    save_codec(path, model)
    assert path.stat().st_size < 1_000_000
    process = FORKS.Process(target=fuzz_within, args=(path, count, seed, 20.0, 600 << 20))
    process.start()
    process.join(60 * minutes)
    alive = process.is_alive()
    if alive:
        process.kill()
        process.join()
    assert not alive and process.exitcode == 0


@pytest.mark.slow
def test_ten_thousand_mutated_files(codec: ImageCodec, build: Build, tmp_path: Path) -> None:
    assert fuzz(codec, 6000, seed=1, seconds=10) < 120
    for name, count in (("hierarchical-tiny", 3000), ("msh-vr", 500), ("gma-vr", 500)):
        fuzz_network(build(name), tmp_path, count, seed=3, minutes=20)


@pytest.mark.parametrize(("name", "count"), [("hierarchical-tiny", 200), ("gma-vr", 15)])
def test_mutated_files_of_a_network(build: Build, tmp_path: Path, name: str, count: int) -> None:
    fuzz_network(build(name), tmp_path, count, seed=2, minutes=5)


@pytest.mark.parametrize("name", REAL)
def test_a_few_bytes_that_claim_a_large_image_are_refused_at_once(
    build: Build, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = ImageCodec(build(name))
    (stream,) = codec.encode_streams([picture(64, 64)], 64.0)
    fed: list[int] = []
    monkeypatch.setattr(Phases, "feed", lambda self, i, symbols: fed.append(i))
    for payload in (b"", stream.payload[:40]):
        forged = Bitstream(stream.head, 4096, 4096, stream.check, payload).pack()
        start = time.monotonic()
        with pytest.raises(BitstreamError, match="The payload"):
            codec.decode(forged)
        # Nothing but the first and smallest latent was looked at.
        assert not fed and time.monotonic() - start < 20


@pytest.mark.parametrize("name", REAL)
def test_even_images_of_any_size_are_not_taken_for_such(build: Build, name: str) -> None:
    """Few bytes for many symbols, which is what a refusal must not go by."""
    codec = ImageCodec(build(name))
    for grey in (0, 255):
        data = codec.encode(torch.full((256, 320, 3), grey, dtype=torch.uint8), 64.0)
        codec.verify(data)


def test_a_payload_of_anything_is_refused(codec: ImageCodec) -> None:
    (stream,) = codec.encode_streams([picture(64, 64)], 64.0)
    rng = np.random.default_rng(0)
    for payload in (b"", b"\xff" * 4000, b"\0" * 4000, rng.bytes(1 << 20)):
        forged = Bitstream(stream.head, 256, 256, stream.check, payload)
        with pytest.raises(BitstreamError, match=r"payload|symbols"):
            codec.decode(forged.pack())
