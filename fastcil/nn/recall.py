"""What frozen extractors say of images that never change: computed once, then looked up.

Where nothing is drawn when images are read, an old network says the same of an image in every
epoch. `Network.features` asks here before it computes a frozen extractor's, whoever wants them:
a method that distils from its teacher, or one that reads old extractors beside a new one. What was
said of a whole batch of the stage's own images is kept and found again by the batch's very tensor:
images that anyone has made of them, such as those composed by a mask, are other tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastcil.ops import send


class Recall:
    """Features of a stage's images by frozen extractors, filled as its batches go by.

    Only batches of one size are kept and looked up, for kernels may round otherwise in others: a
    run that goes on from a checkpoint, with nothing kept, computes the same bits.

    Args:
        count: N, how many images there are.
        batch_size: Images of the batches that take part.
        limit: Bytes that it may take; extractors for which there is no room are computed anew.

    Attributes:
        found: How often features of a batch were looked up.

    Example:
        >>> from fastcil.nn import LinearHead, Network, resnet20
        >>> network = Network([resnet20(width=4)], LinearHead(16, classes=5))
        >>> network.freeze(0)
        >>> recall, images, rows = Recall(8, 2, 1 << 20), torch.rand(2, 3, 8, 8), torch.arange(2)
        >>> with recall.recalling(images, rows):
        ...     same = torch.equal(network.features(images), network.features(images))
        >>> same, recall.extractors, recall.found
        (True, 1, 1)
    """

    def __init__(self, count: int, batch_size: int, limit: int) -> None:
        self.count, self.batch_size, self.left = count, batch_size, limit
        self.found = 0
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # [N, C] and, on the CPU, bool [N]
        self._images: Tensor | None = None
        self._rows: Tensor = torch.empty(0, dtype=torch.int64)
        self._where: Tensor = self._rows

    @property
    def extractors(self) -> int:
        """How many extractors it keeps features of."""
        return len(self._kept)

    @contextmanager
    def recalling(self, images: Tensor, rows: Tensor) -> Iterator[None]:
        """Knows these images meanwhile.

        Args:
            images: A batch.  # [B, 3, h, w]
            rows: int64 [B] below N, on the CPU: which images they are.
        """
        global _current
        if len(rows) == self.batch_size:
            self._images, self._rows = images, rows
            (self._where,) = send([rows], images.device)
            _current = self
        try:
            yield
        finally:
            self._images = _current = None

    def features(self, extractor: nn.Module, images: Tensor, look: Callable[[], Tensor]) -> Tensor:
        """What a frozen extractor says of images: looked up, or computed by ``look``, and kept."""
        if images is not self._images or images.requires_grad or extractor._forward_hooks:
            return look()
        held = self._kept.get(extractor)
        if held is not None and bool(held[1][self._rows].all()):
            self.found += 1
            return held[0].index_select(0, self._where)
        found = look()
        if held is None:
            nbytes = self.count * found[0].numel() * found.element_size()
            if found.requires_grad or nbytes > self.left:
                return found
            self.left -= nbytes
            rows = found.new_zeros(self.count, *found.shape[1:])
            held = self._kept[extractor] = rows, torch.zeros(self.count, dtype=torch.bool)
        held[0].index_copy_(0, self._where, found.to(held[0].dtype))
        held[1][self._rows] = True
        return found


_current: Recall | None = None


def recalled(extractor: nn.Module, images: Tensor, look: Callable[[], Tensor]) -> Tensor:
    """What a frozen extractor says of images, by the `Recall` of the step under way, if any."""
    if _current is None or torch.compiler.is_compiling():
        return look()
    return _current.features(extractor, images, look)
