"""Batches of a stage's streams: a pure function of key, epoch and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastcil.contract import Batch, Stream
from fastcil.data import Augmentation, view_geometry
from fastcil.engine.reading import read_together
from fastcil.engine.seeds import generator
from fastcil.ops import send

_ORDER, _PIXELS = 0, 1


class Loader:
    """Reads the batches of a stage.

    Nothing is remembered between batches: every shuffle and every augmentation comes from a
    generator keyed by (seed, task, stage, stream, epoch, step), so a run resumes anywhere by
    asking for the next step, and any worker can make any batch. Only a stream whose ``subset`` is
    a function depends on more: on what that gives when the batch is asked for, and of the first
    stream, whose epochs must have a length, when the loader is made.

    No batch waits for the device (`fastcil.ops.send`): while one trains there, the host draws the
    next, reads it where images are the host's, and queues it. So nothing is gained by workers.

    Args:
        streams: What to read; empty ones are left out.
        augmentation: How images are cut and changed.
        device: Where the batch is wanted.
        key: Non-negative numbers that set this stage apart: seed, task, stage.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        augmentation: Augmentation,
        device: torch.device,
        key: tuple[int, ...],
    ) -> None:
        self._readers: list[_StreamReader] = []
        for number, stream in enumerate(streams):
            leads = not self._readers
            if leads and callable(stream.subset):
                stream = replace(stream, subset=stream.subset())
            if len(stream):
                self._readers.append(
                    _StreamReader(stream, augmentation, device, (*key, number), leads)
                )

    @property
    def steps(self) -> int:
        """Steps of an epoch: the first stream once."""
        return self._readers[0].stream.steps if self._readers else 0

    @property
    def constant(self) -> tuple[int, int] | None:
        """How many images there are, and in a full batch, if each is read alike every time.

        Then a batch's ``entry`` says which they are. None where something is drawn, where another
        stream joins in, or where the images to choose from change.
        """
        if len(self._readers) != 1:
            return None
        reader = self._readers[0]
        stream = reader.stream
        if stream.views is not None or reader.fixed is None or not reader.augmentation.constant:
            return None
        return len(stream), min(stream.batch_size, len(stream))

    def batches(self, epoch: int, step: int) -> list[Batch]:
        """One batch per stream for this step; none for a subset that is empty now."""
        drawn = [reader.batch(epoch, step) for reader in self._readers]
        return [batch for batch in drawn if batch is not None]


class _StreamReader:
    """Reads one stream; the one that leads sets the length of an epoch."""

    def __init__(
        self,
        stream: Stream,
        augmentation: Augmentation,
        device: torch.device,
        key: tuple[int, ...],
        leads: bool,
    ) -> None:
        self.stream = stream
        self.augmentation = augmentation
        self.device = device
        self.key = key
        self.leads = leads
        # Empty parts stay: a batch's `part` numbers what the method passed.
        lengths = torch.tensor([0] + [len(part) for part in stream.parts])
        self.starts = lengths.cumsum(0)
        self.stores = [part.images for part in stream.parts]
        self.labels = torch.cat([part.labels.cpu() for part in stream.parts])
        self.sizes = torch.cat([store.sizes.cpu() for store in self.stores])
        self.fixed = None if callable(stream.subset) else stream.pool()
        self._epoch_order: tuple[tuple[int, int], Tensor] | None = None

    def _order(self, epoch: int, round_: int) -> Tensor:
        """The shuffle of one pass; kept while it is the current one."""
        if self._epoch_order is None or self._epoch_order[0] != (epoch, round_):
            shuffle = torch.randperm(
                len(self.stream), generator=generator(*self.key, _ORDER, epoch, round_)
            )
            self._epoch_order = ((epoch, round_), shuffle)
        return self._epoch_order[1]

    def _entries(self, epoch: int, step: int) -> Tensor:
        """Entries of the pool for this step; a short stream starts over with a new shuffle.

        The stream that leads ends a pass with what is left; of the others, whose share of a step
        must not depend on where a pass ends, the next pass fills the batch.
        """
        length, wanted = len(self.stream), min(self.stream.batch_size, len(self.stream))
        if self.leads:
            round_, within = divmod(step, -(-length // wanted))
            return self._order(epoch, round_)[within * wanted : (within + 1) * wanted]
        round_, first = divmod(step * wanted, length)
        entries = self._order(epoch, round_)[first : first + wanted]
        missing = wanted - len(entries)
        if missing:
            entries = torch.cat([entries, self._order(epoch, round_ + 1)[:missing]])
        return entries

    def _draw(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Entries of the pool for this step, and their positions."""
        if self.fixed is not None:
            entries = self._entries(epoch, step)
            return entries, self.fixed[entries]
        pool = self.stream.pool()
        draws = generator(*self.key, _ORDER, epoch, step)
        entries = torch.randperm(len(pool), generator=draws)[: self.stream.batch_size]
        return entries, pool[entries]

    def batch(self, epoch: int, step: int) -> Batch | None:
        """The stream's batch of this step; None if its subset is empty now."""
        entries, positions = self._draw(epoch, step)
        if not len(positions):
            return None
        part = torch.bucketize(positions, self.starts[1:], right=True)
        index = positions - self.starts[part]
        draws = generator(*self.key, _PIXELS, epoch, step)
        sizes = self.sizes[positions]
        crops, flips = self.augmentation.draw(sizes, draws)
        # The order in which they draw decides the run.
        views = self._views(part, index, sizes, draws)
        images = read_together(
            self.stores,
            part,
            index,
            self.augmentation,
            crops,
            flips,
            self.device,
            views,
            self.augmentation.program(len(index), draws),
        )
        labels, part, index = send((self.labels[positions], part, index), self.device)
        return Batch(images, labels, part, index, entries)

    def _views(
        self, part: Tensor, index: Tensor, sizes: Tensor, draws: torch.Generator
    ) -> Tensor | None:
        """Simulated compression of the images of part 0 that this step's draw picks."""
        views = self.stream.views
        if views is None or views.probability <= 0:
            return None
        picked = (torch.rand(len(part), generator=draws) < views.probability) & (part == 0)
        boxes = views.boxes.cpu()[torch.where(part == 0, index, 0)]
        return view_geometry(sizes, boxes, views.ratio) * picked[:, None].to(torch.int16)
