"""Boxes from class activation maps: fastcil.ops.cam_boxes beside other ways to find them.

float32 features [256, 512, 7, 7] to images of 224 x 224, contiguous and channels_last. "eager" is
the definition in PyTorch, all images at once: a matrix product, the map scaled, upsampled,
compared, and its rows and columns searched; "compiled" is that under torch.compile; "torchcam"
takes the maps from that package's extractor and "masks_to_boxes" ends with torchvision's function,
where they are installed; "loop" takes one image after the other, with OpenCV's threshold and NumPy.
"read" only reads the features, which all must.

A way is timed only after its boxes have been compared with those of a map in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec

import cv2
import numpy as np
import torch
from op_case import OURS, OpCase, Step
from torch import Tensor, nn
from torch.nn import functional

from fastcil import ops

THRESHOLD = 0.6


@dataclass(frozen=True)
class Work:
    features: Tensor  # [B, C, h, w]
    class_weights: Tensor  # [B, C]
    side: int


def make_work(shape: tuple[int, ...], side: int, channels_last: bool) -> Work:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator)
    weights = torch.randn(shape[:2], generator=generator)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return Work(features.contiguous(memory_format=layout), weights, side)


def maps(features: Tensor, class_weights: Tensor) -> Tensor:
    """The map of each image, scaled to [0, 1]: [B, h, w]."""
    activation = torch.bmm(class_weights[:, None], features.flatten(2))
    low, high = activation.amin(2, keepdim=True), activation.amax(2, keepdim=True)
    return ((activation - low) / (high - low)).view(-1, *features.shape[2:])


def marked(scaled: Tensor, side: int) -> Tensor:
    """Which pixels are above the threshold: [B, side, side]."""
    return functional.interpolate(scaled[:, None], (side, side), mode="bilinear")[:, 0] > THRESHOLD


def searched(above: Tensor, side: int) -> Tensor:
    """The boxes of marked pixels: [B, 4]."""
    ends = []
    for lines in (above.any(2), above.any(1)):
        lines = lines.to(torch.uint8)
        ends.append((lines.argmax(1), side - lines.flip(1).argmax(1)))
    (y0, y1), (x0, x1) = ends
    return torch.stack([y0, x0, y1, x1], 1)


def eager(features: Tensor, class_weights: Tensor, side: int) -> Tensor:
    return searched(marked(maps(features, class_weights), side), side)


class Classifier(nn.Module):
    """A network that ends in these features and has a class for each image."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.last = nn.Identity()
        self.head = nn.Linear(*work.class_weights.T.shape, bias=False)
        self.head.weight.data = work.class_weights

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.last(features).mean((2, 3)))


def with_torchcam(work: Work) -> Callable[..., Tensor]:
    """Its extractor keeps the features of a forward pass, which is not timed."""
    from torchcam.methods import CAM

    model = Classifier(work).eval()
    extractor = CAM(model, "last", "head")
    model(work.features)
    classes = list(range(len(work.features)))
    return lambda features, weights, side: searched(marked(extractor(classes)[0], side), side)


@cache
def torchvision_operators() -> torch.library.Library | None:
    """Names without code for those that a build for another torch brings in vain.

    Without these names it cannot be imported; what is timed here does not call them.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def with_torchvision(features: Tensor, class_weights: Tensor, side: int) -> Tensor:
    """Its ends are inclusive, and x comes first."""
    torchvision_operators()
    from torchvision.ops import masks_to_boxes

    boxes = masks_to_boxes(marked(maps(features, class_weights), side)).long()
    return boxes[:, [1, 0, 3, 2]] + torch.tensor([0, 0, 1, 1])


def loop(features: Tensor, class_weights: Tensor, side: int) -> Tensor:
    boxes = []
    for image in maps(features, class_weights):
        map_ = functional.interpolate(image[None, None], (side, side), mode="bilinear")[0, 0]
        _, above = cv2.threshold(map_.numpy(), THRESHOLD, 1, cv2.THRESH_BINARY)
        rows, columns = np.flatnonzero(above.any(1)), np.flatnonzero(above.any(0))
        boxes.append((rows[0], columns[0], rows[-1] + 1, columns[-1] + 1))
    return torch.from_numpy(np.array(boxes))


def ours(features: Tensor, class_weights: Tensor, side: int) -> Tensor:
    return ops.cam_boxes(features, class_weights, (side, side), THRESHOLD)[0]


def read(features: Tensor, class_weights: Tensor, side: int) -> Tensor:
    return features.sum()


def check(name: str, find: Callable[..., Tensor], work: Work) -> None:
    """Compares a way's boxes with float64's, except where a pixel lies on the threshold."""
    got = find(work.features, work.class_weights, work.side)
    for i, box in enumerate(got.tolist()):
        image = work.features[i : i + 1].double(), work.class_weights[i : i + 1].double()
        map_ = functional.interpolate(maps(*image)[None], (work.side,) * 2, mode="bilinear")[0, 0]
        y, x = (map_ > THRESHOLD).nonzero().unbind(1)
        wanted = [int(y.min()), int(x.min()), int(y.max()) + 1, int(x.max()) + 1]
        near = float((map_ - THRESHOLD).abs().min()) < 1e-6
        assert near or box == wanted, f"{name} finds {box}, not {wanted}"


def make(channels_last: bool, name: str, full: bool) -> Step | None:
    """A way to find the boxes, checked."""
    package = {"torchcam": "torchcam", "masks_to_boxes": "torchvision"}.get(name)
    if package and not find_spec(package):
        return None
    shape, side = ((256, 512, 7, 7), 224) if full else ((4, 8, 7, 7), 32)
    work = make_work(shape, side, channels_last)
    find = {
        OURS: ours,
        "read": read,
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
        "torchcam": with_torchcam(work) if name == "torchcam" else None,
        "masks_to_boxes": with_torchvision,
        "loop": loop,
    }[name]
    if name != "read":
        check(name, find, work)
    return lambda: find(work.features, work.class_weights, work.side)


CASES = [
    OpCase(
        "cam_boxes",
        f"256x512x7x7 to 224x224, {layout}",
        (OURS, "read", "eager", "compiled", "torchcam", "masks_to_boxes", "loop"),
        partial(make, layout == "channels_last"),
        aims={"eager": 20, "loop": 15},
    )
    for layout in ("contiguous", "channels_last")
]
