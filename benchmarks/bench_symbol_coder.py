"""The learned codec's entropy coder, fastcil.compression.coder, beside CompressAI's.

A photo's worth of symbols, 108,544, each under one of the 64 Gaussian tables: at low, middle and
high rate the tables of small, middle and large scales are the usual ones. Ours takes NumPy arrays
and groups them by table; CompressAI's rANS coder, of which the extension alone is loaded, takes the
lists that its `EntropyModel.compress` makes of tensors, which is timed with it as it is there.

A way is timed only after it has given the symbols back, in at most 1 % more than they hold.

python benchmarks/bench_symbol_coder.py photo [--model CODEC] [--name hierarchical] [--image FILE]

tells where the time of one photo goes: networks of the encoder and the decoder, the entropy model
in its fixed mode, and the coder. The image is 768 x 512 of noise smoothed, unless one is given.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from op_case import OURS, OpCase, Step
from torch import Tensor
from torch.nn import functional

from fastcil.compression.codec import ImageCodec
from fastcil.compression.coder import SymbolDecoder, SymbolEncoder, information
from fastcil.compression.gaussian_tables import gaussian_tables
from fastcil.compression.model import CodecModel
from fastcil.compression.phases import Phases
from fastcil.compression.saving import load_codec
from fastcil.compression.tables import PRECISION, Tables
from fastcil.compression.zoo import CODECS, build_codec
from fastcil.engine.codec_files import load_photos

COUNT, SMALL = 108_544, 2_000
RANS_BITS = 16
# Middle table of a rate, and how far others are spread around it.
RATES = {"low rate": (4, 4), "middle rate": (16, 8), "high rate": (32, 8)}
REPETITIONS = 5
PARTS = {
    "encoder's networks": (CodecModel, ("features",)),
    "quantiser": (Phases, ("quantise",)),
    "entropy model": (Phases, ("__init__", "prior", "feed")),
    "coder": (Phases, ("write", "read")),
    "decoder's networks": (Phases, ("image",)),
}


def symbols(rate: str, full: bool) -> tuple[NDArray[np.int32], NDArray[np.uint8], Tables]:
    """Symbols as their tables have them, and the table of each."""
    tables, generator = gaussian_tables(), np.random.default_rng(0)
    middle, spread = RATES[rate]
    drawn = generator.normal(middle, spread, COUNT if full else SMALL).round()
    index = drawn.clip(0, len(tables) - 1).astype(np.uint8)
    sigmas = 0.11 * (20 / 0.11) ** (index / (len(tables) - 1))
    return generator.normal(0, sigmas).round().astype(np.int32), index, tables


def rans() -> ModuleType | None:
    """CompressAI's extension by itself: its package needs torchvision to be imported."""
    package = importlib.util.find_spec("compressai")
    for folder in (package and package.submodule_search_locations) or ():
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            file = Path(folder) / f"ans{suffix}"
            if file.is_file():
                spec = importlib.util.spec_from_file_location("ans", file)
                assert spec is not None and spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
    return None


def rans_tables(tables: Tables) -> tuple[list[list[int]], list[int], list[int]]:
    """The tables as cumulated frequencies in 16 bits, their lengths, their first symbols."""
    cdfs = []
    for row in np.split(tables.frequencies, tables.starts[1:]):
        share = np.maximum(row >> (PRECISION - RANS_BITS), 1)
        share[share.argmax()] += (1 << RANS_BITS) - share.sum()
        cdfs.append([0, *share.cumsum().tolist()])
    return cdfs, [len(cdf) for cdf in cdfs], tables.low.tolist()


def encode_ours(values: NDArray[np.int32], index: NDArray[np.uint8], tables: Tables) -> bytes:
    encoder = SymbolEncoder()
    encoder.encode(values, index, tables)
    return encoder.finish()


def decode_ours(data: bytes, index: NDArray[np.uint8], tables: Tables) -> NDArray[np.int32]:
    return SymbolDecoder(data).decode(index, tables)


