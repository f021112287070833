"""Completed memory: saliency, the autoencoder's stage, what memory holds, and the records."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from backbones import ConvNet
from torch.nn import functional as F

from fastcil.addons.completed import Completed, first_of_each, pair_up
from fastcil.addons.completion import Completion
from fastcil.addons.completion_records import output_errors
from fastcil.addons.samc import SAMC
from fastcil.contract import Recipe, Task, evaluating
from fastcil.data import Augmentation, Examples, ImageStore
from fastcil.engine.context import EngineContext
from fastcil.engine.trainer import Trainer
from fastcil.errors import CompositionError, FastcilError
from fastcil.memory import make_codec
from fastcil.methods.er import ExperienceReplay
from fastcil.nn import GradCAM
from fastcil.ops import salient_masks

SHORT = Recipe(epochs=3, lr=0.01, optimizer="adam", weight_decay=0.0, batch_size=4)


def pictures(count: int, seed: int, sides: tuple[int, ...] = (20, 28)) -> ImageStore:
    """Smooth waves of several sizes."""
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        height, width = sides[number % len(sides)], sides[(number + 1) % len(sides)]
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(y / rng.uniform(2, 6)), np.cos(x / rng.uniform(2, 6)), np.sin((x + y) / 5)]
        noise = rng.normal(0, 8, (height, width, 3))
        images.append((120 + 100 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8))
    return ImageStore.from_images(images)


def make_task(index: int = 0, sides: tuple[int, ...] = (20, 28), per_class: int = 6) -> Task:
    labels = torch.tensor([2 * index + k for k in range(2) for _ in range(per_class)])
    examples = Examples(pictures(len(labels), index, sides), labels)
    new = (2 * index, 2 * index + 1)
    return Task(index, new, 2 * index, examples, examples.select([]))


def compose(task: Task, **config):
    """ER with the addon, ready for the stages of a task."""
    context = EngineContext(ConvNet, Augmentation(16, crop="resized"), torch.device("cpu"))
    recipe = Recipe(epochs=1, lr=0.05, batch_size=4)
    torch.manual_seed(0)
    method = ExperienceReplay(ExperienceReplay.Config(first=recipe, later=recipe), context)
    addon = SAMC(SAMC.Config(**{"first": SHORT, "later": SHORT, **config}), context, method)
    method.begin_task(task)
    addon.begin_task(task)
    return method, addon


def run(method, addon, stages, until: int | None = None) -> list[dict]:
    """Trains; what the trainer told of each epoch."""
    told = []

    class Stop(Exception):
        pass

    def tell(event, facts):
        told.extend([facts] if event == "epoch" else [])
        if event == "step" and until is not None and len(told) >= until:
            raise Stop

    context = addon.context
    trainer = Trainer(method, context.augmentation, context.device, (0,), tell)
    with contextlib.suppress(Stop):
        trainer.run(stages)
    return told


@pytest.mark.parametrize("paste", [True, False])
def test_completion_is_the_autoencoders_where_pixels_are_missing(paste):
    torch.manual_seed(1)
    completion = Completion(paste)
    images = pictures(7, 0)
    masks = torch.rand(int(images.sizes.prod(1).sum()), generator=torch.Generator()) < 0.4
    before = images.pixels.clone()
    modes = [part.training for part in completion.modules()]
    completed = completion.complete(images, masks)
    assert torch.equal(images.pixels, before) and torch.equal(completed.sizes, images.sizes)
    assert modes == [part.training for part in completion.modules()]
    first = 0
    for place, (height, width) in enumerate(images.sizes.tolist()):
        image = images.image(place)
        mask = masks[first : first + height * width].view(height, width)
        first += height * width
        with torch.no_grad(), evaluating(completion.autoencoder):
            made = completion.autoencoder(image.permute(2, 0, 1)[None].float() / 255)[0]
        made = (255 * made + 0.5).floor().permute(1, 2, 0)
        expected = torch.where(mask[:, :, None] & paste, image.float(), made)
        found = completed.image(place)
        assert float((found.float() - expected).abs().max()) <= 1
        if paste:
            assert torch.equal(found[mask], image[mask])


def test_no_image_is_completed_to_none():
    completion = Completion(paste=True)
    empty = torch.empty(0, dtype=torch.bool)
    assert len(completion.complete(ImageStore.empty(), empty)) == 0


@pytest.mark.parametrize("sides", [(24,), (20, 28)])
@pytest.mark.parametrize("completion", ["both", "autoencoder"])
def test_the_stage_trains_the_autoencoder_alone(completion, sides):
    task = make_task(sides=sides)
    method, addon = compose(task, completion=completion, images=9)
    stages = addon.stages(task, method.stages(task))
    assert [stage.name for stage in stages] == ["replay", "completion"]
    assert [stage.primary for stage in stages] == [True, False]
    before = {name: value.clone() for name, value in method.state_dict().items()}
    weights = [p.clone() for p in addon.completion.autoencoder.parameters()]
    stages[1].recipe = dataclasses.replace(SHORT, epochs=12)
    told = run(method, addon, stages[1:])
    losses = [epoch["losses"]["completion"] for epoch in told]
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    parameters = list(addon.completion.autoencoder.parameters())
    assert not any(torch.equal(p, w) for p, w in zip(parameters, weights, strict=True))


@pytest.mark.parametrize("sides", [(24,), (20, 28)])
@pytest.mark.parametrize("completion", ["both", "autoencoder"])
def test_what_it_learns_from_are_new_images_masked_as_exemplars_will_be(completion, sides):
    task = make_task(sides=sides)
    method, addon = compose(task, completion=completion, images=5, threshold=0.4)
    (stage,) = addon.stages(task, [])
    stage.begin()
    (stream,) = stage.streams
    chosen = task.examples.select(stream.subset)
    held = addon.completion
    side = sides[0] if len(sides) == 1 else 16
    assert held.originals.shape == held.inputs.shape == (5, side, side, 3)
    assert len(stream.subset.unique()) == 5 and stream.parts == (task.examples,)

    network = method.network
    maps = addon.context.scan_labelled(
        lambda images, labels, _: (GradCAM(network.eval())(images, labels),), chosen
    )[0]
    if len(sides) == 1:
        assert torch.equal(held.originals.flatten(), chosen.images.pixels)
    enlarged = F.interpolate(maps[:, None], (side, side), mode="bilinear")[:, 0]
    low, high = enlarged.amin((1, 2), keepdim=True), enlarged.amax((1, 2), keepdim=True)
    keep = ((enlarged - low) / (high - low) > 0.4) | (high == 0)
    assert 0 < float(keep.float().mean()) < 1
    assert torch.equal(held.inputs[keep], held.originals[keep])
    zeros = (held.inputs[~keep] == 0).all()
    assert bool(zeros) == (completion == "autoencoder")

    entries = torch.tensor([3, 0])
    with torch.no_grad():
        batch = dataclasses.make_dataclass("B", ["entry"])(entries)
        loss = held.objective(batch)["completion"]
        seen = held.inputs[entries].permute(0, 3, 1, 2) / 255
        error = held.autoencoder(seen) - held.originals[entries].permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(loss, error.square().mean())


def test_memory_is_completed_by_the_weights_before_until_the_task_is_done():
    task = make_task()
    method, addon = compose(task)
    images = pictures(4, 5)
    masks = torch.arange(int(images.sizes.prod(1).sum())) % 3 == 0
    stages = addon.stages(task, method.stages(task))
    old = addon.completion.complete(images, masks).pixels
    run(method, addon, stages, until=3)
    assert torch.equal(addon.completion.complete(images, masks).pixels, old)

    structure, tensors = addon.structure(), {k: v.clone() for k, v in addon.tensors().items()}
    _, other = compose(task)
    other.restore(structure)
    other.load_tensors(tensors)
    assert torch.equal(other.completion.complete(images, masks).pixels, old)
    assert torch.equal(other.completion.originals, addon.completion.originals)

    retained = addon.retained()[0].nbytes
    addon.prepare_memory(task, lambda units, nbytes: 0)
    assert not torch.equal(addon.completion.complete(images, masks).pixels, old)
    assert not len(addon.completion.originals) and not len(addon.completion.settled)
    assert retained == addon.retained()[0].nbytes == 86244
    assert addon.retained()[0].kind == "codec"


@pytest.mark.parametrize(
    ("completion", "rule", "learned"),
    [("zero", "zero", False), ("rule", "telea", False), ("autoencoder", "zero", True)]
    + [("both", "telea", True)],
)
def test_rows_of_table_2(completion, rule, learned):
    task = make_task()
    method, addon = compose(task, completion=completion, radius=2)
    options = addon.codec_options()
    assert (options["rule"], options["radius"], options["threshold"]) == (rule, 2, 0.6)
    assert ("refine" in options) == learned == bool(addon.retained())
    assert len(addon.stages(task, method.stages(task))) == 1 + learned
    make_codec(SAMC.brings_codec, **options)


@pytest.mark.parametrize("options", [{}, {"saliency": "predicted", "norms": "batch"}])
def test_marks_are_grad_cam_of_the_methods_network(options):
    task = make_task(index=1)
    method, addon = compose(dataclasses.replace(task, known=0), **options)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.train()
    marks = addon.marks(task.examples)
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert all(part.training for part in method.modules())

    def look(images, labels, sizes):
        if options:
            labels = 2 + method.network(images)[:, 2:4].argmax(1)
        maps = torch.relu(
            (
                method.network.maps(images) * method.network.head.weight[labels][:, :, None, None]
            ).sum(1)
        )
        low, high = maps.amin((1, 2), True), maps.amax((1, 2), True)
        return (((maps - low) / (high - low)).nan_to_num(0),)

    if options:
        for norm in (m for m in method.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = 0.0
        (expected,) = addon.context.scan_labelled(look, task.examples)
    else:
        with evaluating(method):
            (expected,) = addon.context.scan_labelled(look, task.examples)
    assert marks.dtype == torch.float32 and marks.shape == (12, 4, 4)
    if not options:
        torch.testing.assert_close(marks, expected, rtol=1e-4, atol=1e-5)
    else:
        # The classes were found by statistics of the batch too.
        torch.testing.assert_close(marks, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_originals_are_found_by_their_salient_pixels(threshold):
    task = make_task(per_class=12)
    _, addon = compose(task, threshold=threshold)
    maps = addon.marks(task.examples)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:15]
    completed = addon._completed(task.examples.images.select(order), maps[order])
    exemplars = Examples(completed, task.examples.labels[order])
    after = dataclasses.replace(task, exemplars=exemplars)
    first = first_of_each(after, 9)
    assert torch.bincount(exemplars.labels[first]).tolist() in ([4, 5], [5, 4])
    places, found = pair_up(after, first, maps, threshold)
    assert torch.equal(places, first)
    assert torch.equal(found, order[first])


def test_errors_are_those_of_the_lemma():
    task = make_task()
    method, addon = compose(task)
    maps = addon.marks(task.examples)
    completed = addon._completed(task.examples.images, maps)
    with evaluating(method):
        found = output_errors(addon.context, method.logits, task.examples, completed, 0.6)
    assert found.shape == (12, 3) and found.dtype == torch.float64

    mean = torch.tensor(addon.context.augmentation.mean)[:, None, None]
    std = torch.tensor(addon.context.augmentation.std)[:, None, None]
    stores = {"x": task.examples, "y": Examples(completed, task.examples.labels)}
    read = {
        name: addon.context.scan(lambda images: images, examples, look="whole") * std + mean
        for name, examples in stores.items()
    }
    with evaluating(method):
        for place in range(12):
            x, y = read["x"][place].clone().requires_grad_(), read["y"][place]
            label = task.examples.labels[place]
            score = method.logits(((x - mean) / std)[None])[0, label]
            (slope,) = torch.autograd.grad(score, x)
            other = method.logits(((y - mean) / std)[None])[0, label]
            expected = [
                float((score - other).detach().abs()),
                float(slope.norm() * (y - x).detach().norm()),
                0.6 * float((y - x).detach().abs().max()) * (3 * 16 * 16) ** 0.5,
            ]
            np.testing.assert_allclose(found[place].numpy(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("flat", [[0, 3, 6, 9], [], list(range(12))])
def test_exemplars_kept_whole_prove_nothing(flat):
    """Their error of 0 is within a bound of 0."""
    task = make_task(sides=(16,))
    _, addon = compose(task, completion="rule", threshold=0.5)
    maps = addon.marks(task.examples).clone()
    assert bool((maps.amax((1, 2)) > maps.amin((1, 2))).all())
    maps[flat] = 0.7
    completed = addon._completed(task.examples.images, maps)
    masks = salient_masks(maps, task.examples.images.sizes, 0.5)
    shown = Completed.of(task.examples, completed, maps, masks, exact=True)
    errors = torch.rand(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors[flat] = 0
    after = dataclasses.replace(task, exemplars=Examples(completed, task.examples.labels))
    addon.figures.see(task, maps)
    addon.figures.note(after, shown, completed, errors, 2)

    records = {record.title: record.payload for record in addon.records()}
    json.dumps([p for p in records.values() if "images" not in p], allow_nan=False)
    share = records["Images kept whole: saliency without contrast"]["y"]["of the task's images"]
    assert share == [pytest.approx(len(flat) / 12)]
    (row,) = next(p for title, p in records.items() if title.startswith("Lemma 4.2, with"))["rows"]
    counted = [values for place, values in enumerate(errors.tolist()) if place not in flat]
    curve = next(p for title, p in records.items() if title.startswith("Lemma 4.2: "))["y"]
    assert row[-1] == f"{100 * len(flat) / 12:.0f} %"
    if not counted:
        assert row[1:-1] == ["none"] * 5 and list(curve.values()) == [[None]] * 3
        return
    means = [sum(column) / len(counted) for column in zip(*counted, strict=True)]
    within = [sum(v[0] <= v[k] for v in counted) / len(counted) for k in (1, 2)]
    assert row[1:4] == [f"{mean:.4g}" for mean in means]
    assert row[4:6] == [f"{100 * share:.0f} %" for share in within]
    assert [value for (value,) in curve.values()] == pytest.approx(means)


def test_maps_without_contrast_are_counted_where_exemplars_are_marked():
    task = make_task()
    _, addon = compose(task)
    maps = addon.marks(task.examples)
    maps[:3], maps[3] = 0.0, torch.nan  # as a head that sees nothing in these leaves them
    addon.end_task(task)
    assert addon.figures.flat.tolist() == [[0, pytest.approx(4 / 12)]]
    assert [record.title for record in addon.records()] == [
        "Images kept whole: saliency without contrast"
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"completion": "none"}, "completion is 'none'"),
        ({"rule": "zero"}, "rule is 'zero'"),
        ({"radius": 0}, "radius is 0"),
        ({"images": 0}, "images is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"saliency": "argmax"}, "saliency is 'argmax'"),
    ],
)
def test_settings_out_of_range(options, says):
    with pytest.raises(FastcilError, match=says):
        SAMC.Config(**options)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(CompositionError, match=r"samc.layer is 'stages.9', which ConvNet has not"):
        compose(make_task(), layer="stages.9")


@pytest.mark.parametrize("keeps", ["nothing", "everything"])
def test_methods_without_exemplars_are_refused(world, keeps):
    odd = type("Odd", (world.Mine,), {"keeps": keeps})
    context = world.FakeContext()
    with pytest.raises(CompositionError, match=f"Odd keeps {keeps}"):
        SAMC(SAMC.Config(), context, odd(odd.Config(), context))
