"""The embedded data set: what it promises about images, boxes, seeds and how hard it is."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from fastcil.data.scenes import draw_scene, make_scenes
from fastcil.data.scenes_shapes import SHAPES
from fastcil.data.scenes_sketch import HOLE, Draws, Sketch
from fastcil.errors import DataError


def same(a, b):
    return torch.equal(a.images.pixels, b.images.pixels) and torch.equal(a.labels, b.labels)


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(classes=20, train_per_class=12, test_per_class=4)


def test_counts_names_and_shapes(scenes):
    assert len(scenes.class_names) == len(set(scenes.class_names)) == 20
    assert scenes.train.labels.bincount().tolist() == [12] * 20
    assert scenes.test.labels.bincount().tolist() == [4] * 20
    assert scenes.train.images.sizes.unique().tolist() == [64]
    assert scenes.train_boxes.shape == (240, 4)
    assert scenes.test_boxes.dtype == torch.int16


def test_boxes_lie_inside_and_vary_in_size_and_place(scenes):
    y0, x0, y1, x1 = scenes.train_boxes.long().unbind(1)
    assert (y0 >= 0).all() and (x0 >= 0).all() and (y1 <= 64).all() and (x1 <= 64).all()
    share = ((y1 - y0) * (x1 - x0)) / 64**2
    assert share.min() > 0.06 and share.max() < 0.42
    assert share.quantile(0.1) < 0.17 and share.quantile(0.9) > 0.3
    centre = torch.stack([y0 + y1, x0 + x1]) / 128
    assert (centre.min(1).values < 0.25).all() and (centre.max(1).values > 0.75).all()


@pytest.mark.parametrize("label", range(len(SHAPES)))
def test_box_is_tight_around_what_differs_from_the_background(label, monkeypatch):
    """Drawing the same scene with another object colour changes the inside of the box only."""
    images = []
    for shift in (0.0, 120.0):
        monkeypatch.setattr(
            "fastcil.data.scenes._palette",
            lambda d, label, behind, shift=shift: np.full((4, 3), 60.0 + shift),
        )
        image, box = draw_scene(Draws(5, label), label, 64)
        images.append(image.astype(int))
    ys, xs = np.nonzero(np.abs(images[0] - images[1]).max(2) >= 5)
    margin = np.array(box) - (ys.min(), xs.min(), ys.max() + 1, xs.max() + 1)
    assert (margin[:2] >= 0).all() and (margin[:2] <= 1).all()  # faint edges lie outside
    assert (margin[2:] <= 0).all() and (margin[2:] >= -1).all()
    y0, x0, y1, x1 = box
    far = np.ones((64, 64), bool)
    far[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = False
    assert np.array_equal(images[0][far], images[1][far])


def test_same_seed_same_bits_and_another_seed_other_images(scenes):
    again = make_scenes(classes=20, train_per_class=12, test_per_class=4)
    assert same(again.train, scenes.train) and same(again.test, scenes.test)
    assert torch.equal(again.train_boxes, scenes.train_boxes)
    other = make_scenes(classes=2, train_per_class=2, test_per_class=1, seed=1994)
    assert not torch.equal(other.train.images.image(0), scenes.train.images.image(0))


def test_fewer_classes_and_images_are_the_first_of_more(scenes):
    few = make_scenes(classes=3, train_per_class=2, test_per_class=1)
    rows = [0, 1, 12, 13, 24, 25]
    assert same(few.train, scenes.train.select(rows))
    assert same(few.test, scenes.test.select([0, 4, 8]))
    assert torch.equal(few.train_boxes, scenes.train_boxes[rows])
    assert few.class_names == scenes.class_names[:3]


def test_train_and_test_share_no_image(scenes):
    train = {scenes.train.images.image(i).numpy().tobytes() for i in range(240)}
    test = {scenes.test.images.image(i).numpy().tobytes() for i in range(80)}
    assert len(train) == 240 and len(test) == 80 and not train & test


def test_does_not_depend_on_global_random_state(scenes):
    np.random.seed(7)
    torch.manual_seed(7)
    assert same(make_scenes(2, 64, 2, 1).train, scenes.train.select([0, 1, 12, 13]))


def test_draws_follow_the_bits_of_pcg64():
    """The fixed stream, with numpy's own conversion to floats as the oracle."""
    oracle = np.random.Generator(np.random.PCG64(np.random.SeedSequence((3, 1, 4)))).random(6)
    assert np.array_equal(Draws(3, 1, 4).array(2, 3), oracle.reshape(2, 3))
    d = Draws(3)
    values = [d.uniform(2.0, 5.0) for _ in range(600)]
    assert min(values) >= 2.0 and max(values) < 5.0 and len(set(values)) == 600
    assert {d.integer(1, 3) for _ in range(100)} == {1, 2, 3}
    grain = d.grain(3, 5, 7)
    assert grain.shape == (3, 5, 7) and grain.min() >= -0.5 and grain.max() < 0.5