def make(what: str, rate: str, name: str, full: bool) -> Step | None:
    """A way to encode or to decode, checked."""
    values, index, tables = symbols(rate, full)
    encode: Callable[[], Any]
    decode: Callable[[Any], Any]
    if name == OURS:
        encode = partial(encode_ours, values, index, tables)
        decode = partial(decode_ours, index=index, tables=tables)
    else:
        ans = rans()
        if ans is None:
            return None
        rest = rans_tables(tables)
        told, places = torch.from_numpy(values), torch.from_numpy(index.astype(np.int32))

        def encode() -> Any:
            return ans.RansEncoder().encode_with_indexes(told.tolist(), places.tolist(), *rest)

        def decode(data: Any) -> Any:
            back = ans.RansDecoder().decode_with_indexes(data, places.tolist(), *rest)
            return torch.tensor(back, dtype=torch.int32).numpy()

    data = encode()
    assert np.array_equal(decode(data), values), f"{name} gives other symbols back"
    held = information(values, index, tables) / 8
    assert len(data) <= 1.01 * held + 16, f"{name} takes {len(data)} bytes, {held:.0f} would do"
    return encode if what == "encode" else partial(decode, data)


CASES = [
    OpCase(
        "symbol_coder",
        f"{what} {COUNT:,} symbols, {rate}",
        (OURS, "compressai"),
        partial(make, what, rate),
        threads=1,
    )
    for what in ("encode", "decode")
    for rate in RATES
]


@contextmanager
def watched(seconds: dict[str, float]) -> Iterator[None]:
    """Adds up what the parts of coding take; what one calls of another counts there alone."""
    under_way: list[str] = []

    def timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            under_way.append(part)
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start
                under_way.pop()
                seconds[part] += taken
                if under_way:
                    seconds[under_way[-1]] -= taken

        return call

    with ExitStack() as patches:
        for part, (owner, names) in PARTS.items():
            for name in names:
                method = timed(part, getattr(owner, name))
                patches.enter_context(mock.patch.object(owner, name, method))
        yield


def shares(action: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Seconds of an action, the median of some, and of its parts in that one."""
    taken = []
    for _ in range(REPETITIONS):
        parts: dict[str, float] = defaultdict(float)
        start = time.perf_counter()
        with watched(parts):
            action()
        taken.append((time.perf_counter() - start, dict(parts)))
    return sorted(taken, key=lambda pair: pair[0])[REPETITIONS // 2]


def smooth_noise(height: int = 512, width: int = 768) -> Tensor:
    """An image that is neither flat nor all noise, uint8 [H, W, 3]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=generator)
    fine = functional.interpolate(coarse, (height, width), mode="bicubic", antialias=True)
    return (fine[0].permute(1, 2, 0) * 255).clamp(0, 255).to(torch.uint8)


def photo(model: CodecModel, image: Tensor, lmbda: float) -> None:
    """Prints where the time of one image goes."""
    codec = ImageCodec(model)
    data = codec.encode(image, lmbda)
    print(f"{image.shape[1]} x {image.shape[0]}, {torch.get_num_threads()} thread(s), ", end="")
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(data):,} bytes")
    found = {
        "encode": shares(lambda: codec.encode(image, lmbda)),
        "decode": shares(lambda: codec.decode(data)),
    }
    print(f"{'':20}" + "".join(f"{what:>18}" for what in found))
    print(f"{'all':20}" + "".join(f"{total * 1e3:15.0f} ms" for total, _ in found.values()))
    for part in PARTS:
        cells = [f"{parts.get(part, 0) / total:17.1%}" for total, parts in found.values()]
        print(f"{part:20}" + " ".join(cells))


def main() -> None:
    """Tells where the time of one photo goes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["photo"])
    parser.add_argument("--model", help="a file that fastcil codec train wrote")
    parser.add_argument("--name", default="hierarchical-small", choices=list(CODECS))
    parser.add_argument("--image", help="an image file, a folder or a tar, whose first is taken")
    parser.add_argument("--lambda", dest="lmbda", type=float, default=128.0)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = load_codec(options.model) if options.model else build_codec(options.name).eval()
    image = load_photos([options.image]).images.image(0) if options.image else smooth_noise()
    photo(model, image, options.lmbda)


if __name__ == "__main__":
    main()
