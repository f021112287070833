"""AutoAugment: the tables, the magnitudes, the draws, and a batch against Pillow image by image."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from fastcil.data.autoaugment import CIFAR, IMAGENET, POLICIES, RANGES, Plan, draw
from fastcil.ops.pixel_program import OPERATIONS

NAMES = list(RANGES)
GREY = (128, 128, 128)
AFFINE, NEAREST = Image.Transform.AFFINE, Image.Resampling.NEAREST


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int, height: int = 19, width: int = 23, seed: int = 0) -> torch.Tensor:
    """Smooth and noisy random images, uint8 [N, 3, H, W] in channels_last memory."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, height, width, 3))
    pixels[::2] = np.clip(pixels[::2] * 0.3 + np.arange(width)[:, None] * 5, 0, 255)
    return torch.from_numpy(pixels.astype(np.uint8)).permute(0, 3, 1, 2)


def run(images: torch.Tensor, plan: Plan, fill: tuple[int, int, int] = GREY) -> torch.Tensor:
    return plan.program(*images.shape[2:], fill).run(images)


def pillow(image: Image.Image, name: str, m: float) -> Image.Image:
    """One step on one image, as the released policies do it."""
    w, h = image.size
    if name in ("shear_x", "shear_y", "translate_x", "translate_y"):
        data = {
            "shear_x": (1, m, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, m, 1, 0),
            "translate_x": (1, 0, m * w, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, m * h),
        }[name]
        return image.transform(image.size, AFFINE, data, NEAREST, fillcolor=GREY)
    if name == "rotate":
        return image.rotate(m, NEAREST, fillcolor=GREY)
    if name == "solarize":
        return ImageOps.solarize(image, m)
    if name == "posterize":
        assert m == int(m)
        return ImageOps.posterize(image, int(m))
    if name in ("invert", "autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)
    enhancer = {"colour": "Color"}.get(name, name.capitalize())
    return getattr(ImageEnhance, enhancer)(image).enhance(m)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_policy_is_25_pairs_of_steps(policy: tuple) -> None:
    assert len(policy) == 25
    for pair in policy:
        assert len(pair) == 2
        for name, probability, level in pair:
            assert name in RANGES
            assert 0 <= probability <= 1
            assert math.isclose(probability * 10, round(probability * 10), abs_tol=1e-12)
            assert level in range(10)
            if name in ("invert", "autocontrast", "equalize"):
                assert level == 0


@pytest.mark.parametrize(
    ("policy", "place", "pair"),
    [
        (CIFAR, 0, (("invert", 0.1, 0), ("contrast", 0.2, 6))),
        (CIFAR, 1, (("rotate", 0.7, 2), ("translate_x", 0.3, 9))),
        (CIFAR, 9, (("contrast", 0.6, 7), ("sharpness", 0.6, 5))),
        (CIFAR, 14, (("solarize", 0.5, 2), ("invert", 0.0, 0))),
        (CIFAR, 17, (("colour", 0.9, 9), ("equalize", 0.6, 0))),
        (CIFAR, 21, (("translate_y", 0.9, 9), ("translate_y", 0.7, 9))),
        (CIFAR, 24, (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0))),
        (IMAGENET, 0, (("posterize", 0.4, 8), ("rotate", 0.6, 9))),
        (IMAGENET, 7, (("posterize", 0.8, 5), ("equalize", 1.0, 0))),
        (IMAGENET, 12, (("equalize", 0.0, 0), ("equalize", 0.8, 0))),
        (IMAGENET, 14, (("colour", 0.6, 4), ("contrast", 1.0, 8))),
        (IMAGENET, 18, (("shear_x", 0.6, 5), ("equalize", 1.0, 0))),
        (IMAGENET, 24, (("equalize", 0.8, 0), ("equalize", 0.6, 0))),
    ],
)
def test_published_pairs(policy: tuple, place: int, pair: tuple) -> None:
    assert policy[place] == pair


