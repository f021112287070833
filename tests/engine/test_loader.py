"""Batches: every image once an epoch, the same bits whenever asked, the pixels they should have."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcil.contract import Stream, Views
from fastcil.data import Augmentation, Examples, ImageStore
from fastcil.engine.loader import Loader

CPU = torch.device("cpu")
SIDE = 6
# Reads an image as it lies: normalised values times 255 are its bytes.
PLAIN = Augmentation(
    SIDE, crop="none", flip=False, brightness=0.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)
SOME = torch.tensor([0, 2, 3, 5, 8, 9])
BUSY = Augmentation(SIDE, min_scale=0.2, policy="cifar", cutout=2)


def numbered(count: int, first: int = 0) -> Examples:
    """Images of one colour each: their number, which is their label too."""
    numbers = torch.arange(first, first + count)
    pixels = numbers.to(torch.uint8)[:, None, None, None].expand(count, SIDE, SIDE, 3)
    return Examples(ImageStore.from_batch(pixels), numbers)


def noise(count: int, side: int = 20, seed: int = 0) -> ImageStore:
    rng = np.random.default_rng(seed)
    return ImageStore.from_images(
        [rng.integers(0, 256, (side + k % 5, side + k % 3, 3), np.uint8) for k in range(count)]
    )


def load(*streams: Stream, augmentation: Augmentation = PLAIN, key: tuple[int, ...] = (1, 2)):
    return Loader(streams, augmentation, CPU, key)


def as_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def seen(loader: Loader, epoch: int, stream: int = 0) -> list[int]:
    """The numbers of the images of an epoch, as their pixels say."""
    batches = [loader.batches(epoch, step)[stream] for step in range(loader.steps)]
    return [n for batch in batches for n in as_bytes(batch.images)[:, 0, 0, 0].tolist()]


def same(a, b) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("images", "labels", "part", "index")
    )


@pytest.mark.parametrize(
    "count, batch, sizes",
    [
        (12, 4, [4, 4, 4]),
        (14, 4, [4, 4, 4, 2]),
        (13, 4, [4, 4, 4]),
        (3, 8, [3]),
        (1, 8, [1]),
        (5, 1, [1] * 5),
        (0, 4, []),
    ],
)
def test_an_epoch_reads_every_image_once(count, batch, sizes):
    loader = load(Stream((numbered(count),), batch))
    assert [len(loader.batches(0, step)[0]) for step in range(loader.steps)] == sizes
    for epoch in range(3):
        numbers = Counter(seen(loader, epoch))
        left_out = set(range(count)) - set(numbers)
        assert set(numbers.values()) <= {1}
        # Batch norm has no variance to learn from one image, so a last one alone is left out.
        assert len(left_out) == (count > batch > 1 and count % batch == 1)


def test_the_image_left_out_is_another_one_each_epoch():
    loader = load(Stream((numbered(13),), 4))
    left_out = [set(range(13)) - set(seen(loader, epoch)) for epoch in range(8)]
    assert len({next(iter(numbers)) for numbers in left_out}) > 2


def test_batches_are_the_same_bits_in_any_order():
    store = noise(22)
    parts = (Examples(store, torch.arange(22)), numbered(5))
    views = Views(torch.tensor([[4, 4, 12, 12]], dtype=torch.int16).expand(22, 4), 4.0, 0.5)
    streams = (Stream(parts, 6, views=views), Stream(parts, 4, subset=torch.arange(22, 27)))
    places = [(epoch, step) for epoch in range(3) for step in range(5)]
    loader = load(*streams, augmentation=BUSY)
    straight = {place: loader.batches(*place) for place in places}
    loader = load(*streams, augmentation=BUSY)
    for k in torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).tolist():
        again = loader.batches(*places[k])
        assert all(same(a, b) for a, b in zip(straight[places[k]], again, strict=True))


def test_epochs_steps_streams_and_keys_differ():
    examples = Examples(noise(12), torch.arange(12))
    stream = Stream((examples,), 12)

    def first(key=(1, 2), epoch=0, which=0):
        loader = load(stream, stream, augmentation=BUSY, key=key)
        return loader.batches(epoch, 0)[which]

    drawn = [first(), first(epoch=1), first(which=1), first(key=(1, 3)), first(key=(2, 2))]
    for i, a in enumerate(drawn):
        assert sorted(a.index.tolist()) == list(range(12))
        for b in drawn[:i]:
            assert not torch.equal(a.index, b.index)
            # Not only the order: the same image is cut in another way.
            assert not torch.equal(a.images[a.index.argsort()], b.images[b.index.argsort()])


def test_one_image_is_never_cut_twice_alike():
    store = noise(1).select([0] * 12)
    loader = load(Stream((Examples(store, torch.arange(12)),), 4), augmentation=BUSY)
    looks = {
        image.numpy().tobytes()
        for epoch in range(2)
        for step in range(3)
        for image in loader.batches(epoch, step)[0].images
    }
    assert len(looks) == 24


@pytest.mark.parametrize("length, batch", [(5, 2), (5, 3), (7, 7), (3, 8), (1, 4), (40, 6)])
def test_short_streams_start_over_and_never_run_dry(length, batch):
    loader = load(Stream((numbered(40),), 4), Stream((numbered(length),), batch))
    assert loader.steps == 10
    wanted = min(length, batch)
    batches = [loader.batches(0, step)[1] for step in range(30)]
    assert all(len(b) == wanted for b in batches)
    numbers = torch.cat([b.index for b in batches]).tolist()
    rounds = [numbers[k : k + length] for k in range(0, len(numbers) - length + 1, length)]
    assert all(sorted(r) == list(range(length)) for r in rounds)
    if length > 3 and len(rounds) > 3:
        assert len(set(map(tuple, rounds))) > 1, "every round has the same shuffle"


def test_the_first_stream_starts_over_too():
    loader = load(Stream((numbered(10),), 4))
    numbers = [loader.batches(0, step)[0].index.tolist() for step in range(6)]
    assert [len(n) for n in numbers] == [4, 4, 2] * 2
    rounds = [[n for part in numbers[k : k + 3] for n in part] for k in (0, 3)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == list(range(10)) and rounds[0] != rounds[1]


@pytest.mark.parametrize("lengths", [(4, 9), (0, 7), (5, 0, 3), (1, 1, 0, 6)])
def test_part_and_index_say_where_an_image_is(lengths):
    starts = np.cumsum([0, *lengths])
    parts = tuple(numbered(n, int(start)) for n, start in zip(lengths, starts, strict=False))
    loader = load(Stream(parts, 4))
    for step in range(loader.steps):
        (batch,) = loader.batches(0, step)
        shown = as_bytes(batch.images)[:, 0, 0, 0]
        for k in range(len(batch)):
            part = parts[int(batch.part[k])]
            place = int(batch.index[k])
            assert int(part.labels[place]) == int(batch.labels[k]) == int(shown[k])
            assert torch.equal(as_bytes(batch.images[k]).permute(1, 2, 0), part.images.image(place))


def test_a_subset_is_all_that_is_read():
    subset = torch.tensor([1, 2, 8, 11, 13])
    loader = load(Stream((numbered(9), numbered(6, 9)), 2, subset=subset))
    assert loader.steps == 2
    everything = {n for epoch in range(10) for n in seen(loader, epoch)}
    assert everything == set(subset.tolist())
    assert len(Stream((numbered(9),), 2, subset=subset[:0])) == 0


def test_empty_streams_are_left_out():
    none, some = numbered(0), numbered(6)
    loader = load(Stream((none,), 4), Stream((none, some), 3), Stream((), 2), Stream((some,), 6))
    assert loader.steps == 2, "the first stream that holds an image sets the length"
    assert [len(batch) for batch in loader.batches(0, 0)] == [3, 6]
    assert load(Stream((none,), 4)).steps == load().steps == 0


def boxes_within(store: ImageStore, seed: int = 1) -> Tensor:
    """One random box per image; the first is empty, the second the whole image."""
    rng = np.random.default_rng(seed)
    boxes = np.zeros((len(store), 4), np.int16)
    for k, (height, width) in enumerate(store.sizes.tolist()):
        y, x = np.sort(rng.integers(0, height + 1, 2)), np.sort(rng.integers(0, width + 1, 2))
        boxes[k] = y[0], x[0], y[1], x[1]
    boxes[0], boxes[1] = 0, (0, 0, *store.sizes[1].tolist())
    return torch.from_numpy(boxes)


@pytest.mark.parametrize("ratio", [4.0, 9.0])
@pytest.mark.parametrize("crop", ["resized", "none"])
def test_views_show_what_compress_would(ratio, crop):
    """With the same key, raw images behind views read as the packed ones do."""
    store, labels = noise(24), torch.arange(24)
    boxes = boxes_within(store)
    augmentation = Augmentation(16, crop=crop, brightness=0.0)
    raw = load(
        Stream((Examples(store, labels),), 8, views=Views(boxes, ratio, 1.0)),
        augmentation=augmentation,
    )
    packed = load(
        Stream((Examples(store.compress(boxes, ratio), labels),), 8), augmentation=augmentation
    )
    plain = load(Stream((Examples(store, labels),), 8), augmentation=augmentation)
    for step in range(3):
        (a,), (b,), (c,) = (x.batches(0, step) for x in (raw, packed, plain))
        assert same(a, b) and not torch.equal(a.images, c.images)


def test_views_are_for_part_zero_and_by_chance():
    store = noise(40, side=SIDE)
    store = ImageStore.from_images([store.image(k)[:SIDE, :SIDE] for k in range(40)])
    boxes = torch.tensor([[1, 1, 3, 3]], dtype=torch.int16).expand(40, 4)
    new, old = Examples(store, torch.zeros(40, dtype=torch.int64)), numbered(20)
    looks = {"raw": store, "packed": store.compress(boxes)}
    looks = {
        name: torch.stack([images.image(k) for k in range(40)]) for name, images in looks.items()
    }
    assert not (looks["raw"] == looks["packed"]).flatten(1).all(1).any()
    views = Views(boxes, 4.0, 0.3)
    loader = load(Stream((new, old), 20, views=views))

    def compressed(epochs: int) -> float:
        shown = Counter()
        for epoch in range(epochs):
            for step in range(loader.steps):
                (batch,) = loader.batches(epoch, step)
                pixels = as_bytes(batch.images).permute(0, 2, 3, 1)
                for image, part, index in zip(pixels, batch.part, batch.index, strict=True):
                    if part == 1:
                        assert torch.equal(image, old.images.image(int(index)))
                        continue
                    (look,) = [n for n in looks if torch.equal(image, looks[n][index])]
                    shown[look] += 1
        return shown["packed"] / shown.total()

    # 1200 draws: three standard deviations are 0.04.
    assert compressed(30) == pytest.approx(0.3, abs=0.04)
    views.probability = 0.0
    assert compressed(1) == 0
    views.probability = 1.0
    assert compressed(1) == 1


def test_a_subset_that_changes_is_asked_at_every_step():
    """The same bits whenever it answers the same; drawn anew each time, without replacement."""
    lead = Stream((numbered(12),), 4)
    answer = torch.arange(3, 12)
    loader = load(lead, Stream((numbered(12),), 5, subset=lambda: answer), lead)
    drawn = []
    for epoch, step in ((0, 0), (0, 1), (1, 0)):
        batches = loader.batches(epoch, step)
        changing = batches[1]
        assert changing.labels.tolist() == answer[changing.entry].tolist()
        assert len(set(changing.labels.tolist())) == 5
        assert same(changing, loader.batches(epoch, step)[1])
        drawn.append(changing.labels.tolist())
        # The others don't notice.
        assert same(batches[0], load(lead).batches(epoch, step)[0])
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    answer = torch.tensor([7, 7, 2])
    assert sorted(loader.batches(0, 2)[1].labels.tolist()) == [2, 7, 7]
    answer = torch.empty(0, dtype=torch.int64)
    _, third = loader.batches(0, 2)
    assert third.labels.tolist() == load(lead, lead, lead).batches(0, 2)[2].labels.tolist()
    assert loader.steps == 3


def test_a_changing_subset_draws_everything_alike():
    loader = load(Stream((numbered(4),), 4), Stream((numbered(10),), 3, subset=lambda: SOME))
    counts = Counter(n for epoch in range(600) for n in loader.batches(epoch, 0)[1].index.tolist())
    assert sorted(counts) == SOME.tolist()
    assert all(abs(count / 600 - 3 / 6) < 0.08 for count in counts.values())


def test_entries_say_which_of_the_subset_an_image_is():
    subset = torch.tensor([9, 4, 6, 1, 0])
    for stream in (Stream((numbered(10),), 3), Stream((numbered(10),), 3, subset=subset)):
        loader = load(stream, stream)
        for step in range(loader.steps):
            for batch in loader.batches(2, step):
                assert torch.equal(stream.pool()[batch.entry], batch.labels)


def test_the_stream_that_leads_asks_for_its_subset_once():
    answers = [torch.tensor([3, 1, 2, 5]), torch.tensor([0])]
    loader = load(Stream((numbered(6),), 2, subset=lambda: answers.pop(0)))
    assert loader.steps == 2
    for epoch in range(2):
        seen = [label for step in range(2) for label in loader.batches(epoch, step)[0].labels]
        assert sorted(map(int, seen)) == [1, 2, 3, 5]
    assert len(answers) == 1


def test_a_leading_subset_that_is_empty_leaves_the_lead_to_the_next():
    empty = Stream((numbered(4),), 2, subset=lambda: torch.empty(0, dtype=torch.int64))
    assert load(empty, Stream((numbered(6),), 2)).steps == 3
