"""Rules: OpenCV's are OpenCV's, diffusion solves Laplace's equation, and no rule peeks."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import arrays

from fastcil.data import ImageStore
from fastcil.data.scenes import make_scenes
from fastcil.errors import FastcilError
from fastcil.memory.codecs.completion import complete, diffuse
from fastcil.ops import salient_masks

RULES = ["zero", "telea", "navier-stokes", "diffusion"]
FLAGS = {"telea": cv2.INPAINT_TELEA, "navier-stokes": cv2.INPAINT_NS}
SIZES = [(1, 1), (1, 7), (9, 1), (16, 16), (5, 8), (16, 16), (33, 20), (17, 40)]


def draw(seed, sizes=SIZES, share=0.4):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    masks = [rng.random(size) < share for size in sizes]
    for mask in masks:
        mask[rng.integers(mask.shape[0]), rng.integers(mask.shape[1])] = True
    return images, masks


def flat(masks):
    return torch.from_numpy(np.concatenate([mask.flatten() for mask in masks]))


@pytest.mark.parametrize("rule", ["telea", "navier-stokes"])
@pytest.mark.parametrize("radius", [1.0, 3.0, 5.0])
def test_opencvs_rules_are_opencvs(rule, radius):
    images, masks = draw(0)
    made = complete(ImageStore.from_images(images), flat(masks), rule, radius)
    for image, mask, found in zip(images, masks, arrays(made), strict=True):
        height, width = mask.shape
        black, hole = image * mask[:, :, None], (~mask).astype(np.uint8)
        if 1 in mask.shape:  # where OpenCV reads beyond the image
            thick = (2 if height == 1 else 1, 2 if width == 1 else 1)
            black, hole = np.tile(black, (*thick, 1)), np.tile(hole, thick)
        expected = cv2.inpaint(black, hole, radius, FLAGS[rule])[:height, :width]
        assert np.array_equal(found, expected if not mask.all() else image)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_known_pixels_stay_and_what_was_dropped_has_no_say(rule, seed):
    images, masks = draw(seed)
    others = [np.where(m[:, :, None], i, 255 - i) for i, m in zip(images, masks, strict=True)]
    made, again = (
        complete(ImageStore.from_images(given), flat(masks), rule) for given in (images, others)
    )
    assert torch.equal(made.pixels, again.pixels)
    assert made.sizes.tolist() == [list(size) for size in SIZES]
    for image, mask, found in zip(images, masks, arrays(made), strict=True):
        assert np.array_equal(found[mask], image[mask])
        if rule == "zero":
            assert not found[~mask].any()


@pytest.mark.parametrize("rule", RULES)
def test_nothing_known_is_black_and_everything_known_is_the_image(rule):
    images, _ = draw(1, [(6, 9), (6, 9)])
    masks = [np.zeros((6, 9), bool), np.ones((6, 9), bool)]
    black, same = arrays(complete(ImageStore.from_images(images), flat(masks), rule))
    assert not black.any() and np.array_equal(same, images[1])
    assert len(complete(ImageStore.empty(), torch.empty(0, dtype=torch.bool), rule)) == 0


@pytest.mark.parametrize("rule", RULES)
def test_an_image_is_filled_alone_as_among_others(rule):
    images, masks = draw(2)
    together = arrays(complete(ImageStore.from_images(images), flat(masks), rule))
    for image, mask, found in zip(images, masks, together, strict=True):
        (alone,) = arrays(complete(ImageStore.from_images([image]), flat([mask]), rule))
        assert np.array_equal(alone, found)


@pytest.mark.parametrize("rule", ["telea", "diffusion"])
def test_threads_change_nothing(rule):
    images, masks = draw(3)
    store, threads = ImageStore.from_images(images), torch.get_num_threads()
    made = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            made.append(complete(store, flat(masks), rule).pixels)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*made)


def test_images_from_anywhere_in_a_store():
    images, masks = draw(4, [(8, 6), (5, 5), (8, 6)])
    store = ImageStore.from_images(images)
    scattered = ImageStore(store.pixels, store.offsets[[2, 0]], store.geometry[[2, 0]])
    made = arrays(complete(scattered, flat([masks[2], masks[0]])))
    straight = arrays(complete(store, flat(masks)))
    assert all(np.array_equal(made[k], straight[place]) for k, place in enumerate((2, 0)))
    packed = store.compress(torch.tensor([[0, 0, 2, 2]] * 3, dtype=torch.int16))
    assert torch.equal(
        complete(packed, flat(masks)).pixels, complete(packed.reconstruct(), flat(masks)).pixels
    )


def laplace(image, known):
    """The harmonic function with these values where known, and no flow through the edges."""
    height, width = known.shape
    system, right = np.eye(height * width), np.where(known, image, 0).flatten().astype(float)
    for y, x in np.argwhere(~known):
        row = np.zeros((height, width))
        row[y, x] = 4
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            row[min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)] -= 1
        system[y * width + x] = row.flatten()
    return np.linalg.solve(system, right).reshape(height, width)


@pytest.mark.parametrize("size", [(1, 8), (9, 9), (5, 11)])
def test_diffusion_solves_laplaces_equation(size):
    rng = np.random.default_rng(5)
    image, known = rng.random(size) * 255, rng.random(size) < 0.15
    known[0, 0] = True
    exact = laplace(image, known)
    given = torch.from_numpy(image)[None, None], torch.from_numpy(known)[None]
    errors = [
        float((diffuse(*given, steps=steps)[0, 0] - torch.from_numpy(exact)).abs().max())
        for steps in (8, 1000)
    ]
    assert errors[1] < 1e-6 and errors[0] < 50


@given(st.integers(1, 23), st.integers(1, 23), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_diffusion_stays_within_what_is_known(height, width, seed):
    (image,), (mask,) = draw(seed, [(height, width)], share=0.2)
    image = image // 4 + 100
    (made,) = arrays(complete(ImageStore.from_images([image]), flat([mask]), "diffusion"))
    low, high = image[mask].min(0), image[mask].max(0)
    assert ((made >= low) & (made <= high)).all()
    constant = np.full_like(image, 77)
    (made,) = arrays(complete(ImageStore.from_images([constant]), flat([mask]), "diffusion"))
    assert (made == 77).all()


def test_diffusion_goes_on_with_a_ramp():
    y, x = np.mgrid[0:32, 0:32]
    image = np.stack([4 * x, 3 * y, 2 * (x + y)], -1).astype(np.uint8)
    hole = (y >= 8) & (y < 24) & (x >= 8) & (x < 24)
    (made,) = arrays(complete(ImageStore.from_images([image]), flat([~hole]), "diffusion"))
    error = np.abs(made.astype(int) - image)
    assert error.max() <= 6 and error[hole].mean() < 2


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("threshold", [0.4, 0.7])
def test_diffusion_comes_as_near_to_the_truth_as_telea(size, threshold):
    """On drawn scenes under masks of smooth maps, in the dropped pixels."""
    images = make_scenes(classes=4, size=size, train_per_class=6, test_per_class=1).train.images
    coarse = torch.rand(len(images), 4, 4, generator=torch.Generator().manual_seed(size))
    masks = salient_masks(coarse, images.sizes, threshold)
    true = images.reconstruct().pixels.view(-1, 3)[~masks].double()

    def psnr(rule):
        made = complete(images, masks, rule).pixels.view(-1, 3)[~masks].double()
        return 10 * math.log10(255**2 / float((made - true).square().mean()))

    found = {rule: psnr(rule) for rule in RULES}
    assert found["diffusion"] > found["telea"] - 2
    assert found["diffusion"] > found["zero"] + 5


def test_diffusion_of_other_dtypes_and_layouts():
    image, known = torch.rand(2, 3, 9, 11, dtype=torch.float64), torch.rand(2, 9, 11) < 0.3
    made = diffuse(image, known)
    assert made.dtype == torch.float64 and not made.requires_grad
    last = image.to(memory_format=torch.channels_last)
    assert torch.allclose(diffuse(last, known), made, atol=1e-12)
    assert torch.allclose(diffuse(image.float(), known).double(), made, atol=1e-5)
    assert diffuse(image[:0], known[:0]).shape == (0, 3, 9, 11)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "tela"}, "rule is 'tela', which is unknown; did you mean 'telea'?"),
        ({"radius": 0}, "radius is 0; it must be a positive number of pixels"),
        ({"radius": float("nan")}, "radius is nan"),
        ({"masks": torch.ones(29, dtype=torch.bool)}, r"masks is torch.bool of shape \(29,\)"),
        (
            {"masks": torch.ones(30)},
            r"masks is torch.float32 .* must be torch.bool of shape \[30\]",
        ),
    ],
)
def test_bad_arguments(options, says):
    store = ImageStore.from_images([np.zeros((5, 6, 3), np.uint8)])
    arguments = {"masks": torch.ones(30, dtype=torch.bool), **options}
    with pytest.raises(FastcilError, match=says):
        complete(store, **arguments)