@pytest.mark.parametrize(
    ("policy", "counts"),
    [
        (
            CIFAR,
            {
                "equalize": 9,
                "autocontrast": 7,
                "translate_y": 5,
                "sharpness": 5,
                "colour": 5,
                "brightness": 4,
                "solarize": 4,
                "invert": 3,
                "contrast": 2,
                "shear_y": 2,
                "translate_x": 2,
                "rotate": 1,
                "posterize": 1,
            },
        ),
        (
            IMAGENET,
            {
                "equalize": 17,
                "solarize": 7,
                "colour": 6,
                "posterize": 5,
                "rotate": 6,
                "invert": 3,
                "autocontrast": 2,
                "contrast": 2,
                "sharpness": 1,
                "shear_x": 1,
            },
        ),
    ],
    ids=["cifar", "imagenet"],
)
def test_how_often_each_operation_appears(policy: tuple, counts: dict[str, int]) -> None:
    got = Counter(name for pair in policy for name, _, _ in pair)
    assert got == counts and got.total() == 50


@pytest.mark.parametrize(
    ("name", "level", "middle", "swing"),
    [
        ("shear_x", 9, 0.0, 0.3),
        ("shear_y", 3, 0.0, 0.1),
        ("translate_x", 9, 0.0, 150 / 331),
        ("translate_y", 3, 0.0, 50 / 331),
        ("rotate", 9, 0.0, 30.0),
        ("rotate", 2, 0.0, 20 / 3),
        ("colour", 0, 1.0, 0.0),
        ("contrast", 9, 1.0, 0.9),
        ("brightness", 7, 1.0, 0.7),
        ("sharpness", 1, 1.0, 0.1),
        ("solarize", 0, 256.0, 0.0),
        ("solarize", 9, 0.0, 0.0),
        ("solarize", 5, 256 * 4 / 9, 0.0),
        ("posterize", 0, 8.0, 0.0),
        ("posterize", 5, 6.0, 0.0),
        ("posterize", 6, 5.0, 0.0),
        ("posterize", 7, 5.0, 0.0),
        ("posterize", 8, 4.0, 0.0),
        ("posterize", 9, 4.0, 0.0),
    ],
)
def test_magnitudes_of_the_paper(name: str, level: int, middle: float, swing: float) -> None:
    assert RANGES[name].magnitude(level) == pytest.approx((middle, swing), abs=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_steps_are_taken_as_often_as_their_probability_says(policy: str) -> None:
    count = 100_000
    plan = draw(count, policy, seeded(1))  # type: ignore[arg-type]
    for step in range(2):
        expected: Counter[int] = Counter()
        for pair in POLICIES[policy]:
            name, probability, _ = pair[step]
            expected[NAMES.index(name)] += probability / 25
            expected[len(NAMES)] += (1 - probability) / 25
        got = plan.operations[:, step].bincount(minlength=len(NAMES) + 1) / count
        for code, share in enumerate(got.tolist()):
            spread = math.sqrt(expected[code] * (1 - expected[code]) / count)
            assert abs(share - expected[code]) <= 5 * spread + 1e-12


def test_two_steps_of_an_image_belong_to_one_sub_policy() -> None:
    plan = draw(20_000, "cifar", seeded(2))
    pairs = {(NAMES.index(a[0]), NAMES.index(b[0])) for a, b in CIFAR}
    both = plan.operations[(plan.operations < len(NAMES)).all(1)].tolist()
    # The one with a probability of 0 never comes.
    pairs.remove((NAMES.index("solarize"), NAMES.index("invert")))
    assert {tuple(pair) for pair in both} == pairs


def test_a_coin_decides_the_sign() -> None:
    plan = draw(20_000, "imagenet", seeded(3))
    for name, middle in (("rotate", 0.0), ("shear_x", 0.0), ("contrast", 1.0)):
        chosen = plan.magnitudes[plan.operations == NAMES.index(name)]
        assert (chosen > middle).double().mean().item() == pytest.approx(0.5, abs=0.1)
        assert chosen.max() - middle == pytest.approx(middle - chosen.min())
    bits = plan.magnitudes[plan.operations == NAMES.index("posterize")]
    assert set(bits.tolist()) == {4.0, 5.0, 6.0}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_equals_pillow_image_by_image(policy: str) -> None:
    images = batch(150, seed=5)
    plan = draw(150, policy, seeded(4))  # type: ignore[arg-type]
    got = run(images, plan)
    assert got.dtype == torch.uint8
    assert got.is_contiguous(memory_format=torch.channels_last)
    for i in range(150):
        image = Image.fromarray(images[i].permute(1, 2, 0).contiguous().numpy())
        for step in range(2):
            code = plan.operations[i, step].item()
            if code < len(NAMES):
                image = pillow(image, NAMES[code], plan.magnitudes[i, step].item())
        assert np.array_equal(got[i].permute(1, 2, 0).numpy(), np.asarray(image)), i


def test_a_batch_mate_changes_nothing() -> None:
    images = batch(40, seed=6)
    plan = draw(40, "cifar", seeded(7))
    together = run(images, plan)
    for i in range(0, 40, 7):
        alone = Plan(plan.operations[i : i + 1], plan.magnitudes[i : i + 1])
        assert torch.equal(run(images[i : i + 1], alone)[0], together[i])


def test_no_step_leaves_the_batch_as_it_was() -> None:
    images = batch(5)
    none = Plan(torch.full((5, 2), len(NAMES)), torch.zeros(5, 2, dtype=torch.float64))
    assert torch.equal(run(images, none), images)


@pytest.mark.parametrize("policy", POLICIES)
def test_same_seed_same_plan(policy: str) -> None:
    plans = [draw(64, policy, seeded(seed)) for seed in (9, 9, 10)]  # type: ignore[arg-type]
    first, again, other = plans
    assert torch.equal(first.operations, again.operations)
    assert torch.equal(first.magnitudes, again.magnitudes)
    assert not torch.equal(first.operations, other.operations)


def test_a_program_has_the_numbers_of_each_operation() -> None:
    plan = Plan(
        torch.tensor([[NAMES.index(name), len(NAMES)] for name in NAMES]),
        torch.full((len(NAMES), 2), 0.25, dtype=torch.float64),
    )
    program = plan.program(height=40, width=100, fill=(1, 2, 3))
    turn = math.radians(0.25)
    sine, cosine = math.sin(turn), math.cos(turn)
    affine = {
        "shear_x": (1, 0.25, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.25, 1, 0),
        "translate_x": (1, 0, 25, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 10),
        "rotate": (
            *(cosine, -sine, 50 - cosine * 50 + sine * 20),
            *(sine, cosine, 20 - sine * 50 - cosine * 20),
        ),
    }
    for name, codes, amounts in zip(NAMES, program.operations, program.amounts, strict=True):
        assert codes.tolist() == [OPERATIONS["affine" if name in affine else name], 0]
        expected = affine.get(name, (0.25, 0, 0, 0, 0, 0))
        assert amounts[0, :6].tolist() == pytest.approx(expected, abs=1e-12)
        assert amounts[0, 6:].tolist() == [1, 2, 3]


def test_the_fill_colour_is_used() -> None:
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    shift = Plan(
        torch.tensor([[NAMES.index("translate_x"), len(NAMES)]]),
        torch.tensor([[0.5, 0.0]], dtype=torch.float64),
    )
    got = run(images, shift, fill=(1, 2, 3))
    assert got[0, :, 0, -1].tolist() == [1, 2, 3]


def test_an_empty_batch_stays_empty() -> None:
    empty = torch.empty((0, 3, 4, 5), dtype=torch.uint8)
    assert run(empty, draw(0, "cifar", seeded())).shape == (0, 3, 4, 5)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match="policy is 'svhn'"):
        draw(4, "svhn", seeded())  # type: ignore[arg-type]
