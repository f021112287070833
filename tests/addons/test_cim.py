"""CIM composes with methods it has never heard of, and its state survives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcil.addons.cim import CIM
from fastcil.contract import Recipe, lookup
from fastcil.errors import CompositionError
from fastcil.nn import LinearHead, Network


def compose(world, method=None, **options):
    context = world.FakeContext()
    method = method or world.Mine(world.Mine.Config(), context)
    return method, CIM(CIM.Config(**{"refresh": 1, **options}), context, method), context


def run_task(world, method, addon, context, task):
    world.Loop(method, context).run(world.begin(method, addon, task))
    boxes = addon.marks(task.examples)
    method.end_task(task)
    addon.end_task(task)
    method.release()
    return boxes


def test_a_users_method_composes_over_tasks(world):
    method, addon, context = compose(world)
    for index in range(3):
        task = world.make_task(index)
        before = [p.detach().clone() for p in addon.phi.parameters()]
        boxes = run_task(world, method, addon, context, task)
        sizes = task.examples.images.sizes
        assert boxes.dtype == torch.int16 and boxes.shape == (len(sizes), 4)
        assert ((boxes[:, :2] >= 0) & (boxes[:, :2] < boxes[:, 2:])).all()
        assert (boxes[:, 2:] <= sizes).all()
        after = list(addon.phi.parameters())
        assert len(after) == 4
        assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=False))
    titles = [record.title for record in addon.records()]
    assert titles == [
        "Compression",
        "Activation maps: the image, CAM, CIM",
        "Learned activations",
        "Distance of the learned activations from ReLU",
        "Distance from ReLU by block and task",
    ]


@pytest.mark.parametrize(("name", "recipes"), [
    ("icarl", {}),
    ("der", {"representation": Recipe(epochs=2, lr=0.05, warmup=1)}),
    ("foster", {"boosting": Recipe(epochs=2, lr=0.05), "compression": Recipe(epochs=1, lr=0.05)}),
])  # fmt: skip
def test_fastcils_methods_compose(world, name, recipes):
    cls = lookup("method", name)

    class Single(world.Backbone):
        def __init__(self):
            super().__init__()
            self.float()

    context = world.FakeContext(Single)
    context.read = lambda examples: type(context).read(context, examples).float()
    context.scan = lambda function, examples, **_: function(context.images(examples))
    short = Recipe(epochs=2, lr=0.05)
    fields = {f: short for f in ("first", "later", "classifier") if hasattr(cls.Config(), f)}
    method = cls(cls.Config(**fields, **recipes), context)
    addon = CIM(CIM.Config(refresh=1), context, method)
    for index in range(3):
        task = world.make_task(index)
        boxes = run_task(world, method, addon, context, task)
        assert len(boxes) == len(task.examples)
    assert len(addon.phi) == len(method.network.extractors)
    assert all(p.isfinite().all() for p in addon.phi.parameters())


def test_the_branch_shares_the_living_weights(world):
    method, addon, _ = compose(world)
    world.begin(method, addon, world.make_task())
    first = addon._branch()
    assert addon._branch() is first
    assert not first.training
    method.network.head.grow(7)
    second = addon._branch()
    assert second is not first
    method.network = Network([world.Backbone()], LinearHead(5, 3).double())
    for branch, network in ((second, None), (addon._branch(), method.network)):
        shared = {id(t) for t in (*branch.parameters(), *branch.buffers())}
        assert {id(p) for p in addon.phi.parameters()} <= shared
        if network is not None:
            assert {id(t) for t in (*network.parameters(), *network.buffers())} <= shared


def test_boxes_of_the_branch_are_equations_1_and_2_over_all_extractors(world):
    method, addon, context = compose(world)
    task = world.make_task()
    world.begin(method, addon, task)
    method.network = Network(
        [world.Backbone(), world.Backbone()], LinearHead(10, task.total).double()
    )
    boxes = addon.marks(task.examples)
    assert len(addon.phi) == 2
    method.eval()
    with torch.no_grad():
        images = context.images(task.examples)
        parts = []
        for extractor, (first, second) in zip(method.network.extractors, addon.phi, strict=True):
            parts.append(second(extractor.conv2(first(extractor.norm(extractor.conv1(images))))))
        weights = method.network.head.weight[task.examples.labels]
        activation = torch.einsum("bchw,bc->bhw", torch.cat(parts, 1), weights)
    for box, a, (height, width) in zip(
        boxes.tolist(), activation, task.examples.images.sizes.tolist(), strict=True
    ):
        mask = ((a - a.min()) / (a.max() - a.min()))[None, None]
        large = F.interpolate(mask, (height, width), mode="bilinear")[0, 0]
        rows, columns = (large > 0.6).nonzero().unbind(1)
        assert box == [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]


# What phi is before, how many extractors the network has then, one after the other -> phi.
CARRIED = [
    ([1.0], [1], [1.0]),
    ([1.0], [2], [1.0, 1.0]),
    ([1.0, 2.0], [3], [1.0, 2.0, 2.0]),
    ([1.0, 2.0], [1], [2.0]),
    ([1.0, 2.0], [1, 2], [2.0, 2.0]),
    ([1.0, 2.0], [2], [1.0, 2.0]),
]


@pytest.mark.parametrize(("before", "counts", "after"), CARRIED)
def test_curves_are_carried_over(world, before, counts, after):
    method, addon, _ = compose(world)

    def network(extractors):
        backbones = [world.Backbone() for _ in range(extractors)]
        method.network = Network(backbones, LinearHead(5 * extractors, 2))
        return method.network

    addon._fit(network(len(before)))
    with torch.no_grad():
        for curves, value in zip(addon.phi, before, strict=True):
            for parameter in curves.parameters():
                parameter.fill_(value)
    newest = addon.phi[-1][0]
    for count in counts:
        addon._fit(network(count))
    assert [float(curves[0].numerator[0].detach()) for curves in addon.phi] == after
    assert any(curves[0] is newest for curves in addon.phi)
    learned = [all(p.requires_grad for p in curves.parameters()) for curves in addon.phi]
    assert learned == [False] * (len(after) - 1) + [True]
    assert addon._learned() == list(addon.phi[-1].parameters())


def test_an_extractor_of_another_build_gets_curves_of_its_own(world):
    method, addon, _ = compose(world)
    world.begin(method, addon, world.make_task())
    slim = nn.Sequential(nn.Conv2d(3, 5, 3, stride=4), nn.ReLU()).double()
    slim.out_channels = 5
    for extractors in ([world.Backbone(), slim], [slim], [world.Backbone()]):
        method.network = Network(extractors, LinearHead(5 * len(extractors), 2).double())
        assert addon._branch()(torch.zeros(2, 3, 16, 16).double()).shape == (2, 2)
        assert [len(curves) for curves in addon.phi] == [1 if e is slim else 2 for e in extractors]


def test_the_first_curves_are_relu(world):
    method, addon, _ = compose(world)
    world.begin(method, addon, world.make_task())
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    for curve in addon.phi[0]:
        assert (curve(x) - x.relu()).abs().max() < 0.031


def test_a_task_resumed_in_the_middle_ends_the_same(world):
    def trained(resumed):
        method, addon, context = compose(world)
        run_task(world, method, addon, context, world.make_task(0))
        task = world.make_task(1)
        world.Loop(method, context).run(world.begin(method, addon, task), until=2)
        if resumed:
            saved = [(part.structure(), part.tensors()) for part in (method, addon)]
            saved = [(s, {k: v.clone() for k, v in t.items()}) for s, t in saved]
            method, addon, context = compose(world)
            for part, (structure, tensors) in zip((method, addon), saved, strict=True):
                part.restore(structure)
                # What is made anew is float32, unlike this small world.
                (method if part is method else addon.phi).double()
                part.load_tensors(tensors)
        stages = addon.stages(task, method.stages(task))
        assert float(stages[0].streams[0].views.probability) == 0.1
        world.Loop(method, context).run(stages, seed=5)
        boxes = addon.marks(task.examples)
        return boxes, {**method.tensors(), **{f"addon {k}": v for k, v in addon.tensors().items()}}

    boxes, tensors = trained(resumed=False)
    again, restored = trained(resumed=True)
    assert torch.equal(boxes, again)
    assert tensors.keys() == restored.keys()
    for name, value in tensors.items():
        assert torch.equal(value, restored[name]), name


def test_state_is_curves_and_boxes_only(world):
    method, addon, context = compose(world)
    run_task(world, method, addon, context, world.make_task())
    assert addon.structure() == {"curves": [2]}
    assert set(addon.tensors()) == {
        "compression.boxes",
        "compression.chance",
        "compression.footprints",
        "regions.seed",
        "regions.thresholds",
        "distances",
        *(f"phi.0.{i}.{part}" for i in range(2) for part in ("numerator", "denominator")),
    }
    assert addon._held == ()
    assert addon.tensors()["compression.boxes"].numel() == 0


class Functional(nn.Module):
    out_channels = 5

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, images):
        return F.relu(self.conv(images))


def test_a_backbone_without_relu_modules_is_refused(world):
    context = world.FakeContext(Functional)
    method = world.Mine(world.Mine.Config(), context)
    with pytest.raises(CompositionError, match="Functional has none"):
        CIM(CIM.Config(), context, method)


def test_a_users_own_extractor_without_relu_modules_is_refused_when_it_comes(world):
    class Odd(world.Mine):
        def begin_task(self, task):
            self.network = Network([Functional()], LinearHead(5, task.total))

    method, addon, _ = compose(world, Odd(world.Mine.Config(), world.FakeContext()))
    with pytest.raises(CompositionError, match="Functional has none"):
        world.begin(method, addon, world.make_task())


def test_a_network_of_another_kind_is_refused(world):
    class Odd(world.Mine):
        def begin_task(self, task):
            self.network = nn.Sequential(world.Backbone())

    method, addon, _ = compose(world, Odd(world.Mine.Config(), world.FakeContext()))
    with pytest.raises(CompositionError, match="no extractors and no maps and no head"):
        world.begin(method, addon, world.make_task())


def test_a_method_without_exemplars_is_refused(world):
    class Hoarder(world.Mine):
        keeps = "everything"

    with pytest.raises(CompositionError, match="Hoarder keeps everything"):
        compose(world, Hoarder(world.Mine.Config(), world.FakeContext()))


def test_a_method_without_a_primary_stage_is_refused(world):
    class Shy(world.Mine):
        def stages(self, task):
            stages = super().stages(task)
            stages[0].primary = False
            return stages

    method, addon, _ = compose(world, Shy(world.Mine.Config(), world.FakeContext()))
    with pytest.raises(CompositionError, match="Shy marks none"):
        world.begin(method, addon, world.make_task())
