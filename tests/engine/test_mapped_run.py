"""Runs on images that stay in their file: the same bits as in memory, killed or not."""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photo_files import encoded, write_tree

from fastcil import Learner, train
from fastcil.contract import Task
from fastcil.data import load
from fastcil.data.ingest import ingest
from fastcil.engine.free_memory import group_free, host_free
from fastcil.engine.placement import Room, choose, move, on_all_ranks
from fastcil.engine.state import load_state
from fastcil.errors import FastcilError
from fastcil.nn.ranks import Ranks, working_as

OPTIONS = {
    "augment.size": 24,
    "network.name": "resnet20",
    "network.width": 4,
    "engine.epoch_scale": 0.02,
    "engine.batch_size": 4,
    "engine.checkpoint_seconds": 0,
    "engine.progress": False,
    "engine.threads": 1,
}
FORKS = multiprocessing.get_context("forkserver")
IMPORTS = ["fastcil.engine.run", "torch._dynamo"]
GIB = 1 << 30


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos") / "photos"
    files = {
        f"{'test' if k % 6 == 5 else 'train'}/{'abcd'[k // 6]}/{k}.jpg": encoded(k, 40 + k, 60 - k)
        for k in range(24)
    }
    return write_tree(root, files)


@pytest.fixture(scope="module")
def store(photos: Path) -> Path:
    return ingest(photos, photos.with_name("photos.store"), workers=1, chunk_nbytes=30_000)


def run(data: Path, run_dir: Path, place: str = "auto") -> None:
    train("icarl", data, "lfs-2", "4 images", run_dir=run_dir, **OPTIONS, **{"engine.data": place})


def outcome(run_dir: Path) -> list[dict]:
    content = json.loads((run_dir / "seed-0" / "result.json").read_text())
    tasks: list[dict] = content["outcomes"][0]["tasks"]
    for task in tasks:
        del task["seconds"]
    return tasks


def learned(run_dir: Path) -> dict:
    return {**load_state(run_dir / "seed-0" / "learner.safetensors"), "settings": None}


def killed_in_an_epoch(run_dir: Path, *arguments: object) -> bool:
    """Kills a run after its third step, of three in each epoch; whether it was still going."""
    checkpoint, seen = run_dir / "seed-0" / "checkpoint.safetensors", set()
    process = FORKS.Process(target=run, args=arguments)
    process.start()
    while process.is_alive() and len(seen) < 3:
        seen |= {checkpoint.stat().st_mtime_ns} if checkpoint.is_file() else set()
        time.sleep(0.0005)
    killed = process.is_alive()
    process.kill()
    process.join()
    return killed and not (run_dir / "seed-0" / "result.json").exists()


def test_killed_in_an_epoch_it_ends_as_the_run_on_files(
    photos: Path, store: Path, tmp_path: Path, assert_same
) -> None:
    FORKS.set_forkserver_preload(IMPORTS)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(photos, whole)
    assert killed_in_an_epoch(folder, store, folder, "disk"), "it ended before it was killed"
    assert len(load_state(folder / "seed-0" / "checkpoint.safetensors")["tasks"]) == 0
    # Where images stay is no part of what a run is.
    run(store, folder, "host")
    assert_same(outcome(whole), outcome(folder))
    assert_same(learned(whole), learned(folder))


def test_memory_holds_its_exemplars_and_nothing_else(store: Path) -> None:
    data = load(store)
    options = {"engine.epoch_scale": 0.01, "network.width": 4, "network.name": "resnet20"}
    learner = Learner("icarl", "6 images", **options, **{"engine.progress": False})
    learner.learn(data)
    held = learner.memory.examples().images
    assert held.mapped is None and not held.shared
    assert held.pixels.numel() == int((held.sizes.prod(1) * 3).sum())
    saved = sum(t.numel() * t.element_size() for t in learner.memory.state().values())
    assert learner.memory.nbytes == saved