@pytest.mark.parametrize("size", [32, 48, 96, 224])
def test_size_sets_the_pixels_and_scales_the_object(size):
    shares = []
    for position in range(6):
        image, (y0, x0, y1, x1) = draw_scene(Draws(1993, 0, 1, position), 1, size)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        shares.append((y1 - y0) * (x1 - x0) / size**2)
    reference = []
    for position in range(6):
        _, (y0, x0, y1, x1) = draw_scene(Draws(1993, 0, 1, position), 1, 512)
        reference.append((y1 - y0) * (x1 - x0) / 512**2)
    assert np.abs(np.array(shares) / reference - 1).max() < 8 / size + 0.02


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.__name__)
def test_shape_fills_its_frame_and_varies(shape):
    sketches = []
    for seed in range(4):
        sketch = Sketch()
        shape(sketch, Draws(seed))
        sketches.append(sketch)
        points = np.concatenate([p.points for p in sketch.parts if p.tone != HOLE])
        assert np.isfinite(points).all() and np.abs(points).max() < 1.5
        assert (points.max(0) - points.min(0)).max() > 1.4
    shown = {b"".join(p.points.tobytes() for p in s.parts) for s in sketches}
    assert len(shown) == 4


def test_background_is_cluttered_outside_the_box(scenes):
    """Most images have edges away from the object too."""
    edges = []
    for i in range(0, 240, 4):
        grey = scenes.train.images.image(i).float().mean(2)
        y0, x0, y1, x1 = scenes.train_boxes[i].tolist()
        steps = (grey[1:, 1:] - grey[:-1, 1:]).abs() + (grey[1:, 1:] - grey[1:, :-1]).abs()
        steps[max(y0 - 2, 0) : y1 + 1, max(x0 - 2, 0) : x1 + 1] = 0
        edges.append(int((steps > 30).sum()))
    assert np.mean(np.array(edges) > 40) > 0.6


def test_pixels_and_colours_alone_do_not_tell_the_class(scenes):
    """Nearest neighbour on 16 x 16 grey pixels, and on the colours inside the true box."""

    def grey(examples):
        pixels = examples.images.pixels.view(-1, 64, 64, 3).float().mean(3)
        return interpolate(pixels[:, None], (16, 16), mode="area").flatten(1)

    def colours(examples, boxes):
        rows = []
        for i, (y0, x0, y1, x1) in enumerate(boxes.tolist()):
            inside = examples.images.image(i)[y0:y1, x0:x1].reshape(-1, 3).long() // 64
            counts = (inside @ torch.tensor([16, 4, 1])).bincount(minlength=64).float()
            rows.append((counts / counts.sum()).sqrt())
        return torch.stack(rows)

    for train, test in (
        (grey(scenes.train), grey(scenes.test)),
        (
            colours(scenes.train, scenes.train_boxes),
            colours(scenes.test, scenes.test_boxes),
        ),
    ):
        nearest = torch.cdist(test, train).argmin(1)
        assert (scenes.train.labels[nearest] == scenes.test.labels).float().mean() < 0.35


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": 1}, "classes of scenes is 1; give 2 to 30"),
        ({"classes": 31}, "classes of scenes is 31; give 2 to 30"),
        ({"classes": 2.5}, "classes of scenes is 2.5; give an integer"),
        ({"size": 31}, "size of scenes is 31; give 32 to 32767"),
        ({"train_per_class": 0}, "train_per_class of scenes is 0; give at least 1"),
        ({"test_per_class": True}, "test_per_class of scenes is True; give an integer"),
        ({"seed": -1}, "seed of scenes is -1; give at least 0"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(DataError, match=words):
        make_scenes(**options)
