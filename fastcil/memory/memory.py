"""The exemplar memory: what is kept of every class between tasks, within a budget."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastcil.contract import Retained, Task, nearest
from fastcil.data import Examples, ImageStore
from fastcil.errors import FastcilError
from fastcil.memory.budget import Budget
from fastcil.memory.checksum import checksum
from fastcil.memory.codecs import Codec, Encoded, make_codec
from fastcil.memory.limits import (
    affordable,
    check_fit,
    check_others,
    costs,
    most_picks,
    prefixes,
    too_small,
)
from fastcil.memory.looks import Embed, Look, looks
from fastcil.memory.selection import SELECTIONS

Keeps = Literal["exemplars", "everything", "nothing"]
OWN = "own"


class Memory:
    """Exemplars of every class learned, encoded, selected and reduced to fit a budget.

    They are grouped by class, ascending, and within a class stand in the order of selection, so
    that keeping fewer of a class means keeping a prefix (Rebuffi et al. 2017, Alg. 5). Selection
    looks at the images as they will be remembered: encoded and decoded. What can't be read as it
    is encoded is decoded by `examples`, once until it changes, and counted by `working_nbytes`.

    With ``selection="own"`` the method chooses instead, from all classes at once: exemplars stand
    in the order of its choice, which need not be grouped, and the budget is shared by all of them
    without quotas; fewer are kept by keeping a prefix of the whole.

    Args:
        budget: A `Budget`, or the text that `Budget.parse` reads.
        codec: A `Codec`, or the name of one that needs no settings.
        selection: ``herding``, ``random`` or ``own``.
        keeps: ``exemplars``; ``everything`` to keep all images raw whatever the budget (joint
            training); ``nothing``.

    Raises:
        FastcilError: An unknown name, or a budget that is none.

    Example:
        >>> store = ImageStore.from_batch(torch.zeros(6, 8, 8, 3, dtype=torch.uint8))
        >>> new = Examples(store, torch.tensor([0, 1, 0, 1, 0, 1]))
        >>> task = Task(index=0, classes=(0, 1), known=0, examples=new, exemplars=new.select([]))
        >>> memory = Memory("4 images")
        >>> memory.update(task, embed=lambda examples: torch.ones(len(examples), 2))
        >>> memory.counts(2), memory.nbytes  # 4 * (8 * 8 * 3 + 28)
        ([2, 2], 880)
    """

    _images: Encoded
    _decoded: ImageStore | None

    def __init__(
        self,
        budget: Budget | str | int,
        codec: Codec[Any] | str = "raw",
        selection: str = "herding",
        keeps: Keeps = "exemplars",
    ) -> None:
        names = {"selection": (selection, (*SELECTIONS, OWN)), "keeps": (keeps, get_args(Keeps))}
        for argument, (name, known) in names.items():
            if name not in known:
                advice = nearest(name, known)
                raise FastcilError(f"{argument} is '{name}', which is unknown; {advice}")
        self.budget = Budget.parse(budget)
        if keeps == "everything":
            codec = "raw"
        self.codec = make_codec(codec) if isinstance(codec, str) else codec
        self.selection = selection
        self.keeps = keeps
        self._set(self.codec.store.empty(), torch.empty(0, dtype=torch.int32))
        self._warned = False

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self._labels.device

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers held."""
        return self.retained().nbytes

    @property
    def working_nbytes(self) -> int:
        """Bytes of decoded images, where they aren't what is held, and of the codec's networks."""
        decoded = None if self._decoded is self._images else self._decoded
        return (0 if decoded is None else decoded.nbytes) + self.codec.working_nbytes

    def release(self) -> None:
        """Lets go of decoded images and of the codec's networks, until they are needed again."""
        self._decoded = None
        self.codec.release()

    @property
    def units(self) -> float:
        """Cost of what is held in the papers' images (Luo et al. 2023, Eq. 4)."""
        return float(self.codec.units(self._images).sum())

    def counts(self, classes: int) -> list[int]:
        """Exemplars held of each of the first ``classes`` classes."""
        held: list[int] = torch.bincount(self._labels, minlength=classes)[:classes].tolist()
        return held

    def examples(self) -> Examples:
        """The exemplars, decoded as far as reading needs it; labels int64."""
        if self._decoded is None:
            self._decoded = self.codec.decode(self._images)
        return Examples(self._decoded, self._labels.long())

    def faithful(self, place: int) -> Tensor | None:
        """Where an exemplar is the image itself, bool [H W]; None where no pixel is better."""
        return self.codec.faithful(self._images.select([place]))

    def exemplar_nbytes(self) -> Tensor:
        """What each exemplar costs in bytes, in the order of `examples`, int64 [N]."""
        return self.codec.nbytes(self._images)

    def retained(self) -> Retained:
        """The entry that counts towards the budget."""
        return Retained("exemplars", "exemplars", self.state())

    def state(self) -> dict[str, Tensor]:
        """Every buffer held, by name; `restore` takes it back."""
        return {**self._images.state(), "labels": self._labels}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Holds what another memory's `state` held, on this one's device.

        Raises:
            FastcilError: A buffer is missing, or there is one too many.
        """
        if state.keys() != self.state().keys():
            odd = ", ".join(sorted(state.keys() ^ self.state().keys()))
            raise FastcilError(f"the saved memory does not fit: {odd} missing or not known.")
        images = {name: value for name, value in state.items() if name != "labels"}
        restored, labels = self.codec.store.from_state(images), state["labels"]
        if len(labels) != len(restored):
            count = f"{len(labels)} labels for {len(restored)} exemplars"
            raise FastcilError(f"the saved memory does not fit: {count}.")
        self._set(restored.to(self.device), labels.to(self.device, torch.int32))

    def to(self, device: torch.device | str) -> Memory:
        """Moves the buffers; returns itself."""
        self._set(self._images.to(device), self._labels.to(device))
        return self

    def use(self, codec: Codec[Any]) -> None:
        """Encodes by ``codec`` from now on: the codec there is, with other settings.

        What is held stays, as far as the codec goes on with it. A memory that keeps everything
        goes on keeping it raw.
        """
        if self.keeps != "everything":
            kept = codec.succeed(self.codec, self._images).to(self.device)
            self.codec = codec
            self.release()
            if not bool(kept.all()):
                self._set(self._images.select(kept), self._labels[kept])

    def checksum(self) -> str:
        """SHA-256 over all buffers: equal on every rank, and after a resume.

        Example:
            >>> Memory("none").checksum() == Memory("unlimited", codec="bbox").checksum()
            True
        """
        return checksum(self.state())

    def update(
        self,
        task: Task,
        embed: Embed,
        marks: Tensor | None = None,
        *,
        other_nbytes: int = 0,
        seed: int = 0,
        chosen: Tensor | None = None,
    ) -> None:
        """Makes room for a task's classes and keeps exemplars of them.

        Every class may cost the budget's quota. An old one keeps its longest prefix within it. Of
        a class in ``task`` all images are encoded and put in the order of selection, and picks are
        kept up to the first that would exceed the quota, even if a later one would fit (as in CIM,
        Luo et al. 2023). A class that comes again is selected anew from exemplars and new images.

        Args:
            task: The new data, and how many classes are known.
            embed: Gives features; not asked for ``random``, and class by class only where the
                codec changes images (`fastcil.memory.looks`).
            marks: What matters in each new image, one row each, for a codec that asks for it.
            other_nbytes: Bytes of everything else that counts towards a budget in bytes.
            seed: Of the draws of ``random``; give each task its own.
            chosen: What to keep for ``own``, as `Method.chosen` answers it.

        Raises:
            FastcilError: ``other_nbytes`` alone exceeds the budget; the codec lacks marks;
                features that are not finite or not one row per image. Memory is then unchanged.

        Warns:
            UserWarning: Once, if the quota holds no exemplar at all of some class.
        """
        if self.keeps == "everything":
            self._keep_all(task.examples)
            return
        check_others(self.budget, task.total, other_nbytes)
        if self.keeps == "nothing" or self.budget.amount == 0:
            self._hold([])
            return
        if marks is not None and len(marks) != len(task.examples):
            raise FastcilError(
                f"marks has {len(marks)} rows for {len(task.examples)} new images; pass one each."
            )
        if self.selection == OWN:
            self._keep_chosen(task, chosen, marks, other_nbytes)
            return
        quota = self.budget.quota(task.total, other_nbytes)
        generator = torch.Generator().manual_seed(seed)
        look = looks(task, self.examples, self.codec, embed)
        kept, too_dear = self._reduced(quota, set(task.classes))
        for label in task.classes:
            candidates = self._candidates(label, task.examples, marks)
            order = self._order(candidates, label, look, quota, generator)
            cost = self._cost(candidates).cpu()[order]
            prefix = order[: affordable(cost, quota)]
            if len(order) and not len(prefix):
                too_dear.append(float(cost[0]))
            images = candidates.select(prefix.to(candidates.device)).to(self.device)
            self.codec.verify(images)
            kept.append((images, torch.full((len(images),), label, dtype=torch.int32)))
        check_fit([images for images, _ in kept], self.codec, self.budget, task.total, other_nbytes)
        self._hold(kept)
        if too_dear and not self._warned:
            self._warned = True
            said = too_small(self.budget, too_dear, task.total, other_nbytes)
            warnings.warn(said, stacklevel=2)

    def replace(
        self, index: Tensor, images: ImageStore, *, classes: int, other_nbytes: int = 0
    ) -> None:
        """Puts other images in the place of exemplars; labels and order stay.

        They are encoded as exemplars are. Should a codec need more bytes for them than for those
        before, each class keeps its longest prefix within the quota, as in `update`.

        Args:
            index: int64 [M], positions in `examples`, each once.
            images: M raw images, each of its exemplar's height and width.
            classes: Classes known.
            other_nbytes: Bytes of everything else that counts towards a budget in bytes.

        Raises:
            FastcilError: Exemplars that the method chooses or that are all images there are;
                positions out of range; images of other sizes; a codec that asks for marks, for
                those kept don't belong to these images. Memory is then unchanged.
        """
        if self.keeps != "exemplars" or self.selection == OWN:
            raise FastcilError(
                f"memory keeps {self.keeps} by selection '{self.selection}'; only exemplars "
                f"selected by {' or '.join(SELECTIONS)} can be replaced."
            )
        index = index.cpu()
        if len(index.unique()) != len(index) or bool(((index < 0) | (index >= len(self))).any()):
            raise FastcilError(f"index must hold positions below {len(self)}, each once.")
        if not torch.equal(images.sizes.cpu(), self.examples().images.sizes.cpu()[index]):
            raise FastcilError(
                "images must be as many as index, each of the height and width of its exemplar."
            )
        encoded = self.codec.encode(images, None).to(self.device)
        self.codec.verify(encoded)
        both = self.codec.store.cat([self._images, encoded])
        place = torch.arange(len(self))
        place[index] = torch.arange(len(self), len(both))
        before, self._images = self._images, both.select(place.to(self.device))
        kept, _ = self._reduced(self.budget.quota(classes, other_nbytes), set())
        self._images = before
        check_fit([images for images, _ in kept], self.codec, self.budget, classes, other_nbytes)
        self._hold(kept)

    def _keep_chosen(
        self, task: Task, chosen: Tensor | None, marks: Tensor | None, other_nbytes: int
    ) -> None:
        """Keeps the longest prefix of the method's choice that fits, in its order."""
        new = len(task.examples)
        if chosen is None or bool(((chosen < 0) | (chosen >= new + len(self))).any()):
            raise FastcilError(
                f"chosen is {chosen}; with selection 'own' it must be positions below "
                f"{new + len(self)}, of the new images and then the exemplars."
            )
        chosen = chosen.cpu()
        if not len(chosen):
            self._hold([])
            return
        old = chosen >= new
        fresh, again = chosen[~old], chosen[old] - new
        encoded = self.codec.encode(
            task.examples.images.select(fresh.to(task.examples.images.device)),
            None if marks is None else marks[fresh.to(marks.device)],
        )
        self.codec.verify(encoded)
        held = self._images.select(again.to(self.device))
        images = self.codec.store.cat([encoded.to(self.device), held])
        place = old.int().argsort(stable=True).argsort()  # where each pick stands in `images`
        left = self.budget.limit(task.total)
        if self.budget.unit == "bytes":
            left -= other_nbytes
        kept = place[: affordable(self._cost(images).cpu()[place], left)]
        labels = torch.cat([task.examples.labels.cpu(), self._labels.cpu().long()])[chosen]
        images = images.select(kept.to(self.device))
        check_fit([images], self.codec, self.budget, task.total, other_nbytes)
        self._set(images, labels[: len(kept)].to(self.device, torch.int32))

    def _reduced(
        self, quota: float, without: set[int]
    ) -> tuple[list[tuple[Encoded, Tensor]], list[float]]:
        """Each class's longest prefix within the quota; what the first of those dropped cost."""
        cost = self._cost(self._images).cpu()
        labels = self._labels.cpu()
        chosen, too_dear = prefixes(labels, cost, quota, without)
        return [(self._images.select(chosen.to(self.device)), labels[chosen])], too_dear

    def _candidates(self, label: int, examples: Examples, marks: Tensor | None) -> Encoded:
        """What may be kept of a class: its exemplars, then its new images, encoded."""
        chosen = (examples.labels == label).nonzero().flatten()
        images = examples.images.select(chosen)
        mine = None if marks is None else marks[chosen.to(marks.device)]
        encoded: Encoded = self.codec.encode(images, mine)
        held = self._images.select((self._labels == label).nonzero().flatten())
        return self.codec.store.cat([held.to(encoded.device), encoded]) if len(held) else encoded

    def _order(
        self,
        candidates: Encoded,
        label: int,
        look: Look,
        quota: float,
        generator: torch.Generator,
    ) -> Tensor:
        """As many picks as could fit, and one more, int64 on the CPU."""
        count = len(candidates)
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        limit = most_picks(self._cost(candidates), quota)
        features = partial(look, candidates, label)
        return SELECTIONS[self.selection](count, features, limit, generator).cpu()

    def _cost(self, images: Encoded) -> Tensor:
        """What each image costs in the budget's unit, float64 [N]."""
        return costs(images, self.codec, self.budget)

    def _set(self, images: Encoded, labels: Tensor) -> None:
        """Replaces what is held, of which nothing is decoded then."""
        self._images, self._labels = images, labels
        self._decoded = None

    def _hold(self, kept: list[tuple[Encoded, Tensor]]) -> None:
        """Replaces what is held by these images and their labels, grouped by class."""
        full = [part for part in kept if len(part[0])]
        if not full:
            self._set(self.codec.store.empty(self.device), self._labels[:0].clone())
            return
        images = self.codec.store.cat([images for images, _ in full])
        labels = torch.cat([labels for _, labels in full]).to(torch.int32)
        order = labels.argsort(stable=True)
        if not torch.equal(labels[order], labels):
            images, labels = images.select(order.to(self.device)), labels[order]
        self._set(images, labels.to(self.device))

    def _keep_all(self, examples: Examples) -> None:
        """Adds all new images as they are."""
        labels = examples.labels.cpu()
        order = labels.argsort(stable=True)
        images = examples.images.select(order.to(examples.images.device))
        self._hold([(self._images, self._labels.cpu()), (images.to(self.device), labels[order])])
