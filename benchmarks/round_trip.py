"""Whether a learned codec's files keep what they promise, on real images and on odd sizes.

python benchmarks/round_trip.py CODEC kodak24.tar [more images] [--lambdas 32,1024] [--json OUT]

For every image and λ: the file decodes to the encoder's symbols, which it checks itself; its size
is what the model says it takes, within 1 %, a header and 16 bytes for each latent; and it decodes
alike with 1 and 2 threads, alone and 8 at a time, and in processes of their own that may use fewer
of the machine's instructions. Coded 8 at a time an image is the same but for single symbols. The
last line says ok; or the exit status is 1, and there is a line for each promise that was broken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcil.compression.bitstream import Bitstream
from fastcil.compression.codec import ImageCodec
from fastcil.compression.errors import BitstreamError
from fastcil.compression.evaluation import Photos, spread
from fastcil.compression.model import CodecModel
from fastcil.compression.saving import load_codec, save_codec
from fastcil.compression.training import lambda_range
from fastcil.data import ImageStore
from fastcil.engine.codec_files import SUFFIX, load_photos
from fastcil.engine.environment import environment
from fastcil.engine.state import write_atomically

HEADER, PER_LATENT, SHARE = 28, 16, 0.01
_MOVED = 0.1  # of a level, on average, where single symbols may differ
SIZES = ((1, 1), (1, 65), (64, 1), (3, 2), (63, 65), (129, 17), (224, 224), (31, 200))
INSTRUCTIONS: Mapping[str, Mapping[str, str]] = {
    "all": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "default": {
        **{"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
        "MKL_CBWR": "COMPATIBLE",
    },
}


@dataclass(frozen=True)
class Trip:
    """One image's file at one λ.

    Args:
        name: The image.
        lmbda: The trade-off.
        nbytes: The file's size.
        estimate: What the model's likelihoods say, in bytes.
    """

    name: str
    lmbda: float
    nbytes: int
    estimate: float

    def excess(self, latents: int) -> float:
        """Bytes by which the size is farther from the estimate than it may be; good up to 0."""
        allowed = SHARE * self.estimate + HEADER + PER_LATENT * latents
        return abs(self.nbytes - self.estimate) - allowed


def odd_photos(sizes: Sequence[tuple[int, int]] = SIZES) -> Photos:
    """Images of sizes that are no multiple of anything: waves with noise."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for height, width in sizes:
        y, x = torch.arange(height)[:, None, None] / 20, torch.arange(width)[:, None] / 20
        slopes = 0.5 + 1.5 * torch.rand(2, 3, generator=generator)
        waves = 128 + 100 * torch.sin(y * slopes[0] + x * slopes[1])
        noise = 4 * torch.randn(height, width, 3, generator=generator)
        images.append((waves + noise).clamp(0, 255).to(torch.uint8))
    names = tuple(f"{height}x{width}" for height, width in sizes)
    return Photos(names, ImageStore.from_images(images))


@torch.no_grad()
def estimate(model: CodecModel, image: Tensor, lmbda: float) -> float:
    """Bytes that an image takes by the likelihoods of the model's forward pass."""
    x = image.permute(2, 0, 1)[None] / 255
    out = model(x.to(next(model.parameters()).device), lmbda)
    nats = -sum(float(value.double().sum()) for value in out["log_likelihoods"].values())
    return nats / math.log(2) / 8


def broken_promises(
    model: CodecModel,
    photos: Photos,
    lambdas: Sequence[float],
    instructions: Mapping[str, Mapping[str, str]] = INSTRUCTIONS,
) -> tuple[list[Trip], list[str]]:
    """All files of some images, and a line for each thing that isn't as it should be.

    Args:
        model: In evaluation mode.
        photos: The images.
        lambdas: The trade-offs.
        instructions: Environments of the processes that decode everything once more, by name.
    """
    codec, trips, wrong = ImageCodec(model), [], []
    images = [photos.images.image(k) for k in range(len(photos))]
    files: dict[str, bytes] = {}
    for lmbda in lambdas:
        alone = []
        for name, image in zip(photos.names, images, strict=True):
            data = codec.encode(image, lmbda)
            trip = Trip(name, lmbda, len(data), estimate(model, image, lmbda))
            if trip.excess(len(model.latent_names)) > 0:
                wrong.append(f"{name} at {lmbda:g}: {len(data)} bytes, {trip.estimate:.1f} said")
            trips.append(trip)
            alone.append(data)
            files[f"{lmbda:g}/{name}"] = data
        ways = {
            "one by one, 1 thread": lambda alone=alone: _one_by_one(codec, alone, 1),
            "one by one, 2 threads": lambda alone=alone: _one_by_one(codec, alone, 2),
            "8 at a time": lambda alone=alone: _by_eights(codec, alone),
        }
        wrong += [f"at {lmbda:g}, {line}" for line in _differences(photos.names, images, ways)]
        together = _coded_by_eights(codec, photos.names, images, alone, lmbda)
        wrong += [f"at {lmbda:g}, coded 8 at a time: {line}" for line in together]
    for name, settings in instructions.items():
        wrong += _refused_elsewhere(model, files, name, settings)
    return trips, wrong


