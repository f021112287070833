"""Masks of images in the fewest bytes: coordinates, run lengths or bits.

Masks lie flat, bool, pixel after pixel (row-major) and image after image. Nothing here is a loop
over pixels or images: a mask is handled as its runs of kept pixels, which are few where it comes
from a smooth map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcil.errors import FastcilError

FORMS = ("full", "coo", "runs", "bitmask")
FULL, COO, RUNS, BITMASK = range(len(FORMS))

# A varint has 7 bits of its number in each byte, and 5 bytes hold all that int32 does.
_LONGEST_VARINT = 5
_DAMAGED = "data holds a mask that does not fit its image; pass what SparseStore.state() gave."


@dataclass(frozen=True)
class Runs:
    """Stretches of kept pixels of N images, R in all, none of which touches the next.

    Args:
        starts: First pixel of each in the flat mask, int64 [R].
        ends: The pixel behind its last, int64 [R].
        image: Which image it lies in, int64 [R].
        areas: Pixels of each image, int64 [N].
    """

    starts: Tensor
    ends: Tensor
    image: Tensor
    areas: Tensor

    @classmethod
    def of(cls, masks: Tensor, areas: Tensor) -> Runs:
        """The runs of flat masks, bool [sum of areas]."""
        borders = areas.cumsum(0)
        outside = masks.new_zeros(1)
        before = torch.cat([outside, masks])[:-1]
        before[borders[:-1]] = False
        after = torch.cat([masks, outside])[1:]
        after[borders - 1] = False
        starts = (masks & ~before).nonzero().flatten()
        ends = (masks & ~after).nonzero().flatten() + 1
        return cls(starts, ends, torch.searchsorted(borders, starts, right=True), areas)

    def masks(self) -> Tensor:
        """The flat masks, bool [sum of areas]."""
        return spread(self.starts, self.ends, int(self.areas.sum()))

    def kept(self) -> Tensor:
        """Pixels that each image keeps, int64 [N]."""
        return torch.zeros_like(self.areas).index_add_(0, self.image, self.ends - self.starts)


def spread(starts: Tensor, ends: Tensor, total: int) -> Tensor:
    """Stretches as a mask: bool [total], True inside of them; they don't overlap."""
    steps = torch.zeros(total + 1, dtype=torch.int8, device=starts.device)
    ones = torch.ones_like(starts, dtype=torch.int8)
    steps.index_add_(0, starts, ones).index_add_(0, ends, -ones)
    return steps[:-1].cumsum(0, dtype=torch.int8).bool()


def second_of(first: Tensor, second: Tensor) -> Tensor:
    """For N pairs of stretches, one after the other, which places belong to a second one.

    Args:
        first: Length of the first of each pair, int64 [N].
        second: Length of the second, int64 [N].

    Returns:
        bool [sum of all lengths].

    Example:
        >>> second_of(torch.tensor([1, 2]), torch.tensor([2, 0])).int().tolist()
        [0, 1, 1, 0, 0]
    """
    ends = (first + second).cumsum(0)
    return spread(ends - second, ends, int(ends[-1]) if len(ends) else 0)


def mask_nbytes(runs: Runs, sizes: Tensor) -> Tensor:
    """Bytes of each image's mask in every form.

    With k pixels kept of H x W in r runs: none, if all are kept; 2 k bytes of coordinates, or 4 k
    where a side is above 256; the run lengths as `write_masks` writes them; ceil(H W / 8) bits.

    Args:
        runs: Of N images.
        sizes: Their heights and widths, int64 [N, 2].

    Returns:
        int64 [N, 4], in the order of ``FORMS``; where not all pixels are kept, more bytes for
        ``full`` than any form takes.
    """
    kept, bits = runs.kept(), _bit_nbytes(runs.areas)
    numbers, counts = _numbers(runs)
    payload = _totals(_varint_nbytes(numbers), counts)
    lengths = payload + _varint_nbytes(payload)
    coordinates = _pair_nbytes(sizes) * kept
    full = torch.where(kept == runs.areas, 0, (lengths + coordinates + bits))
    return torch.stack([full, coordinates, lengths, bits], 1)


