"""Which part of an image stays sharp, and how a threshold is chosen on images held out."""

from __future__ import annotations

import pytest
import torch

from fastcil.addons.cam import CAM
from fastcil.addons.cim import CIM
from fastcil.addons.compression import BoxConfig
from fastcil.addons.regions import Regions, centre_boxes, random_boxes
from fastcil.contract import Stage, Stream
from fastcil.memory import make_codec
from fastcil.memory.boxes import box_shares

SIZES = torch.tensor([[1, 1], [7, 9], [64, 48], [225, 300], [500, 375]])


def test_the_centre_is_a_quarter_in_the_middle():
    boxes = centre_boxes(SIZES).long()
    for (y0, x0, y1, x1), (height, width) in zip(boxes.tolist(), SIZES.tolist(), strict=True):
        assert (y1 - y0, x1 - x0) == (height // 2, width // 2)
        assert abs(y0 - (height - y1)) <= 1 and abs(x0 - (width - x1)) <= 1
    assert box_shares(boxes, SIZES)[2:].tolist() == pytest.approx([0.25] * 3, abs=2e-3)


def test_random_regions_lie_anywhere_and_are_a_quarter_on_average():
    sizes = torch.tensor([[120, 90]]).expand(4000, 2)
    boxes = random_boxes(sizes, torch.Generator().manual_seed(1)).long()
    begin, end = boxes[:, :2], boxes[:, 2:]
    assert (begin >= 0).all() and (begin < end).all() and (end <= sizes).all()
    shares = box_shares(boxes, sizes)
    assert float(shares.mean()) == pytest.approx(0.25, abs=0.01)
    assert float(shares.var()) == pytest.approx(0.25 / 12, rel=0.05), "uniform on [0, 1/2]"
    assert float(shares.max()) <= 0.51
    place = (begin / (sizes - (end - begin)))[shares < 0.4]
    assert place.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    again = random_boxes(sizes, torch.Generator().manual_seed(1))
    assert torch.equal(boxes, again.long())


def test_the_smallest_images_have_a_region_too():
    boxes = random_boxes(torch.ones(50, 2, dtype=torch.int64), torch.Generator())
    assert boxes.tolist() == [[0, 0, 1, 1]] * 50


def test_draws_follow_the_seed_that_the_engine_sets_for_the_task(world):
    examples = world.make_examples([0, 1] * 8, 0)

    def boxes(*seeds):
        regions = Regions(BoxConfig(), "random")
        for seed in seeds:
            torch.manual_seed(seed)
            regions.begin_task()
        torch.rand(5)
        return regions.locate(examples, None, None, None)

    assert torch.equal(boxes(1, 7), boxes(3, 7))
    assert not torch.equal(boxes(7), boxes(8))


def begun(**options):
    regions = Regions(BoxConfig(threshold="held-out", **options), "cam")
    torch.manual_seed(4)
    regions.begin_task()
    return regions


@pytest.mark.parametrize(("count", "held"), [(1, 1), (9, 1), (10, 1), (25, 2), (200, 20)])
def test_a_tenth_is_held_out(count, held):
    positions = begun().held(count)
    assert len(positions) == held == len(set(positions.tolist()))
    assert int(positions.min()) >= 0 and int(positions.max()) < count
    assert torch.equal(positions, begun().held(count))


def test_no_stage_reads_what_is_held_out(world):
    task = world.make_task(1, per_class=10)
    new, old = len(task.examples), len(task.exemplars)
    chosen = torch.tensor([0, 3, 5, new, new + 1])
    streams = (
        Stream((task.examples, task.exemplars), 4),
        Stream((task.examples,), 4, subset=chosen[:3]),
        Stream((task.examples, task.exemplars), 4, subset=lambda: chosen),
        Stream((task.exemplars,), 4),
        Stream((task.exemplars, task.examples), 4),
    )
    recipe = world.Mine.Config().recipe

    def stage(*streams):
        return Stage("s", torch.nn.Module(), dict, streams, recipe, list)

    main = stage(*streams)
    main.companions.append(stage(streams[0]))
    regions = begun()
    regions.hold_out(task, [main])
    held = set(regions.held(new).tolist())
    assert len(held) == 2
    pools = [set(s.pool().tolist()) for s in (*main.streams, *main.companions[0].streams)]
    everything = set(range(new + old))
    assert pools[0] == pools[5] == everything - held
    assert pools[1] == {0, 3, 5} - held
    assert pools[2] == set(chosen.tolist()) - held
    # Streams that don't begin with the new images are others' business.
    assert len(pools[3]) == old and pools[4] == everything
    untouched = stage(*streams)
    Regions(BoxConfig(), "cam").hold_out(task, [untouched])
    assert untouched.streams == streams


class Reader:
    """Recognises an image by its bright square, of which it must see enough."""

    def __init__(self, enough):
        self.enough = enough
        self.seen = []

    def scan(self, function, examples):
        images = [examples.images.image(k) for k in range(len(examples))]
        self.seen.append(images)
        area = torch.tensor([int((image == 240).any(2).sum()) for image in images])
        scores = torch.zeros(len(images), 9)
        scores[torch.arange(len(images)), examples.labels] = torch.where(
            area >= self.enough, 1.0, -1.0
        )
        return scores


def shrinking(examples, threshold):
    """Boxes around the square [4:12, 5:14], smaller the higher the threshold."""
    cut = round(10 * threshold) - 2
    box = torch.tensor([4 + min(cut, 4), 5, 12, 14 - max(0, cut - 4)], dtype=torch.int16)
    return box.expand(len(examples), 4)


def recognised_by_hand(examples, held, thresholds, reader, tolerance, ratio):
    images = examples.select(held)

    def share(store):
        shown = [store.image(k) for k in range(len(store))]
        return sum(int((i == 240).any(2).sum()) >= reader.enough for i in shown) / len(shown)

    wanted = share(images.images) - tolerance
    good = [
        tau
        for tau in thresholds
        if share(images.images.compress(shrinking(images, tau), ratio)) >= wanted
    ]
    return max(good, default=min(thresholds))


@pytest.mark.parametrize("enough", [1, 40, 50, 60, 66, 70, 72])
@pytest.mark.parametrize("ratio", [4.0, 400.0])
def test_the_threshold_is_the_highest_that_the_images_held_out_bear(world, enough, ratio):
    examples = world.make_examples([0, 1, 2] * 10, 0, sides=(40, 44))
    thresholds = (0.2, 0.3, 0.5, 0.8)
    regions = begun(thresholds=thresholds, ratio=ratio)
    reader = Reader(enough)
    method = torch.nn.Module()
    method.logits = None
    boxes = regions.locate(examples, shrinking, method, reader)
    expected = recognised_by_hand(
        examples, regions.held(30), thresholds, reader, regions.config.tolerance, ratio
    )
    assert float(regions.thresholds[-1]) == regions.threshold == expected
    assert torch.equal(boxes, shrinking(examples, expected))
    assert all(len(images) == 3 for images in reader.seen)
    (record,) = regions.records()
    assert record.payload["y"] == {"tau": [expected]}


def test_different_demands_lead_to_different_thresholds(world):
    examples = world.make_examples([0, 1, 2] * 10, 0, sides=(40, 44))
    chosen = set()
    for enough in (1, 40, 60, 72):
        regions = begun(thresholds=(0.2, 0.3, 0.5, 0.8), ratio=400.0)
        method = torch.nn.Module()
        method.logits = None
        regions.locate(examples, shrinking, method, Reader(enough))
        chosen.add(regions.threshold)
    assert chosen == {0.8, 0.5, 0.3, 0.2}


def test_before_the_first_choice_the_lowest_threshold_holds():
    regions = begun(thresholds=(0.6, 0.3))
    assert regions.threshold == 0.3
    assert regions.records()[0].payload["y"] == {"tau": [None]}
    assert Regions(BoxConfig(), "cam").threshold == 0.6
    assert Regions(BoxConfig(), "cam").records() == []


@pytest.mark.parametrize("addon", [CAM, CIM])
@pytest.mark.parametrize("boxes", ["none", "centre", "random"])
def test_regions_that_ask_no_network_need_no_maps(world, addon, boxes):
    class Odd(world.Mine):
        def begin_task(self, task):
            layers = torch.nn.Flatten(), torch.nn.Linear(768, task.total)
            self.network = torch.nn.Sequential(*layers).double()

    context = world.FakeContext()
    method = Odd(Odd.Config(), context)
    made = addon(addon.Config(boxes=boxes, refresh=1), context, method)
    task = world.make_task()
    stages = world.begin(method, made, task)
    assert all(not stage.companions for stage in stages)
    stages[0].before_epoch[0](1)
    assert context.scans == 0
    assert len(made.marks(task.examples)) == len(task.examples)


def test_whole_images_are_offered_where_nothing_is_stored_compressed(world):
    context = world.FakeContext()
    method = world.Mine(world.Mine.Config(), context)
    addon = CAM(CAM.Config(store=False, refresh=1), context, method)
    task = world.make_task()
    stages = world.begin(method, addon, task)
    boxes = addon.marks(task.examples)
    assert boxes[:, 2:].tolist() == task.examples.images.sizes.tolist()
    assert stages[0].streams[0].views is not None
    kept = make_codec("bbox", **addon.codec_options()).encode(task.examples.images, boxes)
    assert kept.image_nbytes().tolist() == task.examples.images.image_nbytes().tolist()
    assert addon.records()[0].payload["y"]["mean share inside the box"] == [1.0]


@pytest.mark.parametrize(("ratio", "foreground"), [(4.0, 1.0), (4.0, 2.0), (9.0, 3.0)])
def test_the_rate_recorded_is_that_of_the_codec(world, ratio, foreground):
    context = world.FakeContext()
    method = world.Mine(world.Mine.Config(), context)
    config = CAM.Config(boxes="centre", ratio=ratio, foreground_ratio=foreground)
    addon = CAM(config, context, method)
    task = world.make_task()
    world.begin(method, addon, task)
    addon.marks(task.examples)
    rate = addon.records()[0].payload["y"]["mean memory per image (1 = uncompressed)"]
    assert rate == [pytest.approx(0.25 / foreground + 0.75 / ratio)]
