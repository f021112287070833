"""CAM-based compression composes with a method it has never heard of."""

from __future__ import annotations

import pytest
import torch

from fastcil.addons.cam import CAM
from fastcil.errors import CompositionError


def compose(world, config=None, method=None):
    context = world.FakeContext()
    method = method or world.Mine(world.Mine.Config(), context)
    return method, CAM(config or CAM.Config(refresh=1), context, method), context


def test_boxes_follow_the_methods_own_network(world):
    method, addon, context = compose(world)
    task = world.make_task()
    world.begin(method, addon, task)
    method.train()
    boxes = addon.marks(task.examples)
    assert all(part.training for part in method.modules())
    with torch.no_grad():
        method.eval()
        maps = method.network.maps(context.images(task.examples))
    activation = torch.einsum(
        "bchw,bc->bhw", maps, method.network.head.weight[task.examples.labels]
    )
    for box, a, (height, width) in zip(
        boxes.tolist(), activation, task.examples.images.sizes.tolist(), strict=True
    ):
        if a.max() == a.min():
            assert box == [0, 0, height, width]
            continue
        mask = ((a - a.min()) / (a.max() - a.min()))[None, None]
        large = torch.nn.functional.interpolate(mask, (height, width), mode="bilinear")[0, 0]
        rows, columns = (large > 0.6).nonzero().unbind(1)
        assert box == [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]


def test_boxes_use_running_statistics_and_leave_them(world):
    method, addon, _ = compose(world)
    task = world.make_task()
    world.begin(method, addon, task)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    both = addon.marks(task.examples)
    halves = [addon.marks(task.examples.select(part)) for part in ([0, 1, 2], [3, 4, 5, 6, 7])]
    assert torch.equal(both, torch.cat(halves))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_a_state_saved_within_an_epoch_gives_the_same_views(world):
    method, addon, context = compose(world)
    task = world.make_task()
    stages = world.begin(method, addon, task)
    world.Loop(method, context).run(stages, until=3)
    views = stages[0].streams[0].views
    assert views.probability == 0.2

    structure, tensors = addon.structure(), {k: v.clone() for k, v in addon.tensors().items()}
    assert structure == {}
    assert all("weight" not in name for name in tensors)
    again, resumed, other = compose(world)
    again.restore(method.structure())
    again.load_tensors(method.tensors())
    resumed.restore(structure)
    resumed.load_tensors(tensors)
    new = resumed.stages(task, again.stages(task))[0].streams[0].views
    assert (new.probability, new.ratio) == (views.probability, views.ratio)
    assert torch.equal(new.boxes, views.boxes)
    assert other.scans == 0


def test_codec_and_records(world):
    method, addon, _ = compose(world, CAM.Config(ratio=9.0))
    assert CAM.brings_codec == "bbox"
    assert addon.codec_options() == {"ratio": 9.0, "foreground_ratio": 1.0}
    task = world.make_task()
    world.begin(method, addon, task)
    addon.marks(task.examples)
    (record,) = addon.records()
    assert record.payload["x"] == [0]


def test_a_method_without_exemplars_is_refused(world):
    class Forgetful(world.Mine):
        keeps = "nothing"

    with pytest.raises(CompositionError, match="Forgetful keeps nothing"):
        compose(world, method=Forgetful(world.Mine.Config(), world.FakeContext()))


def test_a_network_without_maps_is_refused(world):
    class Odd(world.Mine):
        def begin_task(self, task):
            self.network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, task.total))

    method, addon, _ = compose(world, method=Odd(world.Mine.Config(), world.FakeContext()))
    with pytest.raises(CompositionError, match="Sequential that Odd shows it has no maps and no"):
        world.begin(method, addon, world.make_task())
