"""Reading a training batch: fastcil.ops.read_batch beside OpenCV's, Pillow's, kornia's and DALI's.

64 photograph-like images of about 418 x 443, each cropped as RandomResizedCrop does, resized to
224 x 224, mirrored or not, and normalised into a float32 batch in channels_last memory, that of the
batch before it for all of them, on one core: from raw images, and from exemplars compressed by
eta = 4 outside a box of half the area.
Like is timed with like: OpenCV's INTER_LINEAR never antialiases, Pillow's BILINEAR always does,
kornia blurs first, which is not the same: it is compared where nobody antialiases.
The peers are handed the box and the grid of each exemplar as arrays and put them together first;
DALI, which cannot, is handed whole images. "steps" are our own ops one after the other.

A way is timed only after its batch has been compared with ours, which the tests compare with
OpenCV's and Pillow's own functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
import torch
from op_case import OURS, OpCase, Step
from PIL import Image
from torch import Tensor

from fastcil.data import Augmentation, ImageStore, read_batch, read_images

SIDE = 224
PLAIN = Augmentation(SIDE, brightness=0.0)
BUSY = Augmentation(SIDE, policy="imagenet", contrast=0.25, saturation=0.25, cutout=56)
LEVEL = 1 / (255 * min(PLAIN.std))  # one level of a byte, normalised
SCALE = np.tile(np.float32(1 / (255 * np.array(PLAIN.std))), SIDE)  # for a row of pixels
SHIFT = np.tile(np.float32(-np.array(PLAIN.mean) / PLAIN.std), SIDE)


@dataclass(frozen=True)
class Photo:
    """An image as the peers are handed it, and where it is cropped."""

    shown: np.ndarray  # uint8 [H, W, 3]: raw, or as it is after compression
    box: np.ndarray  # uint8 [h, w, 3]
    corner: tuple[int, int]  # of the box: y, x
    grid: np.ndarray | None  # uint8 [gh, gw, 3], the background; None for a raw image
    crop: tuple[int, int, int, int]
    flip: bool


@dataclass(frozen=True)
class Work:
    """A batch to read."""

    store: ImageStore
    crops: Tensor
    flips: Tensor
    photos: list[Photo]

    @property
    def rows(self) -> tuple[Any, ...]:
        """The arguments that both our readers begin with."""
        index = torch.arange(len(self.photos))
        return [self.store], torch.zeros_like(index), index


@cache
def make_work(compressed: bool, count: int) -> Work:
    """Smooth random images with a little noise, boxes, crops and flips."""
    rng = np.random.default_rng(0)
    images, boxes = [], []
    for _ in range(count):
        height, width = int(rng.integers(360, 480)), int(rng.integers(385, 505))
        small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
        images.append(cv2.add(smooth, rng.integers(0, 8, smooth.shape, dtype=np.uint8)))
        h, w = int(height * 0.5**0.5), int(width * 0.5**0.5)
        y, x = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
        boxes.append((y, x, y + h, x + w))
    store = ImageStore.from_images(images)
    if compressed:
        store = store.compress(torch.tensor(boxes, dtype=torch.int16), 4.0)
    crops, flips = PLAIN.draw(store.sizes, torch.Generator().manual_seed(0))
    photos = []
    for i, image in enumerate(images):
        _, _, y0, x0, y1, x1, gh, gw = store.geometry[i].tolist()
        grid = cv2.resize(image, (gw, gh), interpolation=cv2.INTER_NEAREST) if gh else None
        shown, box = store.image(i).numpy(), image[y0:y1, x0:x1].copy()
        crop = tuple(crops[i].int().tolist())
        photos.append(Photo(shown, box, (y0, x0), grid, crop, bool(flips[i])))
    return Work(store, crops, flips, photos)


def fused(work: Work, antialias: bool, augmentation: Augmentation = PLAIN) -> Tensor:
    program = augmentation.program(len(work.photos), torch.Generator().manual_seed(1))
    augmentation = replace(augmentation, antialias=antialias)
    return read_batch(*work.rows, augmentation, work.crops, work.flips, program=program)


def steps(work: Work, antialias: bool, augmentation: Augmentation = PLAIN) -> Tensor:
    images = read_images(*work.rows, (SIDE, SIDE), work.crops, work.flips, antialias=antialias)
    images = augmentation.pixels(images, torch.Generator().manual_seed(1))
    return augmentation.normalise(images)


def normalise(image: np.ndarray, row: np.ndarray) -> None:
    np.multiply(image.reshape(SIDE, -1), SCALE, out=row)
    row += SHIFT


def as_batch(out: np.ndarray) -> Tensor:
    return torch.from_numpy(out).view(len(out), SIDE, SIDE, 3).permute(0, 3, 1, 2)


@cache
def room(count: int) -> np.ndarray:
    """What the peers write to, batch after batch: fresh memory would cost them more."""
    return np.empty((count, SIDE, 3 * SIDE), np.float32)


def opencv(work: Work) -> Tensor:
    out = room(len(work.photos))
    for photo, row in zip(work.photos, out, strict=True):
        image = photo.shown
        if photo.grid is not None:
            size = image.shape[1::-1]
            image = cv2.resize(photo.grid, size, interpolation=cv2.INTER_NEAREST)
            (y, x), (h, w) = photo.corner, photo.box.shape[:2]
            image[y : y + h, x : x + w] = photo.box
        y0, x0, y1, x1 = photo.crop
        image = cv2.resize(image[y0:y1, x0:x1], (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
        normalise(cv2.flip(image, 1) if photo.flip else image, row)
    return as_batch(out)


def put_together(photo: Photo) -> Image.Image:
    """Pillow's nearest neighbour takes other cells than OpenCV's, in the same time or less."""
    assert photo.grid is not None
    image = Image.fromarray(photo.grid).resize(photo.shown.shape[1::-1], Image.Resampling.NEAREST)
    image.paste(Image.fromarray(photo.box), photo.corner[::-1])
    return image


def pillow(work: Work, together: Callable[[Photo], Image.Image] = put_together) -> Tensor:
    out = room(len(work.photos))
    for photo, row in zip(work.photos, out, strict=True):
        image = Image.fromarray(photo.shown) if photo.grid is None else together(photo)
        y0, x0, y1, x1 = photo.crop
        image = image.crop((x0, y0, x1, y1)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        if photo.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        normalise(np.asarray(image), row)
    return as_batch(out)


def kornia(work: Work) -> Tensor:
    from kornia.enhance import normalize
    from kornia.geometry.transform import hflip, resize

    mean, std = (255 * torch.tensor(value) for value in (PLAIN.mean, PLAIN.std))
    out = torch.from_numpy(room(len(work.photos))).view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2)
    for photo, row in zip(work.photos, out, strict=True):
        image = torch.from_numpy(photo.shown).permute(2, 0, 1)[None]
        if photo.grid is not None:
            grid = torch.from_numpy(photo.grid).permute(2, 0, 1)[None].float()
            image = resize(grid, tuple(image.shape[2:]), interpolation="nearest")
            (y, x), (h, w) = photo.corner, photo.box.shape[:2]
            image[0, :, y : y + h, x : x + w] = torch.from_numpy(photo.box).permute(2, 0, 1)
        y0, x0, y1, x1 = photo.crop
        image = resize(image[..., y0:y1, x0:x1].float(), (SIDE, SIDE))
        row.copy_(normalize(hflip(image) if photo.flip else image, mean, std)[0])
    return out


def dali(work: Work, antialias: bool) -> Callable[[], Tensor]:
    """The pipeline, built."""
    from nvidia.dali import fn, pipeline_def, types

    corners = work.crops.view(-1, 2, 2).transpose(0, 1).contiguous().numpy()
    flips = [np.array(photo.flip, np.int32) for photo in work.photos]

    def feed(values: Any, layout: str | None = None) -> Any:
        return fn.external_source(source=lambda: values, no_copy=True, layout=layout)

    @pipeline_def(
        batch_size=len(flips), num_threads=1, device_id=None, exec_async=False, exec_pipelined=False
    )
    def build() -> Any:
        images = fn.resize(
            feed([photo.shown for photo in work.photos], "HWC"),
            size=(SIDE, SIDE),
            roi_start=feed(corners[0]),
            roi_end=feed(corners[1]),
            interp_type=types.INTERP_LINEAR,
            antialias=antialias,
        )
        return fn.crop_mirror_normalize(
            images,
            mirror=feed(flips),
            mean=[255 * value for value in PLAIN.mean],
            std=[255 * value for value in PLAIN.std],
            output_layout="HWC",
            dtype=types.FLOAT,
        )

    pipeline = build()
    pipeline.build()

    def run() -> Tensor:
        (batch,) = pipeline.run()
        return torch.from_numpy(batch.as_array()).permute(0, 3, 1, 2)

    return run


def check(name: str, work: Work, antialias: bool, way: Callable[[], Tensor]) -> None:
    """Compares a way's batch with ours."""
    ours = fused(work, antialias)
    shown = partial(pillow, work, lambda photo: Image.fromarray(photo.shown))
    got = (shown if name == "Pillow" else way)()
    assert got.shape == ours.shape and got.stride() == ours.stride()
    gap = (got - ours).abs()
    # DALI blends in what lies just outside a crop, and the edges differ.
    assert float(gap.mean()) < 0.5 * LEVEL, f"{name} reads something else"
    assert name == "DALI" or float(gap.max()) < 1.1 * LEVEL, f"{name} reads something else"


