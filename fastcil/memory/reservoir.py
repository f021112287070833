"""A uniform sample of a stream of unknown length, kept while the stream passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Reservoir(nn.Module):
    """Which images of a stream a memory of so many slots holds.

    Algorithm R (Vitter 1985): an image takes an empty slot while there is one. Then the n-th
    image offered, n counted from 0, takes slot r, drawn uniformly from 0 to n, if there is a slot
    of that number, and is not held otherwise. Each of N images offered is held in the end with
    the chance ``slots / N``. An image offered again, in another epoch, is another one to it and
    may be held twice.

    That is for a number of slots that stays. Where a full memory was given more of them, as by a
    budget for each class, the new images compete for the new slots alone, as many as a stream of
    their own: the old slots are what is left of images of which most are gone, and who came late
    would crowd them out.

    If there is room for every image of the task beside the exemplars, nothing competes: each has
    a slot of its own, which it takes again whenever it is offered.

    It is kept on the host whatever device its method is on: the loader reads it between steps,
    and its decisions depend on counts and random numbers alone.

    Attributes:
        slots: What each slot holds, int64 [K], a position in the new data followed by the
            exemplars; -1 while empty.
        seen: Images offered so far, over all tasks, int64 [].
        room: Slots there might be in the last task, int64 [].
        first: The first slot that new images compete for, int64 [].
        since: Images offered before that competition began, int64 [].
        seed: Sets the draws of runs and tasks apart, int64 [].
        own: The first of the slots that the new images have for their own, -1 if they compete,
            int64 [].

    Example:
        >>> reservoir = Reservoir()
        >>> reservoir.open(room=2, new=4, held=0)
        >>> reservoir.offer(torch.tensor([3, 0]), torch.Generator().manual_seed(0))
        (tensor([0, 1]), tensor([0, 1]))
        >>> reservoir.pool()
        tensor([3, 0])
    """

    slots: Tensor
    seen: Tensor
    room: Tensor
    first: Tensor
    since: Tensor
    seed: Tensor
    own: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slots", torch.empty(0, dtype=torch.int64))
        for name in ("seen", "room", "first", "since", "seed"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("own", torch.tensor(-1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Stays where it is: on the host."""
        return self

    def open(self, room: int, new: int, held: int) -> None:
        """Starts a task; its draws are set apart by torch's global generator.

        Args:
            room: Slots there may be.
            new: Images of the task.
            held: Exemplars; they are in the first slots, as many as there are slots.
        """
        count = min(room, new + held)
        self.slots = torch.full((count,), -1)
        self.slots[:held] = new + torch.arange(min(held, count))
        self.own = torch.tensor(held if count == new + held else -1)
        if count:
            self.seed = torch.randint(2**48, ())
            grew = 0 < int(self.room) <= held < room
            self.first = torch.tensor(held if grew else 0)
            self.since = self.seen.clone() if grew else torch.zeros_like(self.seen)
            self.room = torch.tensor(room)

    def occupied(self) -> Tensor:
        """Numbers of the slots that hold something, ascending, int64 [F]."""
        return (self.slots >= 0).nonzero().flatten()

    def pool(self) -> Tensor:
        """What the occupied slots hold, int64 [F]."""
        return self.slots[self.slots >= 0]

    def draws(self) -> torch.Generator:
        """Draws that the images offered so far set apart from every other's, and that are saved."""
        return torch.Generator().manual_seed(int(self.seed) + int(self.seen))

    def shuffle(self) -> Tensor:
        """Puts what is held in a random order, so that memory may keep a prefix.

        Returns:
            Which slot each of them had, int64 [F].
        """
        slots = self.occupied()
        order = slots[torch.randperm(len(slots), generator=self.draws())]
        self.slots = self.slots[order]
        return order

    def offer(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Offers images one after the other.

        Args:
            images: Positions in the new data, int64 [B], on the CPU.
            generator: Of the draws.

        Returns:
            Which of the B images were taken and still are when the last was offered, and the
            slot of each, int64 [T] both.
        """
        taken = self._wanted(images, generator)
        self.seen = self.seen + len(images)
        # Of those that want the same slot the last has it.
        order = taken.argsort(stable=True)
        wanted = taken[order]
        last = torch.ones(len(wanted), dtype=torch.bool)
        last[:-1] = wanted[1:] != wanted[:-1]
        last &= wanted < len(self.slots)
        which, slots = order[last], wanted[last]
        self.slots = self.slots.index_copy(0, slots, images[which])
        return which, slots

    def _wanted(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The slot that each image would take, a number too large where it takes none."""
        if self.own >= 0:
            return self.own + images
        count = len(images)
        free = (self.slots < 0).nonzero().flatten()[:count]
        # In float64 the product with a count is exact to far below one slot.
        draws = torch.rand(count - len(free), dtype=torch.float64, generator=generator)
        numbers = self.seen - self.since + torch.arange(len(free), count)
        return torch.cat([free, self.first + (draws * (numbers + 1)).long()])
