"""Programs of pixel operations: built, joined, run image by image, and refused."""

from __future__ import annotations

import pytest
import torch

from fastcil.ops import PixelProgram, pixel_ops
from fastcil.ops.pixel_program import AMOUNTS, OPERATIONS


def pixels(count: int, height: int = 6, width: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    shape = (count, height, width, 3)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return images.permute(0, 3, 1, 2)


def grey(count: int) -> torch.Tensor:
    return torch.full((count, 3), 128, dtype=torch.uint8)


FACTOR = torch.linspace(0, 2, 4, dtype=torch.float64)
ALONE = {
    "autocontrast": (pixel_ops.autocontrast, ()),
    "equalize": (pixel_ops.equalize, ()),
    "invert": (pixel_ops.invert, ()),
    "solarize": (pixel_ops.solarize, (FACTOR * 100,)),
    "posterize": (pixel_ops.posterize, (FACTOR.ceil() + 2,)),
    "brightness": (pixel_ops.brightness, (FACTOR,)),
    "contrast": (pixel_ops.contrast, (FACTOR,)),
    "colour": (pixel_ops.colour, (FACTOR,)),
    "sharpness": (pixel_ops.sharpness, (FACTOR,)),
}


@pytest.mark.parametrize("name", ALONE)
def test_one_operation_for_all_images(name: str) -> None:
    change, numbers = ALONE[name]
    program = PixelProgram.of(name, *numbers, count=4)
    assert torch.equal(program.run(pixels(4)), change(pixels(4), *numbers))


def test_affine_and_cutout_have_fill_colours() -> None:
    rows = pixel_ops.rotation(FACTOR * 30, 6, 9)
    program = PixelProgram.of("affine", *rows.unbind(1), fill=(128, 128, 128))
    assert torch.equal(program.run(pixels(4)), pixel_ops.affine(pixels(4), rows, grey(4)))
    y, x, side = torch.arange(4), torch.arange(4) * 2, torch.arange(4) + 1
    program = PixelProgram.of("cutout", y, x, side, fill=(128, 128, 128))
    assert torch.equal(program.run(pixels(4)), pixel_ops.cutout(pixels(4), y, x, side, grey(4)))


def test_operations_run_in_their_order_on_their_images() -> None:
    generator = torch.Generator().manual_seed(0)
    operations = torch.randint(len(OPERATIONS), (60, 5), generator=generator, dtype=torch.int8)
    amounts = torch.rand((60, 5, AMOUNTS), generator=generator, dtype=torch.float64) * 3
    program = PixelProgram(operations, amounts)
    together = program.run(pixels(60))
    names = list(OPERATIONS)
    for i in range(60):
        image = pixels(60)[i : i + 1]
        for code, numbers in zip(operations[i].tolist(), amounts[i], strict=True):
            alone = PixelProgram.of(
                names[code], *numbers[:6, None], fill=numbers[6:].byte().tolist(), count=1
            )
            image = alone.run(image)
        assert torch.equal(together[i : i + 1], image), i


def test_one_after_the_other() -> None:
    first, second = PixelProgram.of("solarize", FACTOR * 80), PixelProgram.of("contrast", FACTOR)
    joined = first.then(second)
    assert joined.operations.shape == (4, 2)
    assert torch.equal(joined.run(pixels(4)), second.run(first.run(pixels(4))))


def test_an_empty_program_does_nothing() -> None:
    images = pixels(3)
    assert torch.equal(PixelProgram.empty(3).run(images), images)
    assert torch.equal(PixelProgram.of("none", count=3).run(images), images)
    assert PixelProgram.empty(0).run(images[:0]).shape == (0, 3, 6, 9)


def test_images_are_not_written_to() -> None:
    images = pixels(4)
    PixelProgram.of("invert", count=4).run(images)
    assert torch.equal(images, pixels(4))


def test_nothing_waits_for_the_device() -> None:
    # Meta tensors hold no values, so reading one back is an error.
    images = torch.empty((4, 3, 5, 6), dtype=torch.uint8, device="meta")
    for name in OPERATIONS:
        got = PixelProgram.of(name, FACTOR).run(images)
        assert got.is_meta and got.shape == images.shape


@pytest.mark.parametrize(
    ("operations", "amounts", "says"),
    [
        (torch.zeros(4, 1), torch.zeros(4, 1, 9).double(), "operations has dtype"),
        (torch.zeros(3, 1).char(), torch.zeros(3, 1, 9).double(), "operations has shape"),
        (torch.zeros(4, 1).char(), torch.zeros(4, 2, 9).double(), "amounts has shape"),
        (torch.zeros(4, 1).char(), torch.zeros(4, 1, 8).double(), "amounts has shape"),
        (torch.zeros(4, 1).char(), torch.zeros(4, 1, 9), "amounts has dtype"),
    ],
)
def test_a_wrong_shape_or_type_is_named(
    operations: torch.Tensor, amounts: torch.Tensor, says: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        PixelProgram(operations, amounts).run(pixels(4))


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(ValueError, match="name is 'blur'; use one of none, affine"):
        PixelProgram.of("blur", FACTOR)
