"""Codecs trained to files: resuming to the same bits, learning, histories, what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from fastcil.compression import (
    CodecRecipe,
    CodecTraining,
    build_codec,
    entropy_hash,
    load_codec,
    load_with_facts,
    save_codec,
)
from fastcil.compression.codec import ImageCodec
from fastcil.data import ImageStore
from fastcil.data.ingest import ingest
from fastcil.engine.codec_training import CHECKPOINT, LOG, finetune_codec, train_codec
from fastcil.errors import FastcilError

DATA = "scenes:classes=2,size=80,train_per_class=5,test_per_class=1"
OLD = "scenes:classes=2,size=80,train_per_class=3,test_per_class=1,seed=4"
BRIEF = CodecTraining(CodecRecipe(epochs=4, lr=1e-3, batch_size=4), epoch_steps=1, size=64)
REPLAY = replace(BRIEF, strategy="kr", ema=0.5, ema_ramp=2.0, lambda_range=(32.0, 4096.0))
QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "threads": 1}

FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A codec to fine-tune."""
    torch.manual_seed(1)
    path = tmp_path / "start.safetensors"
    save_codec(path, build_codec("msh-vr", hidden=8, latent=8, embedding=8), [{"seed": 1}])
    return path


def finetune(start: Path, out: Path, training: CodecTraining = REPLAY, **options: Any) -> None:
    replay = OLD if training.strategy == "kr" else None
    finetune_codec(start, DATA, out, replay=replay, training=training, **{**QUIET, **options})


def long_run(start: Path, out: Path) -> dict[str, Any]:
    """A run that saves after every step."""
    training = replace(REPLAY, recipe=replace(REPLAY.recipe, epochs=10), epoch_steps=2)
    given = {"model": start, "data": DATA, "out": out, "replay": OLD, "training": training}
    return {**given, **QUIET, "checkpoint_seconds": 0}


def lines(out: Path) -> int:
    log = out.with_name(f"{out.name}.run") / LOG
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def test_killed_runs_end_in_the_same_bits(start: Path, tmp_path: Path) -> None:
    FORKS.set_forkserver_preload(["fastcil.engine.codec_training", "torch._dynamo"])
    luck = random.Random(os.getpid())
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    waits = [(luck.randint(4, 6), luck.uniform(0, 0.05)) for _ in range(2)]
    for count, seconds in waits:
        before = lines(out)
        process = FORKS.Process(target=finetune_codec, kwargs=long_run(start, out))
        process.start()
        while process.is_alive() and lines(out) < before + count:
            time.sleep(0.003)
        process.join(seconds)
        assert process.is_alive(), f"it ended before it was killed; waits {waits}"
        process.kill()
        process.join()
    assert not out.exists()
    finetune_codec(**long_run(start, out))
    log = (out.with_name(f"{out.name}.run") / LOG).read_text()
    assert log.count('"event": "resumed"') >= 1, waits
    finetune_codec(**long_run(start, whole))
    assert out.read_bytes() == whole.read_bytes(), waits
    assert [file.name for file in out.with_name(f"{out.name}.run").iterdir()] == [LOG]


def test_a_finished_run_is_read_and_another_one_refused(start: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    finetune(start, out)
    before, told = out.read_bytes(), lines(out)
    finetune(start, out)
    assert (out.read_bytes(), lines(out)) == (before, told)
    with pytest.raises(FastcilError, match=r"training\.alpha was 0\.5, now 0\.25"):
        finetune(start, out, replace(REPLAY, alpha=0.25))
    with pytest.raises(FastcilError, match="seed was 0, now 5"):
        finetune(start, out, seed=5)
    assert out.read_bytes() == before


def test_a_checkpoint_of_another_run_is_refused(start: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"

    class StopError(Exception):
        pass

    def stop(event: str, fields: dict[str, Any]) -> None:
        if event == "epoch" and fields["epoch"] == 1:
            raise StopError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopError):
        patch.setattr("fastcil.engine.codec_training.make_progress", lambda _: stop)
        finetune(start, out, checkpoint_seconds=0)
    folder = out.with_name(f"{out.name}.run")
    assert (folder / CHECKPOINT).is_file() and not out.exists()
    with pytest.raises(FastcilError, match=r"training\.recipe\.lr was 0\.001, now 0\.002"):
        finetune(start, out, replace(REPLAY, recipe=replace(REPLAY.recipe, lr=2e-3)))
    finetune(start, out)
    straight = tmp_path / "straight.safetensors"
    finetune(start, straight)
    assert out.read_bytes() == straight.read_bytes()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    recipe = CodecRecipe(epochs=3, lr=3e-3, batch_size=2)
    training = CodecTraining(recipe, epoch_steps=6, size=64)
    out = tmp_path / "codec.safetensors"
    model = train_codec(DATA, out, model="hierarchical-tiny", training=training, **QUIET)
    log = (tmp_path / "codec.safetensors.run" / LOG).read_text().splitlines()
    losses = [line["losses"] for line in map(json.loads, log) if line["event"] == "epoch"]
    totals = [sum(terms.values()) for terms in losses]
    assert len(totals) == 3 and totals[2] < 0.7 * totals[0]
    again = load_codec(out)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_the_same_seed_trains_the_same_codec(tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(made))
        before = torch.get_rng_state()
        brief = replace(BRIEF, recipe=replace(BRIEF.recipe, epochs=1))
        train_codec(
            DATA, tmp_path / name, model="hierarchical-tiny", training=brief, **QUIET, seed=seed
        )
        assert torch.equal(torch.get_rng_state(), before)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1] != made[2]


