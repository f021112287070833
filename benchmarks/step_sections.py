"""The sections of `step_run`: methods, PyCIL and Mammoth beside ours, memory, photos, ranks."""

from __future__ import annotations

import gc
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ranks
import torch
from clocks import in_turn
from step_case import BEST, MODES, Epoch, Run, Work

METHODS = ("finetune", "icarl", "der", "foster", "foster+cim", "gem", "dlcft")
OURS, THEIRS = "fastcil", "PyCIL"
MAMMOTH = "Mammoth"
# Mammoth's network, its width, and images in its buffer: a step of GEM's sees all of them.
MAMMOTHS = {"darkpp": ("resnet18", 64, 500), "gem": ("reduced-resnet18", 20, 200)}
MAMMOTH_BATCH = 32
PHOTO_SIDE, PHOTO_BATCH, PHOTO_STEPS = 224, 32, 6
SHARED_BATCH = 64
_SHORT = 5  # steps of an epoch where only shares are wanted


def whole(arguments: Namespace) -> Work:
    """CIFAR-100, ten classes at a time, 2,000 exemplars."""
    return Work("CIFAR-100", arguments.data, batch=arguments.batch)


def few(arguments: Namespace) -> Work:
    """The same with a fifth of the images: a step is the same."""
    return Work(
        "CIFAR-100",
        part(arguments.data, train_per_class=100, test_per_class=1),
        batch=arguments.batch,
    )


def stream(arguments: Namespace) -> Work:
    """Five classes at a time, few images."""
    data = part(arguments.data, train_per_class=8, test_per_class=1)
    return Work("CIFAR-100", data, "b0-inc5", "200 images", batch=min(16, arguments.batch))


def part(data: str, **limits: int | str) -> str:
    """A part of a data set, as `fastcil.train` takes it; limits that it has already stay."""
    name, _, own = data.partition(":")
    told = dict(item.split("=") for item in own.split(",") if item)
    joined = {**{key: str(value) for key, value in limits.items()}, **told}
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in joined.items())


def in_rounds(ways: Mapping[str, Callable[[], Epoch]], rounds: int) -> dict[str, list[Epoch]]:
    """Epochs of all ways in turn."""
    taken: dict[str, list[Epoch]] = {way: [] for way in ways}
    for way, run in in_turn(ways, rounds):
        gc.collect()
        taken[way].append(run())
    return taken


def summary(epochs: list[Epoch]) -> dict[str, Any]:
    """Medians of a way's epochs, and how its time is shared."""
    phases: dict[str, float] = {}
    for epoch in epochs:
        for name, seconds in epoch.phases.items():
            phases[name] = phases.get(name, 0.0) + seconds
    spent = sum(phases.values())
    peaks = [epoch.peak for epoch in epochs if epoch.peak is not None]
    return {
        "rate": round(statistics.median(epoch.rate for epoch in epochs), 2),
        "rates": [round(epoch.rate, 2) for epoch in epochs],
        "shares": {name: round(seconds / spent, 4) for name, seconds in phases.items()},
        "peak": max(peaks) if peaks else None,
    }


def modes_of(method: str, arguments: Namespace) -> list[str]:
    """What is timed of a method: compiling takes a minute or more on a CPU."""
    compiled = arguments.device != "cpu" or method in arguments.compiled.split(",")
    return [mode for mode in MODES if mode != BEST or compiled]


def methods(arguments: Namespace) -> list[dict[str, Any]]:
    """Every method in every mode."""
    rows = []
    for method in filter(None, arguments.methods.split(",")):
        run = Run(method, few(arguments), arguments.device)
        modes = modes_of(method, arguments)
        for mode in modes:
            run.epoch(2, mode)
        ways = {mode: partial(run.epoch, _SHORT, mode) for mode in modes}
        taken = in_rounds(ways, max(1, arguments.rounds - 1))
        rows += [
            {"method": method, "mode": mode, **summary(epochs)} for mode, epochs in taken.items()
        ]
        del run, ways
        torch.compiler.reset()
    return rows


def arrays(arguments: Namespace) -> tuple[Any, Any, Any, Any]:
    """CIFAR-100 as NumPy has it, from fastcil's own reader: both sides see the same images."""
    from fastcil.data import load

    dataset = load(arguments.data)
    found: list[Any] = []
    for examples in (dataset.train, dataset.test):
        height, width = examples.images.sizes[0].tolist()
        found.append(examples.images.pixels.reshape(-1, height, width, 3).cpu().numpy())
        found.append(examples.labels.cpu().numpy())
    x, y, x_test, y_test = found
    return x, y, x_test, y_test


