"""Ingest and what it gives: images written once and memory-mapped, beside images in memory.

FASTCIL_DATA=... python benchmarks/bench_ingest.py [--sources A,B] [--workers 1,2] [--out FOLDER]

Of each source: how fast `fastcil ingest` writes it, images left as they are and shrunk to a short
side of 256; how fast `fastcil.data.load` is from the files and from what was written, and how large
its process gets; and how fast batches of 64 crops of 224 x 224 are read, shuffled, by
`fastcil.data.read_batch` on one thread: from memory, from the map once the system has the file in
its cache, and from the map after the cache was dropped (`POSIX_FADV_DONTNEED`, which needs no
rights).

From the rate at a short side of 256 comes an estimate of what ImageNet takes, 1,281,167 training
and 50,000 validation images: `IMAGENET_NBYTES` is 3 x 256 x 256 times the mean ratio of a photo's
sides, 4 : 3.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import torch

from fastcil.data import Augmentation, Dataset, load, read_batch
from fastcil.data.ingest import ingest
from fastcil.data.places import resolve

IMAGENET_IMAGES = 1_281_167 + 50_000
IMAGENET_NBYTES = IMAGENET_IMAGES * 3 * 256 * 256 * 4 // 3
SHORT_SIDE, BATCH, SIDE = 256, 64, 224
_LOAD = """
import json, resource, sys, time
from fastcil.data import load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
data = load(sys.argv[1])
seconds = time.perf_counter() - began
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, 1024 * (after - before)]))
"""


def written(source: Path, out: Path, workers: int, short_side: int | None) -> tuple[float, float]:
    """Images and bytes of pixels a second; the folder is left."""
    began = time.perf_counter()
    ingest(source, out, workers=workers, short_side=short_side)
    seconds = time.perf_counter() - began
    data = load(out)
    nbytes = (out / "pixels.bin").stat().st_size
    return (len(data.train) + len(data.test)) / seconds, nbytes / seconds


def loaded(path: Path) -> tuple[float, int]:
    """Seconds to load, and by how many bytes that lets a process grow at the most."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    seconds, grown = json.loads(done.stdout)
    return seconds, grown


def batches_per_second(data: Dataset) -> float:
    """Images a second, over one shuffle of the training part."""
    images, augmentation = data.train.images, Augmentation.photos(SIDE)
    draws = torch.Generator().manual_seed(0)
    sizes = images.sizes
    began = time.perf_counter()
    for rows in torch.randperm(len(images), generator=draws).split(BATCH):
        crops, flips = augmentation.draw(sizes[rows], draws)
        read_batch([images], torch.zeros_like(rows), rows, augmentation, crops, flips)
    return len(images) / (time.perf_counter() - began)


def forget(file: Path) -> None:
    """Lets the system drop a file from its cache."""
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(source: Path, folder: Path, workers: list[int]) -> Iterator[tuple[str, str]]:
    """What is measured of a source, and its figures."""
    rate = 0.0
    for short_side in (None, SHORT_SIDE):
        for count in workers:
            out = folder / f"{short_side}-{count}"
            rate, nbytes = written(source, out, count, short_side)
            side = "as they are" if short_side is None else f"short side {short_side}"
            yield (
                f"ingest, {side}, {count} process(es)",
                f"{rate:,.0f} images/s, {nbytes / 1e6:,.0f} MB/s written",
            )
    out = folder / f"None-{workers[-1]}"
    for name, path in (("load, files", source), ("load, mapped", out)):
        seconds, grown = loaded(path)
        yield name, f"{seconds:.2f} s, process grows by {grown / 1e6:,.0f} MB"
    in_memory, mapped = load(source), load(out)
    torch.set_num_threads(1)
    # In turn, so that both meet the same machine; the first of each fills caches.
    rates = [[batches_per_second(data) for data in (in_memory, mapped)] for _ in range(5)][1:]
    for name, column in zip(("memory", "map, cached"), zip(*rates, strict=True), strict=True):
        yield f"batches from {name}", f"{max(column):,.0f} images/s"
    del mapped
    forget(out / "pixels.bin")
    yield "batches from map, cold", f"{batches_per_second(load(out)):,.0f} images/s"
    hours = IMAGENET_IMAGES / rate / 3600
    yield (
        "ImageNet at this rate (estimate)",
        f"{IMAGENET_NBYTES / 1e9:,.0f} GB, {hours:.1f} hours with {workers[-1]} process(es)",
    )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sources", default="caltech101-50c.tar,clothing-15c.tar")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--out", help="folder for what is written; a temporary one if not given")
    options = parser.parse_args()
    workers = [int(count) for count in options.workers.split(",")]
    print(f"python {' '.join(sys.argv)}")
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, load"
        f" {os.getloadavg()[0]:.1f}; torch {torch.__version__}, OpenCV {cv2.__version__}"
    )
    for name in options.sources.split(","):
        with tempfile.TemporaryDirectory(dir=options.out) as folder:
            print(f"\n{name}")
            for what, figures in measure(resolve(name), Path(folder), workers):
                print(f"  {what:45} {figures}", flush=True)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
