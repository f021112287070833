"""Work on the host that is done image by image, on all threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Made = TypeVar("Made")

# A thread takes images in stretches: handing over one at a time costs as much as a small image.
_STRETCHES = 8


def in_parallel(work: Callable[[int], Made], count: int) -> list[Made]:
    """``work`` of 0 to count - 1, in order, on as many threads as torch has.

    Args:
        work: Lets go of Python's lock for most of its time, as OpenCV does.
        count: How often.

    Example:
        >>> in_parallel(lambda place: place * place, 4)
        [0, 1, 4, 9]
    """
    threads = min(torch.get_num_threads(), count)
    if threads < 2:
        return [work(place) for place in range(count)]
    parts = min(count, threads * _STRETCHES)
    cuts = [count * part // parts for part in range(parts + 1)]

    def stretch(first: int, last: int) -> list[Made]:
        return [work(place) for place in range(first, last)]

    with ThreadPoolExecutor(threads) as pool:
        return [made for made_here in pool.map(stretch, cuts, cuts[1:]) for made in made_here]
