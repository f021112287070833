"""A run of several processes computes what one computes, and can be killed and gone on with."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compositions import SAMPLE
from ranks_worker import leave_late, work, write_slowly
from thread_ranks import ThreadRanks, run_ranks, sharing

import fastcil
from fastcil import FastcilError
from fastcil.cli import main
from fastcil.engine import distributed, peers, timer
from fastcil.engine.distributed import ProcessRanks, check_alike, joined, on_first
from fastcil.engine.groups import EngineOptions
from fastcil.engine.state import load_state
from fastcil.nn.ranks import Ranks, working_as

ROOT = Path(__file__).parents[2]
# Each rank is a process of its own, forked from one that has done nothing but import torch.
FORKS = multiprocessing.get_context("forkserver")
PACKAGE = [found.name for found in pkgutil.walk_packages(fastcil.__path__, "fastcil.")]
# All of it, so that ranks run one program even where it is edited meanwhile.
IMPORTS = ["torch._dynamo", *(n for n in PACKAGE if "kernels" not in n and "__main__" not in n)]
FEW = ["icarl", "foster+cim", "dlcft"]
# Measured of maps, but trained on by nothing: a cosine's distance from 1, whose root is taken.
RECORDS = ("analysis", "moved")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def place(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of itself."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in told.items()}


def run_worker(folder: Path, size: int, methods: Sequence[str]) -> None:
    """Trains the methods with so many processes."""
    start(size, lambda told: FORKS.Process(target=work, args=(folder, methods, told)))


def start(size: int, process_of: Callable[[dict[str, str]], Any]) -> None:
    """Starts so many processes, each told its place, and waits for them."""
    FORKS.set_forkserver_preload(IMPORTS)
    port = free_port()
    processes = [process_of(place(rank, size, port)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(1500)
        assert process.exitcode == 0, "what failed it has printed"


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in pairs:
        if isinstance(part, (dict, list, tuple)):
            yield from leaves(part, f"{name}.{key}")
        else:
            yield f"{name}.{key}", part


def check_same_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same memory, byte for byte, and weights within 1e-9."""
    assert one["steps"] == other["steps"]
    mine, theirs = dict(leaves(one["parts"])), dict(leaves(other["parts"]))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        again = theirs[name]
        if name.startswith(".memory") or not isinstance(value, torch.Tensor):
            same = torch.equal(value, again) if isinstance(value, torch.Tensor) else value == again
            assert same, name
        elif not any(record in name for record in RECORDS):
            assert value.shape == again.shape, name
            assert torch.allclose(value, again, rtol=1e-9, atol=1e-9, equal_nan=True), name
    assert one["tasks"] == other["tasks"]


def check_runs(folder: Path, method: str, sizes: Sequence[int]) -> None:
    alone = load_state(folder / f"{method}-1-0.safetensors")
    assert alone["steps"] >= 30
    for size in sizes:
        together = [load_state(folder / f"{method}-{size}-{r}.safetensors") for r in range(size)]
        check_same_run(alone, together[0])
        for other_rank in together[1:]:
            for (name, first), (_, other) in zip(
                *map(leaves, (together[0], other_rank)), strict=True
            ):
                same = torch.equal(first, other) if torch.is_tensor(first) else first == other
                assert same, name


@pytest.fixture(scope="module")
def few_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for size in (1, 2):
        run_worker(folder, size, FEW)
    return folder


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all")
    for size in (1, 2, 4):
        run_worker(folder, size, SAMPLE)
    return folder


@pytest.mark.parametrize("method", FEW)
def test_two_ranks_learn_what_one_learns(method: str, few_runs: Path) -> None:
    check_runs(few_runs, method, [2])


@pytest.mark.slow
@pytest.mark.parametrize("method", SAMPLE)
def test_every_method_learns_the_same_with_one_two_and_four_ranks(method, all_runs) -> None:
    check_runs(all_runs, method, [2, 4])


# Runs that are killed


def command(run_dir: Path, **options: Any) -> list[str]:
    named = {
        "method": "er",
        "scenario": "lfs-2",
        "memory": "24KiB",
        "data": "scenes:classes=4,size=32,train_per_class=8,test_per_class=2",
        "network.name": "resnet20",
        "network.width": 4,
        # At higher rates rounding errors of single precision grow to any size in these steps.
        "er.first.lr": 0.001,
        "er.later.lr": 0.001,
        "engine.epoch_scale": 0.1,
        "engine.batch_size": 16,
        "engine.checkpoint_seconds": 0,
        "engine.progress": "false",
        "run_dir": run_dir,
        **options,
    }
    return ["train", *(f"--{name}={value}" for name, value in named.items())]


