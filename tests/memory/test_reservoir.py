"""A reservoir: a uniform sample, the sequential algorithm's bits, and its state."""

from __future__ import annotations

import pytest
import torch

from fastcil.memory.reservoir import Reservoir


def fill(room: int, count: int, batch: int, seed: int, held: int = 0, epochs: int = 1) -> Reservoir:
    """A reservoir that ``count`` images were offered to, in batches."""
    reservoir = Reservoir()
    reservoir.open(room, count, held)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for images in torch.arange(count).split(batch):
            reservoir.offer(images, generator)
    return reservoir


@pytest.mark.parametrize(
    ("room", "count", "batch"), [(5, 20, 2), (5, 20, 7), (8, 20, 20), (19, 20, 6), (1, 20, 3)]
)
def test_every_image_is_held_with_the_same_chance(room, count, batch):
    seeds = 250
    held = torch.zeros(count)
    for seed in range(seeds):
        held[fill(room, count, batch, seed).pool()] += 1
    assert held.sum() == seeds * room
    expected = seeds * room / count
    # Sampling without replacement: the sum is chi-square with count - 1 degrees of freedom once
    # it is divided by the chance of not being held, up to the factor of a finite population.
    statistic = float(((held - expected) ** 2).sum() / expected)
    statistic /= (1 - room / count) * count / (count - 1)
    assert statistic < 43.8  # the 99.9 % point at 19 degrees of freedom


def test_every_offer_of_every_epoch_has_the_same_chance():
    """The share of the first of two tasks is its share of all that was offered."""
    first, seeds = 0, 100
    for seed in range(seeds):
        reservoir = fill(10, 30, 4, seed, epochs=3)
        kept = len(reservoir.pool())
        reservoir.open(10, 20, kept)
        generator = torch.Generator().manual_seed(10_000 + seed)
        for images in torch.arange(20).repeat(3).split(4):
            reservoir.offer(images, generator)
        assert kept == len(reservoir.pool()) == 10 and int(reservoir.seen) == 150
        first += int((reservoir.pool() >= 20).sum())
    assert first / (10 * seeds) == pytest.approx(90 / 150, abs=0.05)


def test_new_slots_of_a_full_memory_are_those_of_the_new_images():
    """Ten more for each of four tasks: ten are held of each, of a task all alike."""
    seeds, held = 150, torch.zeros(4, 30)
    for seed in range(seeds):
        torch.manual_seed(seed)
        reservoir, kept = Reservoir(), torch.empty(0, 2, dtype=torch.int64)
        for task in range(4):
            reservoir.open(10 * (task + 1), 30, len(kept))
            for images in torch.randperm(30).split(7):
                reservoir.offer(images, reservoir.draws())
            order = reservoir.shuffle()
            assert len(order) == 10 * (task + 1)
            new = torch.stack([torch.full((30,), task), torch.arange(30)], 1)
            kept = torch.cat([new, kept])[reservoir.slots]
            reservoir.open(0, 0, 0)
        assert kept[:, 0].bincount().tolist() == [10] * 4
        held[kept[:, 0], kept[:, 1]] += 1
    statistic = ((held - seeds / 3) ** 2).sum(1) / (seeds / 3) / (1 - 1 / 3) * 29 / 30
    assert (statistic < 58.3).all()  # the 99.9 % point at 29 degrees of freedom


def test_runs_of_other_seeds_draw_otherwise():
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        reservoir = Reservoir()
        reservoir.open(5, 40, 0)
        for images in torch.arange(40).split(8):
            reservoir.offer(images, reservoir.draws())
        found.append(sorted(reservoir.pool().tolist()))
    assert found[0] != found[1]


@pytest.mark.parametrize("held", [0, 3, 9])
@pytest.mark.parametrize("room", [0, 1, 6, 15])
def test_it_is_the_sequential_algorithm(room, held):
    """Offered one by one, with the same random numbers, the same images take the same slots."""
    count, batch = 20, 6
    reservoir = Reservoir()
    reservoir.open(room, count, held)
    slots = [count + k if k < held else -1 for k in range(room)]
    assert reservoir.slots.tolist() == slots
    seen = 0
    for step in range(9):
        images = torch.randperm(count, generator=torch.Generator().manual_seed(step))[:batch]
        free = min(slots.count(-1), batch)
        draws = torch.rand(
            batch - free, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
        ).tolist()
        takers = {}
        for k, image in enumerate(images.tolist()):
            slot = slots.index(-1) if -1 in slots else int(draws[k - free] * (seen + 1))
            seen += 1
            if slot < room:
                slots[slot], takers[slot] = image, k
        which, taken = reservoir.offer(images, torch.Generator().manual_seed(step))
        assert reservoir.slots.tolist() == slots and int(reservoir.seen) == seen
        assert dict(zip(taken.tolist(), which.tolist(), strict=True)) == takers
        assert reservoir.pool().tolist() == [s for s in slots if s >= 0]
        assert reservoir.occupied().tolist() == [k for k, s in enumerate(slots) if s >= 0]


def test_with_room_for_all_each_image_has_its_own_slot():
    reservoir = Reservoir()
    reservoir.open(room=100, new=6, held=2)
    generator = torch.Generator()
    for epoch in range(3):
        for images in torch.randperm(6, generator=generator).split(4):
            which, slots = reservoir.offer(images, generator)
            assert which.sort().values.tolist() == list(range(len(images)))
            assert torch.equal(slots, images[which] + 2)
        assert sorted(reservoir.pool().tolist()) == list(range(8)), epoch
    # In the next task there is too little room: what is free goes first.
    reservoir.open(room=10, new=6, held=8)
    which, slots = reservoir.offer(torch.tensor([4, 2]), generator)
    assert slots.tolist() == [8, 9] and which.tolist() == [0, 1]


def test_it_stays_on_the_host_and_its_state_is_saved():
    reservoir = fill(4, 12, 5, 0)
    assert reservoir.to("meta").slots.device.type == "cpu"
    state = reservoir.state_dict()
    twin = Reservoir()
    for name, value in state.items():
        setattr(twin, name, value.clone())
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    for one, generator in zip((reservoir, twin), draws, strict=True):
        one.offer(torch.arange(12), generator)
    assert torch.equal(reservoir.slots, twin.slots) and torch.equal(reservoir.seen, twin.seen)