def make(compressed: bool, antialias: bool, name: str, full: bool) -> Step | None:
    """A way to read a batch, checked; None where it is not to be had, or not with this filter."""
    work = make_work(compressed, 64 if full else 4)
    if name == "DALI":
        way = dali(work, antialias) if find_spec("nvidia") and find_spec("nvidia.dali") else None
    else:
        way = {
            OURS: partial(fused, work, antialias),
            "steps": partial(steps, work, antialias),
            "OpenCV": None if antialias else partial(opencv, work),
            "Pillow": partial(pillow, work) if antialias else None,
            "kornia": partial(kornia, work) if not antialias and find_spec("kornia") else None,
        }[name]
    if way is not None:
        check(name, work, antialias, way)
    return way


def make_busy(name: str, full: bool) -> Step:
    """The same with AutoAugment, jitter and Cutout."""
    work = make_work(True, 64 if full else 4)
    assert torch.equal(steps(work, True, BUSY), fused(work, True, BUSY))
    return partial({OURS: fused, "steps": steps}[name], work, True, BUSY)


CASES = [
    OpCase(
        "read_batch",
        f"64 {'compressed' if compressed else 'raw'} images to 224x224, "
        f"{'' if antialias else 'not '}antialiased",
        (OURS, *(("Pillow",) if antialias else ("OpenCV", "kornia")), "DALI", "steps"),
        partial(make, compressed, antialias),
        threads=1,
        aims={"OpenCV": 4, "Pillow": 8, "DALI": 3} if compressed else {},
    )
    for compressed in (True, False)
    for antialias in (False, True)
]
CASES.append(
    OpCase("read_batch", "64 compressed images, augmented", (OURS, "steps"), make_busy, threads=1)
)
