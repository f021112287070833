"""Several processes that train together, as ``torchrun`` starts them; one GPU each, or CPU cores.

What a run computes does not depend on how many there are, but for the order of floating-point
sums: every rank draws the same batches and goes through the same steps, and only what is costly is
done in shares: reading images that are the host's (`fastcil.engine.reading`), and extractors on
images (`fastcil.nn.shares`). So every rank holds the same
weights, optimisers and memory. The first alone writes files and speaks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastcil.cores import usable_cores
from fastcil.engine.groups import EngineOptions
from fastcil.engine.peers import Peers
from fastcil.engine.resolve import pick_device
from fastcil.errors import FastcilError
from fastcil.nn.ranks import Ranks, current, working_as

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MONTH = timedelta(days=30)

# As torch called it before 2.13.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

T = TypeVar("T")


def launched() -> bool:
    """Whether torchrun started this process, as one of several."""
    return all(name in os.environ for name in _VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def speaks() -> bool:
    """Whether this process is the one that prints."""
    return not launched() or os.environ["RANK"] == "0"


def refuse_ranks(command: str) -> None:
    """Refuses to do with several processes what is made for one.

    Raises:
        FastcilError: torchrun started several.
    """
    if launched():
        raise FastcilError(
            f"{command} runs in one process, and torchrun started {os.environ['WORLD_SIZE']}; "
            f"only 'train' works with several."
        )


def check_divisible(engine: EngineOptions, size: int) -> None:
    """Refuses options that several processes can't have.

    Raises:
        FastcilError: Such an option.
    """
    if size > 1 and engine.compile:
        raise FastcilError(
            f"engine.compile is True, and torchrun started {size} processes; objectives that are "
            f"computed in shares are not compiled, so leave it out."
        )


@contextmanager
def joined(device: str, seconds: float) -> Iterator[Ranks]:
    """Makes this process one of those that torchrun started, if it did, and lets go in the end.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``; with CUDA each process on a machine has a GPU.
        seconds: How long a rank waits for the others before it gives up.

    Raises:
        FastcilError: A device that they can't share, or more processes than GPUs.
        RankLostError: Another process ended, or didn't answer in time.
    """
    if not launched() or current().size > 1:
        yield current()
        return
    local, local_size = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    cuda = _take_device(device, local, local_size)
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("fastcil/group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    peers = Peers(dist.PrefixStore("fastcil/peers", store), rank, size)
    ranks = ProcessRanks(rank, size, local, store, peers, seconds)
    # A graph's nodes are run in the order in which one thread made them, alike on every rank, and
    # so are the collectives among them; the autograd engine's own threads may count otherwise.
    in_order = torch.autograd.set_multithreading_enabled(False)
    try:
        with peers.watched(), working_as(ranks), in_order:
            check_alike(_program(), "at the start")
            torch.set_num_threads(_threads(ranks, local_size))
            yield ranks
            ranks.leave()
    except BaseException:
        # NCCL would wait for those who are gone.
        if not cuda:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class ProcessRanks(Ranks):
    """The ranks of a group of processes.

    Args:
        rank: This one's number.
        size: How many there are.
        local: Its number on its machine.
        store: What the processes can write notes to each other in.
        peers: Tells who is there.
        seconds: How long collectives wait.
    """

    def __init__(
        self, rank: int, size: int, local: int, store: dist.Store, peers: Peers, seconds: float
    ) -> None:
        self.rank, self.size, self.local = rank, size, local
        self._store, self._peers, self._seconds = store, peers, seconds
        self._turns = self._meetings = 0

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All of a kind in one go; halves are added up in single precision."""
        found: list[Tensor | None] = [None] * len(tensors)
        for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [k for k, tensor in enumerate(tensors) if tensor.dtype == kind]
            flat = torch.cat([tensors[k].reshape(-1) for k in places])
            if kind.is_floating_point:
                flat = flat.to(torch.promote_types(kind, torch.float32))
            with self._together():
                dist.all_reduce(flat)
            parts = flat.to(kind).split([tensors[k].numel() for k in places])
            for k, part in zip(places, parts, strict=True):
                found[k] = part.view(tensors[k].shape)
        return [tensor for tensor in found if tensor is not None]

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """As bytes, which every backend can send; shares are filled up to the longest."""
        counts = self.counts(count)
        if len(rows) != counts[self.rank]:
            raise FastcilError(
                f"what was computed of {counts[self.rank]} images has {len(rows)} rows; a function "
                f"computed in shares gives one row for each image."
            )
        # Batches of images in the order in which they lie.
        last = rows.is_contiguous(memory_format=torch.channels_last) if rows.dim() == 4 else False
        own = (rows.detach().permute(0, 2, 3, 1) if last else rows.detach()).contiguous()
        if len(own) < counts[0]:
            own = torch.cat([own, own.new_zeros(counts[0] - len(own), *own.shape[1:])])
        each = own.reshape(-1).view(torch.uint8)
        found = each.new_empty(self.size * len(each))
        with self._together():
            _all_gather(found, each)
        parts = found.view(rows.dtype).view(self.size, *own.shape)
        if count % self.size:
            pieces = [part[:n] for part, n in zip(parts, counts, strict=True)]
            whole = torch.cat(pieces)
        else:
            whole = parts.flatten(0, 1)
        return whole.permute(0, 3, 1, 2) if last else whole

    def texts(self, text: str) -> list[str]:
        """By way of their lengths, on the host."""
        data = text.encode()
        own = torch.tensor([[len(data)]])
        lengths = self.gather(own, self.size).flatten().tolist()
        row = torch.zeros(1, max(*lengths, 1), dtype=torch.uint8)
        row[0, : len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[
            : len(data)
        ]
        rows = self.gather(row, self.size)
        return [
            bytes(found[:length].tolist()).decode()
            for found, length in zip(rows, lengths, strict=True)
        ]

    def barrier(self) -> None:
        """However long it takes: a collective would give up."""
        self._meetings += 1
        key = f"fastcil/meeting/{self._meetings}"
        if self._store.add(f"{key}/here", 1) == self.size:
            self._store.set(key, "all")
        self._store.wait([key], _MONTH)

    def leave(self) -> None:
        """The last barrier, after which the first process, which may hold the store, goes last."""
        self.barrier()
        notes = [f"fastcil/left/{other}" for other in range(1, self.size)]
        if self.rank:
            self._store.set(notes[self.rank - 1], "")  # which waits for no answer
        elif notes:
            self._store.wait(notes, _MONTH)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Lets the first process of each machine go ahead of its others, however long it takes."""
        self._turns += 1
        machine = os.environ.get("GROUP_RANK", "0")
        key = f"fastcil/turn/{machine}/{self._turns}"
        if self.local:
            self._store.wait([key], _MONTH)
        try:
            yield
        finally:
            if not self.local:
                self._store.set(key, "done")
        self.barrier()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Says in a sentence what went wrong between the processes."""
        try:
            yield
        except RuntimeError as error:
            raise self._peers.lost(self._seconds) from error


@contextmanager
def in_turn() -> Iterator[None]:
    """For what leaves files that the next process finds, such as reading data the first time."""
    ranks = current()
    if isinstance(ranks, ProcessRanks):
        with ranks.turn():
            yield
    else:
        yield


def on_first(work: Callable[[], T]) -> T | None:
    """Lets the first rank do what the others must not, such as writing a file.

    All wait for it, and where it fails, all do.

    Args:
        work: What to do.

    Returns:
        What it gave, on the first rank; None on the others.

    Raises:
        FastcilError: The work did, on the first rank.

    Example:
        >>> on_first(lambda: 3)
        3
    """
    ranks = current()
    if ranks.size == 1:
        return work()
    found, failed = None, ""
    if ranks.first:
        try:
            with working_as(Ranks()):
                found = work()
        except FastcilError as error:
            failed = str(error)
    ranks.barrier()
    failed = ranks.texts(failed)[0]
    if failed:
        raise FastcilError(failed)
    return found


def first_says(fact: bool) -> bool:
    """What the first rank found: others may look at a file a moment too late.

    Example:
        >>> first_says(True)
        True
    """
    return current().texts(str(fact))[0] == str(True)


def check_alike(checksums: dict[str, str], where: str) -> None:
    """Makes sure that all ranks hold the same.

    Args:
        checksums: Of what, as a sentence calls it -> its checksum on this rank.
        where: When it was looked at, as the sentence begins.

    Raises:
        FastcilError: They differ.
    """
    lines = current().texts("\n".join(checksums.values()))
    columns = zip(*(line.split("\n") for line in lines), strict=True)
    apart = {
        name: odd
        for name, found in zip(checksums, columns, strict=True)
        if (odd := odd_ones(found))
    }
    if apart:
        told = ", ".join(f"{name} of rank {', '.join(map(str, a))}" for name, a in apart.items())
        raise FastcilError(
            f"{where} these differ from rank 0's: {told}; the ranks must compute alike: use the "
            f"same machines, versions, files and data for all, and a network that draws no random "
            f"numbers."
        )


def odd_ones(values: Sequence[str]) -> list[int]:
    """Places of the values that differ from the first.

    Example:
        >>> odd_ones(["a", "b", "a", "c"])
        [1, 3]
    """
    return [place for place, value in enumerate(values) if value != values[0]]


def _take_device(device: str, local: int, local_size: int) -> bool:
    """Whether the ranks compute on GPUs; if so, this one's own becomes the current device."""
    if ":" in device:
        raise FastcilError(
            f"device is '{device}', but {local_size} processes share this machine, and each has a "
            f"device of its own; use 'cuda' or 'cpu'."
        )
    if device in ("auto", "cuda") and torch.cuda.is_available():
        found = torch.cuda.device_count()
        if local_size > found:
            raise FastcilError(
                f"torchrun started {local_size} processes on a machine with {found} GPUs; start at "
                f"most {found} there (--nproc_per_node={found}), or use device 'cpu'."
            )
        # Before anything is made on a GPU, which would be the first one for all.
        torch.cuda.set_device(local)
    return pick_device(device).type == "cuda"


def _threads(ranks: Ranks, local_size: int) -> int:
    """How many threads each rank computes with: as many on all, or sums would differ.

    Its cores are shared out among those of a machine, whether each may use all of them or
    ``torchrun`` bound each to its own.
    """
    found = ranks.texts(f"{os.environ.get('GROUP_RANK', '0')} {','.join(map(str, usable_cores()))}")
    cores: dict[str, set[str]] = {}
    for text in found:
        machine, _, own = text.partition(" ")
        cores.setdefault(machine, set()).update(own.split(","))
    fewest = min(len(own) // local_size for own in cores.values())
    return max(1, fewest)


def _program() -> dict[str, str]:
    """What makes ranks compute alike, as a sentence calls it."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.name} {path.stat().st_size};".encode())
        digest.update(path.read_bytes())
    return {
        "fastcil's files": digest.hexdigest(),
        "C++ kernels": str(any(folder.glob("_C*"))),
        "torch": torch.__version__,
        "CPU instructions": torch.backends.cpu.get_cpu_capability(),
    }
