"""The quality that MRDC chooses, against determinants and encodings made naively."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import Learner, train
from fastcil.addons.mrdc import MRDC, choose, log_volume, volume_ratio
from fastcil.contract import evaluating
from fastcil.data import Examples, ImageStore
from fastcil.engine.report import write_report
from fastcil.errors import CompositionError, FastcilError
from fastcil.memory import Memory, herding, make_codec

OPTIONS = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 16,
    "engine.progress": False,
    "augment.size": 16,
}


def naive_log_volume(features):
    """sqrt(det(M M^T)) of unit rows, as printed."""
    unit = features.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    return 0.5 * math.log(np.linalg.det(unit @ unit.T))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dimensions"), [(1, 1), (1, 7), (3, 4), (6, 6), (9, 30)])
def test_log_volume_is_the_determinants(rows, dimensions, dtype):
    generator = torch.Generator().manual_seed(rows)
    features = (torch.randn(rows, dimensions, generator=generator) * 5 + 1).to(dtype)
    assert log_volume(features) == pytest.approx(naive_log_volume(features), abs=1e-9)
    assert log_volume(features) <= 1e-12


@pytest.mark.parametrize(
    "features",
    [
        torch.ones(2, 5),
        torch.eye(3)[:, :2],
        torch.tensor([[0.0, 0.0], [1.0, 0.0]]),
        torch.ones(4, 1),
    ],
)
def test_dependent_features_have_no_volume(features):
    assert log_volume(features) == -math.inf


def test_volumes_beyond_what_a_determinant_can_hold():
    generator = torch.Generator().manual_seed(0)
    near = 1 + 0.01 * torch.randn(300, 400, generator=generator, dtype=torch.float64)
    unit = near / near.norm(dim=1, keepdim=True)
    sign, log = torch.linalg.slogdet(unit @ unit.T)
    assert torch.linalg.det(unit @ unit.T) == 0 and sign == 1
    assert log_volume(near) == pytest.approx(0.5 * float(log), rel=1e-6)
    assert log_volume(near) < -500
    assert log_volume(torch.empty(0, 4)) == 0


def test_ratio_of_volumes_leaves_out_what_underflowed():
    pairs = [(-3.0, -3.5), (-10.0, -9.0), (-501.0, -400.0), (-400.0, -501.0), (-math.inf, -2.0)]
    mean = (math.exp(-3.0 + 3.5) * math.exp(-10.0 + 9.0)) ** 0.5
    assert volume_ratio(pairs) == pytest.approx(mean)
    assert volume_ratio(pairs, floor=-math.inf) == pytest.approx(
        math.exp((0.5 - 1 - 101 + 101) / 4)
    )
    assert math.isnan(volume_ratio(pairs[2:])) and math.isnan(volume_ratio([]))
    assert volume_ratio([(0.0, -9999.0)], floor=-math.inf) == math.inf


NAN = math.nan


@pytest.mark.parametrize(
    ("ratios", "counts", "expected"),
    [
        ((1.4, 1.2, 1.0), (90, 60, 40), 10),
        ((1.5, 0.5, 1.0), (90, 60, 40), 90),
        ((0.4, 0.6, 1.0), (90, 60, 40), 50),
        ((1.1, 1.1, 1.1), (40, 40, 40), 90),
        ((1.1, 1.1, 9.0), (40, 40, 30), 50),
        ((7.0, 8.0, 9.0), (90, 60, 40), 90),
        ((NAN, NAN, NAN), (90, 60, 40), 90),
        ((NAN, 1.1, 1.0), (90, 60, 40), 50),
    ],
)
def test_the_choice(ratios, counts, expected):
    for order in ((0, 1, 2), (2, 0, 1)):
        grid = [(10, 50, 90)[k] for k in order]
        place = choose([ratios[k] for k in order], [counts[k] for k in order], grid, 0.5)
        assert grid[place] == expected


class Context:
    """Features of pixels: a fixed random projection of the image at 6 x 6."""

    def __init__(self, dimensions=12):
        generator = torch.Generator().manual_seed(5)
        self.projection = torch.randn(108, dimensions, generator=generator, dtype=torch.float64)
        self.bare_backbone = self.make_backbone = None

    def scan(self, function, examples, look="centre", flip=False):
        rows = []
        for k in range(len(examples)):
            image = examples.images.image(k).permute(2, 0, 1)[None].double() / 255
            rows.append(torch.nn.functional.adaptive_avg_pool2d(image, 6).flatten(1))
        seen = torch.cat(rows) if rows else torch.zeros(0, 108, dtype=torch.float64)
        return function(seen @ self.projection)


def compose(world, config=None, dimensions=12):
    context = Context(dimensions)
    method = world.Mine(world.Mine.Config(), context)
    method.embed = lambda features: features
    return MRDC(config or MRDC.Config(), context, method), context


def pictures(labels, seed):
    rng = np.random.default_rng(seed)
    images = []
    for label in labels:
        height, width = rng.integers(30, 70, 2)
        y, x = np.mgrid[0:height, 0:width]
        waves = [
            np.sin(y / rng.uniform(2, 9) + label),
            np.cos(x / rng.uniform(2, 9)),
            np.sin(x + y),
        ]
        images.append(120 + 100 * np.stack(waves, -1) + rng.normal(0, 5, (height, width, 3)))
    store = ImageStore.from_images([image.clip(0, 255).astype(np.uint8) for image in images])
    return Examples(store, torch.tensor(list(labels)))


def tasks(world, per_class=9):
    for index in range(3):
        new = (2 * index, 2 * index + 1)
        examples = pictures([c for c in new for _ in range(per_class)], index)
        task = world.make_task(index)
        yield type(task)(index, new, 2 * index, examples, examples.select([]))


def fitting_of(memory, task):
    """What `fitting` says, from the budget alone."""
    quota = memory.budget.quota(task.total)

    def fitting(units, nbytes):
        cost, count = 0.0, 0
        for u, n in zip(units.tolist(), nbytes.tolist(), strict=True):
            cost += u if memory.budget.unit == "images" else n
            if cost > quota + 1e-9:
                break
            count += 1
        return count

    return fitting


def naive_criterion(context, task, fitting, grid):
    """N_q and R_q of every quality, every image encoded at each."""
    counts, ratios = [], []
    for quality in grid:
        codec, count, gains = make_codec("jpeg", quality=quality), 0, []
        for label in task.classes:
            mine = task.examples.select(task.examples.labels == label)
            features = context.scan(lambda f: f, mine)
            order = herding(features, len(mine))
            encoded = codec.encode(mine.images.select(order), None)
            kept = fitting(codec.units(encoded), codec.nbytes(encoded))
            count += kept
            rows = min(kept, features.shape[1])
            if rows:
                seen = codec.decode(encoded.select(range(rows)))
                compressed = context.scan(lambda f: f, Examples(seen, mine.labels[:rows]))
                gains.append(
                    naive_log_volume(compressed) - naive_log_volume(features[order][:rows])
                )
        counts.append(count)
        ratios.append(math.exp(np.mean(gains)) if gains else math.nan)
    return counts, ratios


@pytest.mark.parametrize("budget", ["6 images", "14000 B", "2500 B/class", "unlimited"])
@pytest.mark.parametrize("dimensions", [5, 20])
def test_quality_follows_the_criterion_task_by_task(world, budget, dimensions):
    addon, context = compose(world, dimensions=dimensions)
    memory = Memory(budget, make_codec("jpeg"))
    grid = addon.config.grid
    assert addon.codec_options()["quality"] == 90
    chosen = []
    for task in tasks(world):
        fitting = fitting_of(memory, task)
        addon.prepare_memory(task, fitting)
        counts, ratios = naive_criterion(context, task, fitting, grid)
        assert addon.counts[-1].tolist() == counts
        assert addon.ratios[-1].tolist() == pytest.approx(ratios, rel=1e-6)
        near = [k for k, ratio in enumerate(ratios) if abs(ratio - 1) < 0.5]
        best = max(near, key=lambda k: (counts[k], grid[k])) if near else len(grid) - 1
        chosen.append(grid[best])
        assert addon.codec_options() == {"quality": grid[best], "bits_per_pixel": 24.0}
        assert addon.rates[-1] > 1
    assert addon.chosen.tolist() == chosen
    if budget == "unlimited":
        assert addon.counts.tolist() == [[18] * 5] * 3


def test_what_is_kept_is_what_was_foreseen(world):
    """N_q of a class is what memory then holds, where herding agrees on the order."""
    addon, context = compose(world, MRDC.Config(grid=(40, 100), epsilon=1e-9))
    memory = Memory("10000 B", make_codec("jpeg"), selection="random")
    (task, *_) = tasks(world)
    addon.prepare_memory(task, fitting_of(memory, task))
    assert addon.chosen.tolist() == [100], "no quality is near enough: the highest"
    memory.use(make_codec("jpeg", **addon.codec_options()))
    memory.update(task, lambda examples: context.scan(lambda f: f, examples))
    assert abs(len(memory) - int(addon.counts[-1, 1])) <= 2


def test_long_classes_are_encoded_in_growing_stretches(world):
    addon, _ = compose(world, MRDC.Config(grid=(20, 60)))
    (task, *_) = tasks(world, per_class=130)
    for limit in (0, 63, 64, 65, 130):
        addon.prepare_memory(task, lambda units, nbytes, limit=limit: min(limit, len(units)))
        assert addon.counts[-1].tolist() == [2 * limit] * 2


def test_a_fixed_quality_is_not_questioned(world):
    addon, context = compose(world, MRDC.Config(quality=33))
    context.scan = None
    for task in tasks(world):
        addon.prepare_memory(task, lambda units, nbytes: 4)
        assert addon.codec_options()["quality"] == 33
    quality, rate = addon.records()
    assert quality.payload["y"] == {"quality": [33, 33, 33]}
    store = [task.examples.select([*range(4), *range(9, 13)]).images for task in tasks(world)]
    for images, said in zip(store, *rate.payload["y"].values(), strict=True):
        files = make_codec("jpeg", quality=33).encode(images, None)
        assert said == pytest.approx(images.pixels.numel() / files.data.numel())


def test_records_without_volume_or_exemplars(world):
    addon, _ = compose(world)
    for task in tasks(world):
        addon.prepare_memory(task, lambda units, nbytes: 0)
    quality, rate, table = addon.records()
    assert quality.payload["y"]["quality"] == [90] * 3
    assert rate.payload["x"] == []
    assert [row[1:] for row in table.payload["rows"]] == [[0, "no volume"]] * 5
    assert compose(world)[0].records()[0].payload["x"] == []


def test_state_holds_every_choice(world):
    addon, _ = compose(world)
    for task in tasks(world):
        addon.prepare_memory(task, lambda units, nbytes: 5)
    twin, _ = compose(world)
    twin.restore(addon.structure())
    twin.load_tensors({name: value.clone() for name, value in addon.tensors().items()})
    assert twin.codec_options() == addon.codec_options()
    assert twin.records() == addon.records()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quality": 0}, "quality is 0"),
        ({"grid": ()}, "grid is "),
        ({"grid": (10, 10)}, "each once"),
        ({"grid": (10, 101)}, "grid is 101"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"floor": math.nan}, "floor is nan"),
        ({"bits_per_pixel": -1.0}, "bits_per_pixel is -1.0"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(FastcilError, match=says):
        MRDC.Config(**options)


def test_what_it_can_not_be_composed_with(world):
    class Forgetful(world.Mine):
        keeps = "nothing"

    with pytest.raises(CompositionError, match="addon 'mrdc' compresses exemplars"):
        MRDC(MRDC.Config(), Context(), Forgetful(world.Mine.Config(), Context()))
    with pytest.raises(CompositionError, match="each stores exemplars its own way"):
        Learner("er+mrdc+cam", backbone=ConvNet, **OPTIONS).learn(shelf(0))
    with pytest.raises(CompositionError, match="codec is 'raw', but 'mrdc'"):
        Learner("er+mrdc", codec="raw")


def shelf(seed):
    examples = pictures([0] * 8 + [1] * 8, seed)
    images = [examples.images.image(k).numpy() for k in range(16)]
    return {f"{seed}a": images[:8], f"{seed}b": images[8:]}


@pytest.mark.parametrize("method", ["icarl+mrdc", "darkpp+mrdc", "foster+mrdc"])
def test_a_learner_keeps_files_and_goes_on_where_it_was_saved(method, tmp_path, world):
    learner = Learner(method, memory="20000B", backbone=ConvNet, **OPTIONS)
    learner.learn(shelf(0))
    assert learner.memory.codec.name == "jpeg" and "working_bytes" not in learner.nbytes()
    held = learner.memory.examples()
    assert learner.nbytes()["working_bytes"] == held.images.nbytes
    assert learner.nbytes()["budgeted"] <= 20000
    learner.save(tmp_path / "saved")
    twin = Learner.load(tmp_path / "saved", backbone=ConvNet)
    assert twin.memory.codec.quality == learner.memory.codec.quality
    for one in (learner, twin):
        one.learn(shelf(1))
    assert twin.memory.checksum() == learner.memory.checksum()
    (addon,) = learner.parts.addons
    assert learner.memory.codec.quality == int(addon.chosen[-1]) and len(addon.chosen) == 2


def test_selection_looks_at_compressed_copies_and_training_at_originals(monkeypatch):
    learner = Learner("icarl+mrdc", "20000B", backbone=ConvNet, **OPTIONS, **{"mrdc.quality": 5})
    learner.learn(shelf(0))
    held = learner.memory.examples()
    originals = pictures([0] * 8 + [1] * 8, 0)
    kept = make_codec("jpeg", quality=5)
    for label in (0, 1):
        mine = originals.select(originals.labels == label)
        seen = Examples(kept.decode(kept.encode(mine.images, None)), mine.labels)
        with evaluating(learner.method):
            features = learner.parts.context.scan(learner.method.embed, seen)
        count = int((held.labels == label).sum())
        wanted = seen.select(herding(features, count))
        assert torch.equal(held.select(held.labels == label).images.pixels, wanted.images.pixels)


@pytest.mark.parametrize(
    ("method", "codec"), [("icarl", "jpeg"), ("er+mrdc", None)], ids=["bare codec", "addon"]
)
def test_a_run_and_its_report(method, codec, tmp_path):
    examples = pictures([c for c in range(4) for _ in range(8)], 3)
    images = [examples.images.image(k).numpy() for k in range(32)]
    data = (images, examples.labels.tolist()), (images[::4], examples.labels[::4].tolist())
    result = train(
        method, data, "lfs-2", "16000B", codec, run_dir=tmp_path, backbone=ConvNet, **OPTIONS
    )
    last = result.outcomes[0].tasks[-1]
    assert last.nbytes["exemplars"] == last.nbytes["budgeted"] <= 16000
    assert last.nbytes["working_bytes"] > last.nbytes["exemplars"]
    assert result.learner.memory.codec.name == "jpeg"
    if codec:
        assert result.learner.memory.codec.quality == 75
        return
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "exemplars decoded for training" in page
    assert "Choice of quality in the last task" in page and "Volume ratio" in page