def test_the_history_grows_and_the_entropy_model_stays(start: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    finetune(start, first)
    finetune(first, second, replace(BRIEF, strategy="enc", lambda_range=(4.0, 4096.0)))
    model, facts = load_with_facts(second)
    assert [entry["seed"] for entry in facts.history] == [1, 0, 0]
    assert [entry["training"]["strategy"] for entry in facts.history[1:]] == ["kr", "enc"]
    kr, enc = facts.history[1:]
    assert kr["data"]["images"] == 10 and kr["replay"]["images"] == 6 and enc["replay"] is None
    assert facts.lambda_range == (4, 4096)
    assert model.embeddings["decoder"].range.tolist() == [32, 4096]
    assert entropy_hash(model) == entropy_hash(load_codec(start))


def coded(start: Path, folder: Path, sizes: tuple[int, ...] = (64, 100, 130)) -> Path:
    """Streams of the codec to fine-tune, and nothing else."""
    codec = ImageCodec(load_codec(start))
    folder.mkdir(parents=True)
    for number, side in enumerate(sizes):
        pixels = torch.arange(side * 80 * 3).view(side, 80, 3) * (number + 3) % 251
        (folder / f"{number}.fcl").write_bytes(codec.encode(pixels.byte(), 100.0 * (number + 1)))
    return folder


def drift(start: Path, new: Path, folder: Path) -> float:
    """How far a new decoder is from the old one on old streams."""
    old, later = (ImageCodec(load_codec(path)) for path in (start, new))
    pairs = [
        [codec.decode(file.read_bytes()).float() for codec in (old, later)]
        for file in sorted(folder.iterdir())
    ]
    return sum(float((a - b).square().mean()) for a, b in pairs)


STREAMS = CodecTraining(
    CodecRecipe(epochs=4, lr=3e-3, batch_size=4), 5, 64, strategy="kr", target="outputs"
)


def test_stored_streams_are_replayed(start: Path, tmp_path: Path) -> None:
    """Nothing old is there but the streams; the new decoder still stays closer to the old one."""
    folder = coded(start, tmp_path / "streams")
    kr, without, again = (tmp_path / name for name in ("kr", "enc-dec", "again"))
    finetune_codec(start, DATA, kr, replay=folder, training=STREAMS, **QUIET)
    finetune_codec(start, DATA, without, training=replace(STREAMS, strategy="enc-dec"), **QUIET)
    assert drift(start, kr, folder) < 0.8 * drift(start, without, folder)
    codec, facts = ImageCodec(load_codec(kr)), load_with_facts(kr)[1]
    for file in folder.iterdir():
        codec.verify(file.read_bytes())
    replay = facts.history[-1]["replay"]
    assert replay["source"] == str(folder) and replay["streams"] == 3
    assert entropy_hash(load_codec(kr)) == entropy_hash(load_codec(start))
    finetune_codec(start, DATA, again, replay=folder, training=STREAMS, **QUIET)
    assert again.read_bytes() == kr.read_bytes()
    one = str(folder / "1.fcl")
    finetune_codec(start, DATA, tmp_path / "one", replay=one, training=STREAMS, **QUIET)
    assert load_with_facts(tmp_path / "one")[1].history[-1]["replay"]["streams"] == 1


def test_streams_that_cannot_be_replayed_are_refused(start: Path, tmp_path: Path) -> None:
    folder = coded(start, tmp_path / "streams")
    given = {"model": start, "data": DATA, "out": tmp_path / "out", "replay": folder, **QUIET}

    def refused(says: str, training: CodecTraining = STREAMS, **changes: Any) -> None:
        with pytest.raises(FastcilError, match=says):
            finetune_codec(**{**given, "training": training, **changes})
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()

    refused("target is 'originals'", replace(STREAMS, target="originals"))
    large = replace(STREAMS, size=128)
    refused(r"0\.fcl': The stream's image is 64 x 128 .* windows are of 128", large)
    (folder / "0.png").write_bytes(b"")
    refused("holds both images and .fcl files")
    (folder / "0.png").unlink()
    torch.manual_seed(9)
    other = tmp_path / "other"
    save_codec(other, build_codec("msh-vr", hidden=8, latent=8, embedding=8))
    refused(r"0\.fcl': The stream was coded with the entropy model", model=other)
    damaged = folder / "1.fcl"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    refused(r"1\.fcl': The stream's CRC-32")
    with pytest.warns(UserWarning, match="1 left out, the first: .*1.fcl"):
        finetune_codec(**given, training=STREAMS, skip_bad=True)
    assert load_with_facts(tmp_path / "out")[1].history[-1]["replay"]["streams"] == 2


def test_a_store_trains_what_its_tree_does(start: Path, tmp_path: Path) -> None:
    """Images that were ingested without classes, and are mapped."""
    for k, name in enumerate(("train2017/a", "train2017/b", "val2017/c", "train2017/d")):
        file = tmp_path / "coco" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (70 + k, 90, 3), dtype=np.uint8)
        cv2.imwrite(str(file), pixels)
    store = ingest(tmp_path / "coco", tmp_path / "coco.store", unlabelled=True, workers=1)
    brief = replace(BRIEF, strategy="enc-dec")
    made = []
    for source in (tmp_path / "coco", store):
        out = tmp_path / f"{source.name}.codec"
        finetune_codec(start, source, out, training=brief, **QUIET)
        assert load_with_facts(out)[1].history[-1]["data"]["images"] == 3
        made.append(load_codec(out).state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_images_in_memory_and_a_limit(start: Path, tmp_path: Path) -> None:
    images = ImageStore.from_batch(torch.zeros(5, 40, 90, 3, dtype=torch.uint8))
    brief = replace(BRIEF, strategy="enc-dec")
    out = tmp_path / "out"
    finetune_codec(start, images, out, training=brief, limit=3, **QUIET)
    assert load_with_facts(out)[1].history[-1]["data"]["images"] == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"training": replace(BRIEF, strategy="all")}, "strategy is 'all', which would change"),
        ({"training": REPLAY, "replay": None}, "replay is None with the strategy 'kr'"),
        ({"training": replace(BRIEF, strategy="enc")}, "replay is given with the strategy 'enc'"),
        ({"training": "medium"}, "preset is 'medium'"),
        ({"training": replace(REPLAY, lambda_range=(64.0, 128.0))}, "it must contain the range"),
        ({"replay": "nowhere"}, "nowhere does not exist"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds is -1.0"),
        ({"limit": 0}, "limit is 0"),
        ({"device": "abacus"}, "device is 'abacus'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    start: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    given = {"training": REPLAY, "replay": OLD, **QUIET, **options}
    with pytest.raises(FastcilError, match=says):
        finetune_codec(start, DATA, tmp_path / "out", **given)
    assert [file.name for file in tmp_path.iterdir()] == [start.name]


def test_files_that_cannot_be_used_are_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(FastcilError, match="the codec that is fine-tuned; write to another file"):
        finetune(start, start)
    with pytest.raises(FastcilError, match="which is no file"):
        finetune(tmp_path / "none", tmp_path / "out")
    other = tmp_path / "other"
    other.write_text("notes")
    with pytest.raises(FastcilError, match="which exists and can't be read as a codec"):
        finetune(start, other)
    assert other.read_text() == "notes"
    with pytest.raises(FastcilError, match="name is 'huge'; the codecs are"):
        train_codec(DATA, tmp_path / "out", model="huge", training=BRIEF, **QUIET)
    with pytest.raises(FastcilError, match="strategy is 'kr'; training from scratch learns 'all'"):
        train_codec(DATA, tmp_path / "out", training=REPLAY, **QUIET)