def smallest_form(nbytes: Tensor) -> Tensor:
    """The form of the fewest bytes, of several the first, uint8 [N]."""
    # Which of equal ones `argmin` finds is not said, and may differ from device to device.
    places = torch.arange(len(FORMS), device=nbytes.device)
    return ((nbytes * len(FORMS) + places).amin(1) % len(FORMS)).to(torch.uint8)


def write_masks(runs: Runs, sizes: Tensor, forms: Tensor) -> Tensor:
    """The masks' bytes, image after image.

    ``coo`` is the row and the column of each pixel kept, in a byte each, or in two (low first)
    where a side is above 256. ``runs`` are the lengths of alternately dropped and kept runs from
    the image's first pixel on, as varints (7 bits a byte, low first), without the last kept run,
    which is what remains of the pixels; before them, in a varint too, how many bytes they take.
    ``bitmask`` is a bit for each pixel, low first. ``full`` is nothing.

    Args:
        runs: Of N images.
        sizes: Their heights and widths, int64 [N, 2].
        forms: uint8 [N].

    Returns:
        uint8 [sum of the masks' bytes].
    """
    nbytes = mask_nbytes(runs, sizes).gather(1, forms.long()[:, None])[:, 0]
    form_of = forms.repeat_interleave(nbytes)
    written = torch.empty(len(form_of), dtype=torch.uint8, device=forms.device)
    for form, write in ((COO, _write_coo), (RUNS, _write_runs), (BITMASK, _write_bits)):
        chosen = forms == form
        if bool(chosen.any()):
            written[form_of == form] = write(_select(runs, chosen), sizes[chosen])
    return written