@pytest.mark.parametrize(
    ("wanted", "room", "place"),
    [
        ("auto", Room(10 * GIB, False, 80 * GIB, 64 * GIB), "device"),
        ("auto", Room(40 * GIB, True, 80 * GIB, 64 * GIB), "device"),
        ("auto", Room(41 * GIB, True, 80 * GIB, 82 * GIB), "host"),
        ("auto", Room(41 * GIB, True, 80 * GIB, 81 * GIB), "disk"),
        ("auto", Room(41 * GIB, False, 80 * GIB, 1 * GIB), "host"),
        ("auto", Room(1 * GIB, True, None, 64 * GIB), "disk"),
        ("auto", Room(1 * GIB, False, None, 64 * GIB), "host"),
        ("device", Room(79 * GIB, True, 80 * GIB, 1 * GIB), "device"),
        ("host", Room(60 * GIB, True, None, 64 * GIB), "host"),
        ("disk", Room(1 * GIB, True, 80 * GIB, 64 * GIB), "disk"),
        (
            "device",
            Room(81 * GIB, True, 80 * GIB, GIB),
            r"take 87\.0 GB and 85\.9 GB are free",
        ),
        ("device", Room(1, True, None, GIB), "there is no CUDA device"),
        ("host", Room(2 * GIB, True, None, GIB), r"2\.1 GB and 1\.1 GB of memory are free"),
        ("disk", Room(1, False, None, GIB), "write them with 'fastcil ingest'"),
    ],
)
def test_where_images_stay(wanted: str, room: Room, place: str) -> None:
    if place in ("device", "host", "disk"):
        assert choose(wanted, room) == place
    else:
        with pytest.raises(FastcilError, match=place):
            choose(wanted, room)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "max", "memory.current": "7", "memory.stat": ""}, None),
        ({"memory.max": "9", "memory.current": "7", "memory.stat": "file 5\ninactive_file 3"}, 5),
        ({"memory.max": "9", "memory.current": "12", "memory.stat": "anon 1"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "9",
                "memory/memory.usage_in_bytes": "7",
                "memory/memory.stat": "total_inactive_file 1",
            },
            3,
        ),
    ],
)
def test_a_container_has_what_its_group_may_take(files, free, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert group_free(tmp_path) == free


def test_ranks_choose_by_the_least_of_what_they_have() -> None:
    class Three(Ranks):
        size = 3

        def texts(self, text: str) -> list[str]:
            return [text, json.dumps([7 * GIB, None]), json.dumps([3 * GIB, 81 * GIB])]

    room = Room(2 * GIB, True, 80 * GIB, 4 * GIB)
    with working_as(Three()):
        assert on_all_ranks(room) == Room(2 * GIB, True, 80 * GIB, 3 * GIB)


def test_on_the_cpu(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, cpu = load(store), torch.device("cpu")
    assert move(data.train, "disk", cpu) is data.train
    held = replace(data, train=move(data.train, "host", cpu), test=move(data.test, "host", cpu))
    assert held.train.images.mapped is None and not held.train.images.shared
    assert all(torch.equal(held.test.images.image(k), data.test.images.image(k)) for k in range(4))
    assert move(held.train, "host", cpu).images is held.train.images
    assert 0 < host_free() < 1 << 50
    with pytest.raises(FastcilError, match=r"engine\.data is 'disk', but the images are in memory"):
        train("finetune", held, "lfs-2", "none", **{"engine.data": "disk"})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["auto", "disk", "host"])
def test_one_line_says_where(store: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {**OPTIONS, "engine.progress": True, "engine.epoch_scale": 0.005}
    train("finetune", store, "lfs-2", "none", **options, **{"engine.data": place})
    where = "images in host memory: " if place == "host" else "images memory-mapped: "
    assert capsys.readouterr().err.splitlines()[0].startswith(f"photos: {where}")


@pytest.mark.parametrize("place", ["auto", "disk", "host"])
def test_a_learner_keeps_new_images_where_it_is_told(
    store: Path, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, learn = [], Learner.learn_task

    def look(learner: Learner, task: Task, *rest: Any) -> Any:
        seen.append(task.examples.images.mapped is not None)
        return learn(learner, task, *rest)

    monkeypatch.setattr(Learner, "learn_task", look)
    options = {**OPTIONS, "engine.progress": True, "engine.epoch_scale": 0.005}
    Learner("icarl", "4 images", **options, **{"engine.data": place}).learn(load(store))
    assert seen == [place != "host"]
    where = "images in host memory: " if place == "host" else "images memory-mapped: "
    assert capsys.readouterr().err.splitlines()[0].startswith(f"task 1: {where}")


@pytest.mark.parametrize(
    ("place", "message"), [("device", "there is no CUDA device"), ("disk", "images are in memory")]
)
def test_a_learner_that_has_no_such_place_stays_as_it_was(place: str, message: str) -> None:
    shelf = {"a": np.zeros((4, 24, 24, 3), np.uint8)}
    learner = Learner("icarl", "4 images", device="cpu", **OPTIONS, **{"engine.data": place})
    with pytest.raises(FastcilError, match=message):
        learner.learn(shelf)
    assert (learner.class_names, learner.tasks, learner._parts) == ((), [], None)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["icarl", "der", "foster+cim", "gem", "podnet", "darkpp"])
def test_on_a_gpu_wherever_they_stay(method: str, store: Path) -> None:
    results = {
        place: train(
            method,
            store,
            "lfs-2",
            "4 images",
            device="cuda",
            **{**OPTIONS, "engine.data": place},
        )
        for place in ("device", "host", "disk")
    }
    exemplars = {place: result.outcomes[0].tasks[-1].exemplars for place, result in results.items()}
    assert exemplars["device"] == exemplars["host"] == exemplars["disk"]
    host, disk = results["host"].accuracy_matrix, results["disk"].accuracy_matrix
    assert (host == disk).all()