def torchrun(size: int, arguments: list[str]) -> list[str]:
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={size}", "--nnodes=1"]
    port = f"--master_port={free_port()}"
    return [sys.executable, *start, port, "-m", "fastcil", *arguments]


def rank_process(agent: int, rank: int) -> int:
    """The process of a rank: the child of torchrun whose environment says so."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    for child in children:
        if f"LOCAL_RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no process of rank {rank} among {children}")


def kill_a_rank(run_dir: Path, size: int, rank: int) -> str:
    """Starts so many ranks and kills one once it trains; what torchrun and the others say."""
    log = run_dir / "seed-0" / "events.jsonl"
    before = epochs_in(log)
    agent = subprocess.Popen(
        torchrun(size, command(run_dir)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while agent.poll() is None and epochs_in(log) < before + 2:
        time.sleep(0.02)
    assert agent.poll() is None, agent.communicate()[0]
    os.kill(rank_process(agent.pid, rank), signal.SIGKILL)
    said, _ = agent.communicate(timeout=120)
    assert agent.returncode != 0
    return said


def epochs_in(log: Path) -> int:
    return log.read_text().count('"event": "epoch"') if log.is_file() else 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "killed",
    [[(2, 1)], pytest.param([(2, 0), (3, 2), (4, 1)], marks=pytest.mark.slow)],
    ids=["once", "again and again"],
)
def test_a_rank_that_is_killed_ends_the_run_and_one_goes_on(killed, tmp_path, capfd) -> None:
    for size, rank in killed:
        said = kill_a_rank(tmp_path / "run", size, rank)
        sentences = [line for line in said.splitlines() if line.startswith("fastcil: ")]
        assert len(sentences) == 1, said
        assert re.search(rf"rank {rank} \(process \d+\) was lost; start the same", sentences[0])
        # As an error that nobody caught would be printed.
        assert "[rank" not in said
    assert main(command(tmp_path / "run")) == 0
    log = (tmp_path / "run" / "seed-0" / "events.jsonl").read_text()
    assert log.count('"event": "resumed"') == len(killed)
    assert main(command(tmp_path / "whole")) == 0
    one, two = (
        load_state(tmp_path / n / "seed-0" / "learner.safetensors") for n in ("run", "whole")
    )
    assert one["class_names"] == two["class_names"]
    for (name, a), (_, b) in zip(leaves(one["parts"]), leaves(two["parts"]), strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-3), name
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), name


@pytest.mark.slow
def test_ranks_wait_for_a_checkpoint_however_long_it_takes(tmp_path: Path) -> None:
    start(2, lambda told: FORKS.Process(target=write_slowly, args=(tmp_path, told, 4.0)))
    assert (tmp_path / "slow").exists() and (tmp_path / "result.json").is_file()


@pytest.mark.parametrize("seconds", [0.0, 3.0, 60.0])
def test_ranks_agree_on_what_is_due_and_seldom_ask(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps take 10 ms on the first rank, by whose clock it goes, and anything on the others."""
    clock = threading.local()
    monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: clock.now))

    with sharing(monkeypatch, timer) as working_as:

        def work(ranks: ThreadRanks) -> tuple[list[int], int]:
            clock.now, due = 100.0 * ranks.rank, []
            with working_as(ranks):
                told = timer.Timer(seconds)
                for step in range(700):
                    clock.now += 0.01 * (1 + ranks.rank)
                    if told.is_due():
                        due.append(step)
                        told.restart()
            return due, ranks.calls

        first, *others = run_ranks(3, work)
    due, calls = first
    assert all(found == first for found in others)
    if seconds == 0:
        assert due == list(range(700))
    else:
        periods = [b - a for a, b in pairwise([-1, *due])]
        assert len(due) == int(7 / seconds)
        assert all(100 * seconds <= period <= 100 * seconds + 2 for period in periods)
        assert calls < 12 * (len(due) + 1)


# What is refused, and said


class Said(Ranks):
    """Ranks whose texts are given."""

    size = 3

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def texts(self, text: str) -> list[str]:
        return self._texts