def mask_lengths(data: Tensor, lengths: Tensor, sizes: Tensor, forms: Tensor) -> Tensor:
    """Bytes of the mask in front of each image's pixels.

    Args:
        data: Strings, each a mask and the pixels it keeps, uint8 [P].
        lengths: Bytes of each string, int64 [N].
        sizes: int64 [N, 2].
        forms: uint8 [N].

    Returns:
        int64 [N]; what remains of each string is 3 bytes for every pixel kept.

    Raises:
        FastcilError: A string that is no such thing.
    """
    pair = _pair_nbytes(sizes)
    masks = torch.zeros_like(lengths)
    masks = torch.where(forms == COO, lengths // (pair + 3) * pair, masks)
    masks = torch.where(forms == BITMASK, _bit_nbytes(sizes.prod(1)), masks)
    some = forms == RUNS
    if bool(some.any()):
        starts = (lengths.cumsum(0) - lengths)[some]
        masks[some] = _payloads(data, starts, starts + lengths[some])
    pixels = lengths - masks
    kept = torch.div(pixels, 3, rounding_mode="floor")
    fits = (pixels == 3 * kept) & (kept >= 1) & (kept <= sizes.prod(1)) & (forms <= BITMASK)
    fits &= (forms != FULL) | (kept == sizes.prod(1))
    fits &= (forms != COO) | (masks == kept * pair)
    _check(fits)
    return masks


def read_masks(
    written: Tensor, nbytes: Tensor, kept: Tensor, sizes: Tensor, forms: Tensor
) -> Tensor:
    """The flat masks that `write_masks` wrote, bool [sum of H W].

    Args:
        written: uint8 [sum of nbytes].
        nbytes: Bytes of each mask, int64 [N].
        kept: Pixels that each keeps, int64 [N].
        sizes: int64 [N, 2].
        forms: uint8 [N].

    Raises:
        FastcilError: Bytes that are no such masks.
    """
    areas = sizes.prod(1)
    form_of = forms.repeat_interleave(nbytes)
    masks = (forms == FULL).repeat_interleave(areas)
    for form, read in ((COO, _read_coo), (RUNS, _read_runs), (BITMASK, _read_bits)):
        chosen = forms == form
        if bool(chosen.any()):
            here = chosen.repeat_interleave(areas)
            part = read(written[form_of == form], nbytes[chosen], kept[chosen], sizes[chosen])
            masks[here] = part
    return masks


def _check(fits: Tensor) -> None:
    """Raises unless all is as it must be."""
    if not bool(fits.all()):
        raise FastcilError(_DAMAGED)


def _totals(values: Tensor, counts: Tensor) -> Tensor:
    """Sums of stretches of values, int64 [N]; ``counts`` are their lengths."""
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    ends = counts.cumsum(0)
    return sums[ends] - sums[ends - counts]


def _select(runs: Runs, chosen: Tensor) -> Runs:
    """The runs of some images, bool [N], as if there were no others."""
    new = chosen.cumsum(0) - 1
    areas = runs.areas[chosen]
    old_first = runs.areas.cumsum(0) - runs.areas
    moved = (areas.cumsum(0) - areas) - old_first[chosen]
    here = chosen[runs.image]
    image = new[runs.image[here]]
    shift = moved[image]
    return Runs(runs.starts[here] + shift, runs.ends[here] + shift, image, areas)


def _pair_nbytes(sizes: Tensor) -> Tensor:
    """Bytes of a row and a column, int64 [N]."""
    return torch.where((sizes > 256).any(1), 4, 2)


def _bit_nbytes(areas: Tensor) -> Tensor:
    """Bytes of a bit for each pixel."""
    return (areas + 7) // 8


def _varint_nbytes(numbers: Tensor) -> Tensor:
    """Bytes of each number as a varint."""
    limits = [1 << 7 * k for k in range(1, _LONGEST_VARINT)]
    return torch.bucketize(numbers, torch.tensor(limits, device=numbers.device), right=True) + 1


def _write_coo(runs: Runs, sizes: Tensor) -> Tensor:
    """Rows and columns of the pixels kept."""
    kept = runs.kept()
    pixels = runs.masks().nonzero().flatten()
    pixels -= (runs.areas.cumsum(0) - runs.areas).repeat_interleave(kept)
    width = sizes[:, 1].repeat_interleave(kept)
    pairs = torch.stack([pixels // width, pixels % width], 1)  # [K, 2]
    both = torch.stack([pairs & 255, pairs >> 8], 2).view(-1, 4)  # low and high of each
    wide = (_pair_nbytes(sizes) == 4).repeat_interleave(kept)
    is_low = torch.tensor([True, False, True, False], device=wide.device)
    return both[is_low | wide[:, None]].to(torch.uint8)


def _read_coo(written: Tensor, nbytes: Tensor, kept: Tensor, sizes: Tensor) -> Tensor:
    """Flat masks of rows and columns."""
    areas = sizes.prod(1)
    wide = (_pair_nbytes(sizes) == 4).repeat_interleave(kept)
    is_low = torch.tensor([True, False, True, False], device=wide.device)
    both = torch.zeros(len(wide), 4, dtype=torch.int64, device=wide.device)
    both[is_low | wide[:, None]] = written.long()
    pairs = both[:, ::2] + (both[:, 1::2] << 8)
    image = torch.arange(len(kept), device=kept.device).repeat_interleave(kept)
    _check(pairs < sizes[image])
    pixels = pairs[:, 0] * sizes[image, 1] + pairs[:, 1] + (areas.cumsum(0) - areas)[image]
    _check(pixels.diff() > 0)
    masks = torch.zeros(int(areas.sum()), dtype=torch.bool, device=written.device)
    masks[pixels] = True
    return masks


def _write_bits(runs: Runs, sizes: Tensor) -> Tensor:
    """A bit for each pixel."""
    padding = 8 * _bit_nbytes(runs.areas) - runs.areas
    is_padding = second_of(runs.areas, padding)
    bits = torch.zeros_like(is_padding)
    bits[~is_padding] = runs.masks()
    bits = bits.view(torch.uint8).view(-1, 8)
    written = bits[:, 0].clone()
    for k in range(1, 8):
        written |= bits[:, k] << k
    return written


def _read_bits(written: Tensor, nbytes: Tensor, kept: Tensor, sizes: Tensor) -> Tensor:
    """Flat masks of bits."""
    areas = sizes.prod(1)
    places = torch.arange(8, dtype=torch.uint8, device=written.device)
    bits = (written[:, None] >> places & 1).bool().flatten()
    is_padding = second_of(areas, 8 * nbytes - areas)
    _check(~bits[is_padding])
    _check(_totals(bits.view(-1, 8).sum(1), nbytes) == kept)
    return bits[~is_padding]


def _numbers(runs: Runs) -> tuple[Tensor, Tensor]:
    """The lengths to be written, and how many of them each image has."""
    first = (runs.areas.cumsum(0) - runs.areas)[runs.image]
    behind = torch.cat([first[:1], runs.ends[:-1]])
    last = torch.cat([runs.image[1:] != runs.image[:-1], runs.image.new_ones(1).bool()])
    last = last[: len(runs.image)]
    opens = torch.cat([last.new_ones(1), last[:-1]])[: len(last)]
    dropped = runs.starts - torch.where(opens, first, behind)
    numbers = torch.stack([dropped, runs.ends - runs.starts], 1).flatten()
    said = torch.stack([torch.ones_like(last), ~last], 1).flatten()
    count = torch.bincount(runs.image, minlength=len(runs.areas))
    return numbers[said], (2 * count - 1).clamp_min(0)


def _write_runs(runs: Runs, sizes: Tensor) -> Tensor:
    """The run lengths of each image, and before them their bytes."""
    numbers, counts = _numbers(runs)
    said = second_of(torch.ones_like(counts), counts)
    every = torch.empty(len(said), dtype=torch.int64, device=numbers.device)
    every[said] = numbers
    every[~said] = _totals(_varint_nbytes(numbers), counts)
    nbytes = _varint_nbytes(every)
    number = torch.arange(len(every), device=every.device).repeat_interleave(nbytes)
    place = torch.arange(len(number), device=every.device) - (nbytes.cumsum(0) - nbytes)[number]
    low = every[number] >> 7 * place & 127
    return (low + 128 * (place + 1 < nbytes[number])).to(torch.uint8)


def _payloads(data: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Bytes that the run lengths take together with the number in front of them, int64 [N]."""
    value, size = torch.zeros_like(starts), torch.zeros_like(starts)
    more = starts < ends
    _check(more)
    for k in range(_LONGEST_VARINT):
        byte = data[(starts + k).minimum(ends - 1)].long()
        value += more * ((byte & 127) << 7 * k)
        size += more
        more = more & (byte > 127)
    _check(~more & (value + size < ends - starts))
    return value + size


def _read_runs(written: Tensor, nbytes: Tensor, kept: Tensor, sizes: Tensor) -> Tensor:
    """Flat masks of run lengths."""
    areas, image_ends = sizes.prod(1), nbytes.cumsum(0)
    closes = written < 128
    _check(closes[image_ends - 1])
    ends = closes.nonzero().flatten() + 1  # of each number
    number = torch.cat([closes.new_zeros(1), closes])[:-1].cumsum(0)
    length = ends.diff(prepend=ends.new_zeros(1))
    place = torch.arange(len(written), device=written.device) - (ends - length)[number]
    _check(place < _LONGEST_VARINT)
    parts = (written & 127).long() << 7 * place
    numbers = torch.zeros_like(ends).index_add_(0, number, parts)
    counts = torch.bincount(torch.searchsorted(image_ends, ends), minlength=len(kept)) - 1
    _check(counts % 2 == 1)
    numbers = numbers[second_of(torch.ones_like(counts), counts)]
    last = second_of(counts, torch.ones_like(counts))
    every = torch.zeros(len(last), dtype=torch.int64, device=written.device)
    every[~last] = numbers
    pairs = every.view(-1, 2)  # dropped, kept
    every[last] = kept - _totals(pairs[:, 1].contiguous(), (counts + 1) // 2)
    _check(pairs[:, 1] > 0)
    _check(pairs[~torch.cat([last.new_ones(1), last[1::2][:-1]]), 0] > 0)
    said = _totals(every, counts + 1)
    _check(said <= areas)
    image = torch.arange(len(kept), device=kept.device).repeat_interleave((counts + 1) // 2)
    shift = (areas.cumsum(0) - areas) - (said.cumsum(0) - said)
    ends = every.cumsum(0)[1::2] + shift[image]
    return spread(ends - pairs[:, 1], ends, int(areas.sum()))
