"""Who of the processes that train together is still there."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastcil.errors import RankLostError

_EVERY = 0.5  # seconds from one look at the others to the next
_GRACE = 3.0  # seconds that a collective has to notice by itself who is gone


class Peers:
    """The processes of a run, by number, and which of those on this machine have ended.

    Args:
        store: What they tell each other their places in.
        rank: This process's number.
        size: How many there are.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank = rank
        store.set(str(rank), f"{os.getpid()} {_machine()}")
        places = [store.get(str(other)).decode().partition(" ") for other in range(size)]
        here = places[rank][2]
        self._processes = {
            other: int(process)
            for other, (process, _, host) in enumerate(places)
            if host == here and other != rank
        }

    def gone(self) -> dict[int, int]:
        """Ranks of this machine that have ended, and their processes."""
        return {rank: pid for rank, pid in self._processes.items() if has_ended(pid)}

    def lost(self, seconds: float) -> RankLostError:
        """What to say when the ranks can't work together any more.

        Args:
            seconds: How long a rank waits for the others.
        """
        end = time.monotonic() + _GRACE
        while not (gone := self.gone()) and time.monotonic() < end:
            time.sleep(0.05)
        # torchrun ends those that are left; they have something to say first.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        which = ", ".join(f"{rank} (process {pid})" for rank, pid in gone.items())
        happened = (
            f"rank {which} was lost"
            if gone
            else f"a rank on another machine was lost, or one did not answer for {seconds:g} s "
            f"(engine.rank_timeout)"
        )
        return RankLostError(
            f"{happened}; start the same command again to go on from the last checkpoint, with any "
            f"number of processes."
        )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Ends this process with a sentence when another one ends, whatever it is waiting for."""
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), daemon=True)
        before: Any = None
        main = threading.current_thread() is threading.main_thread()
        if main:
            before = signal.signal(signal.SIGTERM, self._terminated)
        thread.start()
        try:
            yield
            if main:
                signal.signal(signal.SIGTERM, before)
        finally:
            done.set()
            thread.join()

    def _terminated(self, *_: Any) -> None:
        """torchrun ends all processes as soon as one of them has ended."""
        if self.gone():
            raise self.lost(0.0)
        raise KeyboardInterrupt

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(_EVERY):
            if self.gone():
                break
        # The main thread hears of it from a collective, unless it waits for a GPU.
        if not done.wait(_GRACE):
            sentence = str(self.lost(0.0))
            if say_once(sentence):
                print(f"fastcil: {sentence}", file=sys.stderr, flush=True)
            os._exit(1)


def _machine() -> str:
    """What the processes have in common that know each other by number."""
    parts = [socket.gethostname()]
    # Containers may share a name, and then have neither the kernel's start nor processes in common.
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def has_ended(process: int) -> bool:
    """Whether a process of this machine has ended, waited for or not.

    Example:
        >>> has_ended(os.getpid())
        False
    """
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX"
    except ProcessLookupError:  # it ended while it was being looked at
        return True
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def say_once(text: str) -> bool:
    """Whether no other process of this run has said this: ranks that compute alike fail alike."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "MASTER_PORT" not in os.environ:
        return True
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
        return bool(store.add(f"fastcil/said/{zlib.crc32(text.encode())}", 1) == 1)
    except RuntimeError:
        return True