def test_ranks_that_differ_are_named() -> None:
    sums = {"memory": "a", "weights": "b"}
    with working_as(Said(["a\nb"] * 3)):
        check_alike(sums, "after task 2")
    for said, told in [
        (["a\nb", "a\nb", "a\nc"], "weights of rank 2;"),
        (["a\nb", "c\nb", "d\nb"], "memory of rank 1, 2;"),
        (["a\nb", "c\nd", "a\nd"], "memory of rank 1, weights of rank 1, 2;"),
    ]:
        with working_as(Said(said)), pytest.raises(FastcilError) as error:
            check_alike(sums, "after task 2")
        assert f"after task 2 these differ from rank 0's: {told}" in str(error.value)


@pytest.mark.parametrize(
    ("said", "local_size", "threads"),
    [
        (["0 0,1,2,3", "0 0,1,2,3", "0 0,1,2,3"], 3, 1),
        (["0 0,1,2,3", "0 0,1,2,3"], 2, 2),
        # Bound to cores of their own, and a smaller machine beside a larger one.
        (["0 0,1", "0 2,3"], 2, 2),
        (["0 0,1,2,3", "1 0,1,2,3,4,5,6,7"], 1, 4),
        (["0 0", "0 0"], 2, 1),
    ],
)
def test_all_ranks_compute_with_as_many_threads(said, local_size, threads) -> None:
    assert distributed._threads(Said(said), local_size) == threads


def test_what_fails_on_the_first_rank_fails_on_all() -> None:
    def fail() -> None:
        raise FastcilError("run_dir is '/'; it can't be written.")

    said = Said(["run_dir is '/'; it can't be written.", ""])
    with working_as(said), pytest.raises(FastcilError, match="can't be written"):
        on_first(fail)


def test_shares_are_as_even_as_can_be_and_in_order() -> None:
    def shares(ranks: Ranks) -> list[slice]:
        return [ranks.share(rows) for rows in (0, 2, 3, 8)]

    first, second, third = run_ranks(3, shares)
    assert [s.stop - s.start for s in first] == [0, 1, 1, 3]
    assert [s.stop - s.start for s in third] == [0, 0, 1, 2]
    assert all(a.stop == b.start for a, b in zip(first, second, strict=True))


def test_a_function_that_gives_no_row_for_each_image_is_refused() -> None:
    ranks = ProcessRanks.__new__(ProcessRanks)
    ranks.rank, ranks.size = 0, 2
    with pytest.raises(FastcilError, match="of 2 images has 1 rows"):
        ranks.gather(torch.zeros(1, 3), 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_rows_are_gathered_as_they_lie_in_memory(dtype: torch.dtype) -> None:
    rows = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).to(dtype)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    ranks = ProcessRanks.__new__(ProcessRanks)
    ranks.rank, ranks.size = 0, 1
    last = {"memory_format": torch.channels_last}
    try:
        for given in (rows, rows.contiguous(**last), rows[..., ::2], rows[0]):
            found = ranks.gather(given, len(given))
            assert torch.equal(found, given)
            assert given.dim() == 3 or found.is_contiguous(**last) == given.is_contiguous(**last)
    finally:
        torch.distributed.destroy_process_group()


def test_the_first_process_goes_last() -> None:
    """It may hold what the others still read from: started by hand, not by torchrun's agent."""
    start(2, lambda told: FORKS.Process(target=leave_late, args=(told,)))


def test_without_torchrun_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in place(0, 1, 1):
        monkeypatch.delenv(name, raising=False)
    with joined("cpu", 1.0) as ranks:
        assert ranks.size == 1 and not torch.distributed.is_initialized()


@pytest.mark.parametrize("command", ["compare", "pretrain", "evaluate"])
def test_commands_of_one_process_are_refused(command, monkeypatch, capsys) -> None:
    for name, value in place(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(peers, "say_once", lambda _: True)
    assert main([command]) == 2
    assert f"{command} runs in one process, and torchrun started 2" in capsys.readouterr().err


def test_options_that_several_can_not_have_are_refused(monkeypatch) -> None:
    with pytest.raises(FastcilError, match=r"engine.compile is True, and torchrun started 2"):
        distributed.check_divisible(EngineOptions(compile=True), 2)
    for name, value in place(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(FastcilError, match="device is 'cuda:1', but 2 processes"),
        joined("cuda:1", 1.0),
    ):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(FastcilError, match="3 processes on a machine with 2 GPUs"):
        distributed._take_device("auto", 2, 3)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_process_that_nobody_has_waited_for_yet_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    end = time.monotonic() + 20
    while not peers.has_ended(child.pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert peers.has_ended(child.pid)
    child.wait()
    assert peers.has_ended(child.pid) and not peers.has_ended(os.getpid())