def _differences(
    names: Sequence[str], images: Sequence[Tensor], ways: Mapping[str, Callable[[], list[Tensor]]]
) -> Iterator[str]:
    """Where some ways to decode images disagree by more than a rounding, or fail."""
    first: list[Tensor] | None = None
    for way, decode in ways.items():
        try:
            found = decode()
        except BitstreamError as error:
            yield f"{way}: {error}"
            continue
        first = first or found
        for name, image, pixels, wanted in zip(names, images, found, first, strict=True):
            if pixels.shape != image.shape:
                yield f"{way}: {name} comes back as {list(pixels.shape)}"
            elif (pixels.int() - wanted.int()).abs().max() > 1:
                yield f"{way}: {name} has other pixels"


def _one_by_one(codec: ImageCodec, files: Sequence[bytes], threads: int) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [codec.decode(data) for data in files]
    finally:
        torch.set_num_threads(before)


def _by_eights(codec: ImageCodec, files: Sequence[bytes]) -> list[Tensor]:
    """Each file in one call with others of its size."""
    streams = [Bitstream.parse(data) for data in files]
    found: dict[int, Tensor] = {}
    for chosen in _eights([(stream.height, stream.width) for stream in streams]):
        found |= zip(chosen, codec.decode_streams([streams[k] for k in chosen]), strict=True)
    return [found[k] for k in range(len(files))]


def _coded_by_eights(
    codec: ImageCodec,
    names: Sequence[str],
    images: Sequence[Tensor],
    alone: Sequence[bytes],
    lmbda: float,
) -> Iterator[str]:
    """Where images coded in one call with others of their size become bad files, or other images.

    The encoder is not computed in the fixed mode, for its symbols are what the file holds: a
    feature halfway between two of them may be rounded otherwise in another batch.
    """
    for chosen in _eights([(image.shape[0], image.shape[1]) for image in images]):
        coded = codec.encode_streams([images[k] for k in chosen], lmbda)
        for k, stream in dict(zip(chosen, coded, strict=True)).items():
            data = stream.pack()
            if data == alone[k]:
                continue
            try:
                codec.verify(data)
            except BitstreamError as error:
                yield f"{names[k]}: {error}"
                continue
            pair = [codec.decode(file).int() for file in (data, alone[k])]
            moved = float((pair[0] - pair[1]).abs().float().mean())
            if moved > _MOVED:
                yield f"{names[k]} is another image, by {moved:.2f} of a level"


def _eights(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Places of one size, eight at a time; where they are fewer, some are there again."""
    for size in dict.fromkeys(sizes):
        places = [k for k, other in enumerate(sizes) if other == size]
        for start in range(0, len(places), 8):
            chosen = places[start : start + 8]
            yield (chosen * 8)[:8]


def _refused_elsewhere(
    model: CodecModel, files: Mapping[str, bytes], name: str, settings: Mapping[str, str]
) -> Iterator[str]:
    """What a process that may use other instructions does not decode to the same symbols."""
    with tempfile.TemporaryDirectory() as folder:
        save_codec(f"{folder}/codec.safetensors", model)
        for file, data in files.items():
            write_atomically(Path(folder) / "files" / f"{file}{SUFFIX}", data)
        command = [
            *(sys.executable, "-m", "fastcil", "codec", "verify", f"{folder}/files"),
            *("--model", f"{folder}/codec.safetensors", "--device", "cpu"),
        ]
        done = subprocess.run(
            command, env={**os.environ, **settings}, capture_output=True, text=True, check=False
        )
    if done.returncode:
        yield from (f"instructions {name}: {line}" for line in done.stdout.splitlines())
        yield f"instructions {name}: {done.stderr.strip()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all on images and on odd sizes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("codec", help="a file that fastcil codec train wrote")
    parser.add_argument("images", nargs="*", help="image files, folders or tars")
    parser.add_argument("--lambdas", help="with commas between; 4 over the codec's range")
    parser.add_argument("--json", help="where to keep the figures")
    options = parser.parse_args(arguments)
    model = load_codec(options.codec)
    lambdas = (
        [float(part) for part in options.lambdas.split(",")]
        if options.lambdas
        else spread(lambda_range(model))
    )
    sets = {"odd sizes": odd_photos()}
    if options.images:
        sets["images"] = load_photos(options.images)
    kept: dict[str, Any] = {"environment": environment("cpu")}
    failed = False
    for what, photos in sets.items():
        trips, wrong = broken_promises(model, photos, lambdas)
        nearest = max(trip.excess(len(model.latent_names)) for trip in trips)
        print(f"{what}: {len(trips)} files, {len(wrong)} wrong; {-nearest:.0f} bytes to spare")
        print(*wrong, sep="\n", end="\n" if wrong else "")
        kept[what] = {"files": [asdict(trip) for trip in trips], "wrong": wrong}
        failed = failed or bool(wrong)
    if options.json:
        write_atomically(Path(options.json), json.dumps(kept, indent=1).encode())
    print("failed" if failed else "ok")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
