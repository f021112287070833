"""Ranks within classes, against counting."""

from __future__ import annotations

import pytest
import torch

from fastcil.data.ranks import rank_in_class


@pytest.mark.parametrize("count, classes", [(0, 1), (1, 1), (7, 1), (40, 3), (200, 12)])
def test_ranks_are_counts_of_those_before(count: int, classes: int) -> None:
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(count))
    seen = labels.tolist()
    assert rank_in_class(labels).tolist() == [seen[:k].count(y) for k, y in enumerate(seen)]
