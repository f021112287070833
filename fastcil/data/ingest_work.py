"""Chunks decoded by processes of their own, and the journal that says which are on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastcil.data.ingest_plan import IngestPlan, path_of
from fastcil.data.listing import Stretch
from fastcil.errors import DataError

JOURNAL = "journal"


@dataclass
class Journal:
    """The chunks that are on the disk: a line of JSON each, written once its pixels are.

    Args:
        path: The file.
        done: Number of a chunk -> what the process that wrote it answered.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Journal.open(Path(folder, "j")) as journal:
        ...         journal.add({"chunk": 4, "crc32": 1, "bad": [], "turned": []})
        ...     with open(Path(folder, "j"), "ab") as file:
        ...         _ = file.write(b'{"chunk": 5, ')
        ...     list(Journal.open(Path(folder, "j")).done)
        [4]
    """

    path: Path
    done: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Reads what is there up to a line that a kill or a power cut damaged, which is cut off."""
        journal = cls(path)
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
            try:
                answer = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            journal.done[answer["chunk"]] = answer
            whole += len(line)
        with open(path, "ab") as file:
            file.truncate(whole)
        return journal

    def __enter__(self) -> Journal:
        self._file = open(self.path, "ab")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, answer: dict[str, Any]) -> None:
        """Notes a chunk whose pixels are on the disk, and waits until the note is."""
        self._file.write(json.dumps(answer).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[answer["chunk"]] = answer


class Decoders:
    """Processes that decode the chunks of a plan into a file.

    Args:
        plan: What goes where.
        pixels: The file, as long as the plan says.
        count: How many processes.
    """

    def __init__(self, plan: IngestPlan, pixels: Path, count: int) -> None:
        self._plan = plan
        self._pixels = pixels
        self._count = count
        self._offsets = [*plan.offsets.tolist(), plan.nbytes]
        self._sizes: list[list[int]] = plan.sizes.tolist()
        self._ends: list[int] = plan.ends.tolist()
        self._lock = threading.Lock()
        self._failures: list[BaseException] = []

    def run(self, chunks: Iterator[int], take: Callable[[dict[str, Any]], None]) -> None:
        """Decodes chunks; ends the processes whatever happens.

        Args:
            chunks: Their numbers.
            take: Called with each one's answer (`fastcil.files.decoder`), one at a time, as soon
                as its pixels are on the disk.

        Raises:
            DataError: A process died, or could not write; what ``take`` raises.
        """
        processes = [self._start() for _ in range(self._count)]
        threads = [
            threading.Thread(target=self._feed, args=(process, chunks, take), daemon=True)
            for process in processes
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        if self._failures:
            raise self._failures[0]

    def _start(self) -> subprocess.Popen[bytes]:
        """A process; it finds this package where this process found it."""
        script = f"import sys; sys.path[:0] = {sys.path!r}; from fastcil.files.decoder import main"
        return subprocess.Popen(
            [sys.executable, "-c", f"{script}; sys.exit(main())", str(self._pixels)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def _feed(
        self,
        process: subprocess.Popen[bytes],
        chunks: Iterator[int],
        take: Callable[[dict[str, Any]], None],
    ) -> None:
        """Gives a process one chunk after another, for as long as all goes well."""
        assert process.stdin is not None and process.stdout is not None
        try:
            while not self._failures:
                with self._lock:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                try:
                    self._send(chunk, process)
                    line = process.stdout.readline()
                except BrokenPipeError:
                    line = b""
                if not line:
                    raise DataError(
                        f"a process that decodes images died in chunk {chunk}"
                        f" (status {process.wait()}); the same command goes on where it was"
                    )
                answer = json.loads(line)
                if "failed" in answer:
                    raise DataError(f"{self._pixels} can't be written: {answer['failed']}")
                with self._lock:
                    take(answer)
        except BaseException as error:  # handed to whoever waits
            self._failures.append(error)

    def _send(self, chunk: int, process: subprocess.Popen[bytes]) -> None:
        """Writes a job to a process."""
        assert process.stdin is not None
        images, contents = [], []
        first, last = self._ends[chunk - 1] if chunk else 0, self._ends[chunk]
        for place in range(first, last):
            listing, file = self._plan.files[place]
            source, where = listing.files[file], None
            begin, length = 0, None
            if isinstance(source, Stretch):
                where, begin, length = str(source.file), source.first, source.length
            elif isinstance(source, bytes):
                contents.append(source)
                length = len(source)
            else:
                where = str(source)
            images.append([path_of(listing, file), where, begin, length, *self._sizes[place]])
        at = self._offsets[first]
        job = {
            "chunk": chunk,
            "at": at,
            "nbytes": self._offsets[last] - at,
            "short_side": self._plan.short_side,
            "images": images,
        }
        process.stdin.write(json.dumps(job).encode() + b"\n")
        for content in contents:
            process.stdin.write(content)
        process.stdin.flush()
