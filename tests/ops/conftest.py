"""Raw images, boxes and kernels that the tests of packed images share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor


class Images(NamedTuple):
    arrays: list[np.ndarray]  # uint8 [H, W, 3] each
    pixels: Tensor
    offsets: Tensor
    geometry: Tensor

    @property
    def store(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.pixels, self.offsets, self.geometry

    def boxes(self, seed: int) -> Tensor:
        """A box for each, one in four of them empty."""
        rng = np.random.default_rng(seed)
        rows = []
        for number, array in enumerate(self.arrays):
            (y0, y1), (x0, x1) = (np.sort(rng.integers(0, side + 1, 2)) for side in array.shape[:2])
            rows.append((y0, x0, y1, x1) if number % 4 else (y1, x1, y0, x0))
        return torch.tensor(np.array(rows).reshape(-1, 4), dtype=torch.int16)


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Images]:
    def make(sizes: list[tuple[int, int]], seed: int = 0, high: int = 256) -> Images:
        rng = np.random.default_rng(seed)
        arrays = [rng.integers(0, high, (*size, 3), dtype=np.uint8) for size in sizes]
        nbytes = torch.tensor([array.size for array in arrays], dtype=torch.int64)
        rows = [(h, w, 0, 0, h, w, 0, 0) for h, w in sizes]
        return Images(
            arrays,
            torch.from_numpy(np.concatenate([array.ravel() for array in arrays] or [[]])).byte(),
            nbytes.cumsum(0) - nbytes,
            torch.tensor(rows, dtype=torch.int16).reshape(-1, 8),
        )

    return make


@pytest.fixture(scope="session")
def poison() -> Callable[[], AbstractContextManager[None]]:
    """Within it, fresh tensors are full: of 255 where they are uint8."""

    @contextmanager
    def context() -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled()
        # On CUDA some of PyTorch's own operations would refuse, and they only warn now.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert torch.empty(3, dtype=torch.uint8).tolist() == [255] * 3
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*deterministic")
                yield
        finally:
            torch.use_deterministic_algorithms(before)

    return context


@pytest.fixture(scope="session")
def threads() -> Callable[[int], AbstractContextManager[None]]:
    @contextmanager
    def context(count: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return context