def peers(arguments: Namespace) -> list[dict[str, Any]]:
    """Epochs of both sides in turn."""
    if arguments.pycil is None:
        return []
    from pycil import Peer

    rows = []
    data = arrays(arguments)
    for method in filter(None, arguments.peers.split(",")):
        peer = Peer(
            arguments.pycil,
            method,
            "cifar100",
            data,
            "resnet32",
            arguments.batch,
            2000,
            10,
            arguments.device,
            remembers=False,
        )
        run = Run(method, few(arguments), arguments.device)
        # PyCIL's network carries a classifier of ten classes that nothing uses.
        assert peer.extractor_parameters() - run.extractor_parameters() == 650, "other networks"
        modes = ["fp32", "bf16", BEST] if method == "foster" else modes_of(method, arguments)
        steps = arguments.steps if method == "foster" else max(2, arguments.steps // 3)
        row = beside(run, peer, THEIRS, modes, steps, arguments.rounds)
        row["read"] = {THEIRS: round(peer.read(8), 1), OURS: round(run.read(40), 1)}
        rows.append({"method": method, **row})
        del peer, run
    return rows


def mammoths(arguments: Namespace) -> list[dict[str, Any]]:
    """Epochs of Mammoth's and ours in turn; images count as often as a network sees them."""
    if arguments.mammoth is None:
        return []
    from mammoth import Peer

    rows = []
    for method, (network, width, held) in MAMMOTHS.items():
        batch = min(MAMMOTH_BATCH, arguments.batch)
        peer = Peer(
            arguments.mammoth, method, arrays(arguments), network, batch, held, arguments.device
        )
        options = {"network.name": "resnet18", "network.width": width, "network.stem": "cifar"}
        memory = f"{held} images"
        work = Work("CIFAR-100", few(arguments).data, memory=memory, batch=batch, options=options)
        run = Run(method, work, arguments.device)
        assert peer.extractor_parameters() == run.extractor_parameters(), "other networks"
        modes = modes_of(method, arguments)
        row = beside(run, peer, MAMMOTH, modes, max(2, arguments.steps // 2), arguments.rounds)
        rows.append({"method": method, **row})
        del peer, run
    return rows


def beside(
    run: Run, peer: Any, theirs: str, modes: list[str], steps: int, rounds: int
) -> dict[str, Any]:
    """Epochs of a peer's and of ours in every mode, in turn."""
    ways: dict[str, Callable[[], Epoch]] = {theirs: partial(peer.epoch, steps)}
    for mode in modes:
        run.epoch(2, mode)
        ways[f"{OURS}, {mode}"] = partial(run.epoch, steps, mode)
    peer.epoch(1)
    taken = in_rounds(ways, rounds)
    return {"steps": steps, "ways": {way: summary(epochs) for way, epochs in taken.items()}}


def memory(arguments: Namespace) -> list[dict[str, Any]]:
    """Seconds to fill the memory after FOSTER's second task, both networks of which look on."""
    run = Run("foster", whole(arguments), arguments.device)
    rows: dict[str, list[float]] = {}
    held = {}
    for _ in range(max(1, arguments.rounds - 1)):
        for mode in ("fp32", "bf16"):
            seconds, held[f"{OURS}, {mode}"] = run.remember(mode)
            rows.setdefault(f"{OURS}, {mode}", []).append(seconds)
    if arguments.pycil is not None:
        from pycil import Peer

        data = arrays(arguments)
        peer = Peer(
            *(arguments.pycil, "foster", "cifar100", data, "resnet32", arguments.batch),
            *(2000, 10, arguments.device),
        )
        seconds, held[THEIRS] = peer.remember()
        rows[THEIRS] = [seconds]
    return [
        {"way": way, "seconds": round(statistics.median(taken), 3), "exemplars": held[way]}
        for way, taken in rows.items()
    ]


def shared(arguments: Namespace) -> Iterator[dict[str, Any]]:
    """A run of ten classes by one process and by more."""
    limits: dict[str, int | str] = {"classes": "0-9", "train_per_class": 250}
    options = {
        "engine.epoch_scale": arguments.epochs,
        "engine.batch_size": min(SHARED_BATCH, arguments.batch),
    }
    counts = [int(count) for count in arguments.processes.split(",")]
    return ranks.rows(counts, part(arguments.data, **limits), arguments.device, options)


def photos(arguments: Namespace) -> list[dict[str, Any]]:
    """Photos at 224 pixels: loaders alone, and FOSTER's boosting epoch on ResNet-18."""
    if not arguments.photos:
        return []
    options = {"network.name": "resnet18", "augment.size": PHOTO_SIDE}
    work = Work("photos", arguments.photos, memory="500 images", batch=PHOTO_BATCH, options=options)
    run = Run("foster", work, arguments.device)
    ways: dict[str, Callable[[], Epoch]] = {}
    for mode in ("fp32", "bf16"):
        run.epoch(1, mode)
        ways[f"{OURS}, {mode}"] = partial(run.epoch, PHOTO_STEPS, mode)
    reads: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if arguments.pycil is not None:
            from pycil import Peer

            peer = Peer(
                *(arguments.pycil, "foster", "imagenet100"),
                as_files(run, Path(folder)),
                *("resnet18", PHOTO_BATCH, 500, 10, arguments.device),
                remembers=False,
            )
            ways[THEIRS] = partial(peer.epoch, PHOTO_STEPS)
            reads[THEIRS] = peer.read(8)
        reads[OURS] = run.read(8)
        taken = in_rounds(ways, max(1, arguments.rounds - 1))
    return [
        {
            "ways": {way: summary(epochs) for way, epochs in taken.items()},
            "read": {way: round(rate, 1) for way, rate in reads.items()},
        }
    ]


def as_files(run: Run, folder: Path) -> tuple[Any, Any, Any, Any]:
    """The images of a run as JPEG files, as PyCIL reads photos."""
    from PIL import Image

    found: list[Any] = []
    for name, examples in (("train", run.plan.dataset.train), ("test", run.plan.dataset.test)):
        paths = []
        for place in range(len(examples)):
            path = folder / f"{name}-{place}.jpg"
            Image.fromarray(examples.images.image(place).numpy()).save(path, quality=90)
            paths.append(str(path))
        found += [np.array(paths), examples.labels.numpy()]
    x, y, x_test, y_test = found
    return x, y, x_test, y_test
