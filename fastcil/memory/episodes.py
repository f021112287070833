"""Images kept as codes: as they are while they fit, else as centroids with covariances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastcil.contract import Retained

# Beside a row's code: its count and label (int32) and its task (int16).
_ROW_NBYTES = 4 + 4 + 2
# Of a task: its gamma (float32) and which decoder reads its codes (int16).
_TASK_NBYTES = 4 + 2
_CHUNK = 256

Group = tuple[int, int]
"""A class's label, and the task that brought some of its images."""


@dataclass(frozen=True)
class Rows:
    """Codes, or clusters of codes, of one class.

    Args:
        centres: Codes and centroids, float [R, D].
        variances: Diagonals of the clusters' covariances, 0 where a row is a single code, [R, D].
        counts: Codes that each row stands for, int64 [R].

    Example:
        >>> len(Rows.single(torch.zeros(3, 2)))
        3
    """

    centres: Tensor  # [R, D]
    variances: Tensor  # [R, D]
    counts: Tensor  # [R]

    def __len__(self) -> int:
        return len(self.counts)

    @classmethod
    def single(cls, codes: Tensor) -> Rows:
        """Every code a row of its own."""
        return cls(codes, torch.zeros_like(codes), torch.ones(len(codes), dtype=torch.int64))

    @classmethod
    def cat(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of several, in order."""
        return cls(
            torch.cat([part.centres for part in parts]),
            torch.cat([part.variances for part in parts]),
            torch.cat([part.counts for part in parts]),
        )


@dataclass(frozen=True)
class Costs:
    """Bytes of what `Episodes` holds, by its layout.

    Args:
        code: Numbers in a code, D.
        decoder: Numbers in a decoder, P.
        itemsize: Bytes of each number.

    Example:
        >>> costs = Costs(code=1024, decoder=24867, itemsize=2)
        >>> costs.row, costs.cluster, costs.least(classes=10, decoders=1, tasks=1)
        (2058, 4106, 70320)
    """

    code: int
    decoder: int
    itemsize: int

    @property
    def row(self) -> int:
        """A single code, with count, label and task."""
        return self.code * self.itemsize + _ROW_NBYTES

    @property
    def cluster(self) -> int:
        """A centroid with a covariance."""
        return self.row + self.code * self.itemsize

    def of(self, rows: Rows) -> int:
        """Some rows of a class."""
        clusters = int((rows.counts > 1).sum())
        return len(rows) * self.row + clusters * (self.cluster - self.row)

    def fixed(self, decoders: int, tasks: int) -> int:
        """Everything but rows."""
        return decoders * self.decoder * self.itemsize + tasks * _TASK_NBYTES

    def least(self, classes: int, decoders: int, tasks: int) -> int:
        """What it takes to keep a code of every class."""
        return self.fixed(decoders, tasks) + classes * self.row


class Episodes(nn.Module):
    """Codes of old classes' images, and the decoders that make images of them.

    (Ayub and Wagner 2021, "encoded episodes".) A row is one code, or a cluster of codes: centroid,
    diagonal covariance and number. It belongs to a class and to the task that brought it, and each
    task's rows are read by one decoder. A part of a method, with whose state it is saved; all of
    its buffers are what is retained.

    Args:
        dtype: Of codes, covariances and decoders.

    Attributes:
        decoders: Folded decoders.  # [A, P]
        centres: Codes and centroids.  # [R, D]
        variances: Of the rows that are clusters, in their order.  # [V, D]
        counts: int32 [R].
        labels: int32 [R].
        born: Task of each row, int16 [R].
        gamma: Of each task, how fast its images lose weight, float32 [T].
        decoder_of: Decoder of each task's rows, int16 [T].

    Example:
        >>> len(Episodes(torch.float16)), Episodes(torch.float16).retained().nbytes
        (0, 0)
    """

    decoders: Tensor
    centres: Tensor
    variances: Tensor
    counts: Tensor
    labels: Tensor
    born: Tensor
    gamma: Tensor
    decoder_of: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name in ("decoders", "centres", "variances"):
            self.register_buffer(name, torch.empty(0, 0, dtype=dtype))
        for name, kind in (
            ("counts", torch.int32),
            ("labels", torch.int32),
            ("born", torch.int16),
            ("gamma", torch.float32),
            ("decoder_of", torch.int16),
        ):
            self.register_buffer(name, torch.empty(0, dtype=kind))

    def __len__(self) -> int:
        return len(self.counts)

    def retained(self) -> Retained:
        """All of it."""
        return Retained("episodes", "generator", dict(self.named_buffers()))

    def clear(self) -> None:
        """Forgets everything."""
        for name, buffer in list(self.named_buffers()):
            shape = (0,) * buffer.ndim
            setattr(self, name, buffer.new_empty(shape))

    def add_decoder(self, decoder: Tensor, task: int, alone: bool) -> None:
        """Adds the decoder that a task's rows are read by.

        Args:
            decoder: Folded, [P].
            task: The task's number.
            alone: Whether it takes the place of all others, and reads their rows too.
        """
        if alone or not len(self.decoders):
            self.decoders = self.decoders.new_empty(0, len(decoder))
            self.decoder_of = torch.zeros_like(self.decoder_of)
        # A task of which nothing was kept has no decoder; its place is taken all the same.
        missing = task + 1 - len(self.decoder_of)
        number = self.decoder_of.new_full((missing,), len(self.decoders))
        self.decoder_of = torch.cat([self.decoder_of, number])
        self.gamma = torch.cat([self.gamma, self.gamma.new_zeros(missing)])
        self.decoders = torch.cat([self.decoders, decoder[None].to(self.decoders)])

    def groups(self) -> list[Group]:
        """Label and task of the rows that there are, ascending."""
        pairs = torch.stack([self.labels.long(), self.born.long()], 1).cpu()
        return [(int(label), int(born)) for label, born in pairs.unique(dim=0)]

    def rows(self, label: int, born: int) -> Rows:
        """The rows of a class that a task brought, in float32 on the CPU."""
        mine = (self.labels == label) & (self.born == born)
        variances = self._spread()[mine]
        return Rows(
            self.centres[mine].float().cpu(),
            variances.float().cpu(),
            self.counts[mine].long().cpu(),
        )

    def hold(self, rows: dict[Group, Rows]) -> None:
        """Holds these rows instead, by label and task."""
        every = Rows.cat(list(rows.values()))
        like, clusters = self.centres, every.counts > 1
        lengths = torch.tensor([len(part) for part in rows.values()])
        keys = torch.tensor(list(rows)).repeat_interleave(lengths, 0)  # [R, 2]
        self.centres = every.centres.to(like)
        self.variances = every.variances[clusters].to(like)
        self.counts = every.counts.to(self.counts)
        self.labels = keys[:, 0].to(self.labels)
        self.born = keys[:, 1].to(self.born)

    def _spread(self) -> Tensor:
        """Variances of all rows, [R, D]."""
        spread = torch.zeros_like(self.centres)
        spread[self.counts > 1] = self.variances
        return spread

    def samples(
        self, chosen: Tensor, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        r"""Codes drawn from rows, some at a time.

        .. math:: z = c + \sqrt{v} \odot \epsilon, \qquad \epsilon \sim N(0, I)

        with c a row's centre and v its variances; a single code comes back as it is.

        Args:
            chosen: Rows, int64 [n], on the CPU; one may occur several times.
            generator: Of the draws, on the CPU.

        Yields:
            Some of ``chosen``, and their codes in float32, [B] and [B, D].
        """
        place = (self.counts > 1).cumsum(0) - 1  # [R], row of `variances`
        for some in chosen.split(_CHUNK):
            rows = some.to(self.centres.device)
            codes = self.centres[rows].float()
            noise = torch.randn(codes.shape, generator=generator)
            cluster = self.counts[rows] > 1
            if len(self.variances):
                spread = self.variances[place[rows].clamp(min=0)].float().sqrt()
                codes = codes + torch.where(cluster[:, None], spread * noise.to(spread), 0.0)
            yield some, codes
