"""Bytes of masks are those of a naive writer, in every form, and read back as the same masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcil.errors import FastcilError
from fastcil.memory.codecs.masks import (
    BITMASK,
    COO,
    FORMS,
    FULL,
    RUNS,
    Runs,
    mask_nbytes,
    read_masks,
    smallest_form,
    write_masks,
)

SIZES = [(1, 1), (1, 9), (7, 1), (5, 7), (16, 16), (9, 31), (256, 2), (257, 3), (2, 300), (20, 700)]


def coo(mask):
    dtype = np.uint8 if max(mask.shape) <= 256 else np.dtype("<u2")
    return np.argwhere(mask).astype(dtype).tobytes()


def varint(number):
    said = []
    while number >= 128:
        said.append(number % 128 + 128)
        number //= 128
    return bytes([*said, number])


def runs(mask):
    numbers, value, length = [], False, 0
    for pixel in mask.flatten().tolist():
        if pixel != value:
            numbers.append(length)
            value, length = pixel, 0
        length += 1
    if value:
        numbers.append(length)
    body = b"".join(varint(number) for number in numbers[:-1])
    return varint(len(body)) + body


def bitmask(mask):
    return np.packbits(mask.flatten(), bitorder="little").tobytes()


WRITERS = {FULL: lambda mask: b"", COO: coo, RUNS: runs, BITMASK: bitmask}


def drawn(sizes, seed):
    """Masks of all kinds, of which each keeps some pixel."""
    rng = np.random.default_rng(seed)
    masks = []
    for place, (height, width) in enumerate(sizes):
        mask = rng.random((height, width)) < (0.02, 0.5, 0.97)[place % 3]
        if place % 2:
            mask[height // 3 :, : width // 2] = True
        mask[rng.integers(height), rng.integers(width)] = True
        masks.append(mask)
    return masks


def flat(masks):
    joined = [mask.flatten() for mask in masks] or [np.empty(0, bool)]
    sizes = torch.tensor([mask.shape for mask in masks], dtype=torch.int64).view(-1, 2)
    return torch.from_numpy(np.concatenate(joined)), sizes


def smallest(mask):
    lengths = {form: len(write(mask)) for form, write in WRITERS.items() if form != FULL}
    return FULL if mask.all() else min(lengths, key=lengths.get)


def round_trip(masks, forms):
    bits, sizes = flat(masks)
    found = Runs.of(bits, sizes.prod(1))
    assert torch.equal(found.masks(), bits)
    assert found.kept().tolist() == [int(mask.sum()) for mask in masks]
    forms = torch.tensor(forms, dtype=torch.uint8)
    nbytes = mask_nbytes(found, sizes).gather(1, forms.long()[:, None])[:, 0]
    written = write_masks(found, sizes, forms)
    expected = [WRITERS[form](mask) for form, mask in zip(forms.tolist(), masks, strict=True)]
    assert nbytes.tolist() == [len(text) for text in expected]
    assert bytes(written.numpy()) == b"".join(expected)
    read = read_masks(written, nbytes, found.kept(), sizes, forms)
    assert torch.equal(read, bits)


@pytest.mark.parametrize("form", [COO, RUNS, BITMASK])
@pytest.mark.parametrize("seed", range(3))
def test_every_form_is_the_naive_writers_and_reads_back(form, seed):
    masks = drawn(SIZES, seed)
    round_trip(masks, [form] * len(masks))
    round_trip(masks, [(form + place) % 3 + 1 for place in range(len(masks))])


@pytest.mark.parametrize("form", range(4))
def test_whole_images_and_single_pixels(form):
    whole = [np.ones(size, bool) for size in SIZES]
    round_trip(whole, [form] * len(whole))
    if form == FULL:
        return
    for corner in (0, -1):
        single = [np.zeros(size, bool) for size in SIZES]
        for mask in single:
            mask[corner, corner] = True
        round_trip(single, [form] * len(single))


def test_long_runs_take_more_bytes_each():
    far = np.zeros((1, 300_000), bool)
    far[0, [1, 130, 20_000, 299_990]] = True
    far[0, 50_000:290_000] = True
    round_trip([far], [RUNS])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), max_size=5), st.randoms())
@settings(max_examples=30, deadline=None)
def test_fuzzed(sizes, random):
    masks = []
    for height, width in sizes:
        share = random.choice([0.01, 0.3, 0.9, 1.0])
        mask = np.array([random.random() < share for _ in range(height * width)], dtype=bool)
        mask[random.randrange(height * width)] = True
        masks.append(mask.reshape(height, width))
    chosen = [smallest(mask) for mask in masks]
    round_trip(masks, chosen)
    bits, sizes = flat(masks)
    nbytes = mask_nbytes(Runs.of(bits, sizes.prod(1)), sizes)
    assert smallest_form(nbytes).tolist() == chosen


def test_each_form_is_sometimes_the_smallest():
    size = (32, 32)
    kinds = {name: np.zeros(size, bool) for name in FORMS}
    kinds["full"][:] = True
    kinds["coo"][20, 20] = True
    kinds["runs"][8:24, 8:24] = True
    kinds["bitmask"][:] = np.random.default_rng(0).random(size) < 0.5
    bits, sizes = flat(list(kinds.values()))
    nbytes = mask_nbytes(Runs.of(bits, sizes.prod(1)), sizes)
    assert smallest_form(nbytes).tolist() == [FULL, COO, RUNS, BITMASK]


@pytest.mark.parametrize(
    ("form", "text", "kept"),
    [
        (COO, [0, 4], 1),  # a column beyond the width
        (COO, [3, 0], 1),  # a row beyond the height
        (COO, [1, 1, 0, 0], 2),  # backwards
        (COO, [1, 1, 1, 1], 2),  # twice
        (BITMASK, [255, 255], 12),  # a bit behind the last pixel
        (BITMASK, [1, 0], 2),  # fewer than there are
        (RUNS, [1, 130], 2),  # a number without an end
        (RUNS, [3, 1, 1, 0], 4),  # runs that touch
        (RUNS, [3, 1, 3, 1], 3),  # none left for the last
        (RUNS, [2, 1, 1], 4),  # the last kept run is told
        (RUNS, [1, 9], 4),  # past the last pixel
        (RUNS, [6, 128, 128, 128, 128, 128, 1], 4),  # too long a number
    ],
)
def test_other_bytes_are_no_masks(form, text, kept):
    whole = np.ones((2, 2), bool)  # beside an image that is well
    written = torch.tensor([*bitmask(whole), *text], dtype=torch.uint8)
    sizes = torch.tensor([[2, 2], [3, 4]])
    forms = torch.tensor([BITMASK, form], dtype=torch.uint8)
    nbytes, counts = torch.tensor([1, len(text)]), torch.tensor([4, kept])
    with pytest.raises(FastcilError, match="data holds a mask that does not fit its image"):
        read_masks(written, nbytes, counts, sizes, forms)
