"""What every method promises, over a table of methods."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastcil.contract import Batch, Method, Stage, Task, evaluating, lookup, total

HELD = ("ewc", "online-ewc", "mas", "osla", "si")
NAMES = (
    "finetune",
    "joint",
    "er",
    "mer",
    "gem",
    "a-gem",
    "lwf",
    "ebm",
    "eec",
    *HELD,
    "dlcft",
    "dark",
    "darkpp",
    "icarl",
    "eeil",
    "lecnet",
    "wa",
    "podnet",
    "lucir",
    "ncm",
    "topic",
    "der",
    "foster",
)
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in NAMES),
    ("joint", {"fresh": False}),
    ("gem", {"memory_norms": "keep", "memory_batch": 3}),
    ("a-gem", {"memory_norms": "keep", "memory_batch": 5}),
    ("mer", {"algorithm": "alg6", "batches": 1, "inner_batch": 1, "head": "task"}),
    ("lwf", {"head": "task", "teacher": "recorded"}),
    ("ebm", {"replay": True, "negatives": "batch"}),
    ("ebm", {"head": "task", "negatives": "all", "width": 9, "replay": True}),
    ("eec", {"replay": "paired", "content": 0.0, "width": 4}),
    ("eec", {"decoders": 0.0, "decay": "none", "codes": "float32", "width": 4}),
    ("ewc", {"head": "task"}),
    ("osla", {"curvature": "ekfac"}),
    ("dlcft", {"linear": False, "loss": "softmax"}),
    ("dlcft", {"classifier": "static", "curvature": "kfac"}),
    ("icarl", {"loss": "softmax"}),
    ("icarl", {"form": "online"}),
    ("icarl", {"form": "few-shot", "trains": "last-block", "normalised": True}),
    ("eeil", {"finetuning_teacher": "trained"}),
    ("eeil", {"form": "few-shot", "trains": "last-block"}),
    ("topic", {"trains": "all", "old_rows": "trained", "min_weight": 0.0, "anchor_weight": 1.0}),
    ("lecnet", {"expansion": "none"}),
    ("lecnet", {"expansion": "ne", "fuse": "concat", "trains": "expansion"}),
    ("lecnet", {"expansion": "nc", "fuse": "concat", "normalised": True}),
    ("lecnet", {"layer": "conv3x3", "removal": "mean", "trains": "last-block", "analyse": True}),
    ("wa", {"scale": "logits"}),
    ("wa", {"bias": True, "clamp": False}),
    ("der", {"head": "copied"}),
    ("foster", {"bias": False}),
    ("podnet", {"nca": "margin"}),
    ("lucir", {"transfer": True, "finetune": True}),
    ("lucir", {"distillation": "logits"}),
)
IDS = [name + "".join(f"-{v}" for v in options.values()) for name, options in VARIANTS]


def make(lab: SimpleNamespace, name: str, options: dict[str, Any], **recipe: Any) -> Method:
    cls: Any = lookup("method", name)
    torch.manual_seed(0)
    # A neural gas takes hundreds of steps for every node, and MER one for every image.
    options = {**{"topic": {"nodes": 8}, "mer": {"batches": 3}}.get(name, {}), **options}
    method: Method = cls(lab.shorten(cls.Config(**options), **recipe), lab.context)
    return method


def some_batch(lab: SimpleNamespace, stage: Stage, size: int = 10) -> Batch:
    """Images from all over the streams of a stage."""
    batches = []
    for stream in stage.streams:
        pool = stream.pool()
        batches.append(lab.batch_of(stream, pool[:: max(1, len(pool) // size)]))
    return Batch.cat(batches)


def moments(lab: SimpleNamespace, method: Method, tasks: list[Task]) -> Any:
    """Yields (task, stage) in the middle of every stage of every task."""
    for task in tasks:
        torch.manual_seed(100 + task.index)
        method.begin_task(task)
        for number in range(len(method.stages(task))):
            stage = method.stages(task)[number]
            lab.Loop().begin(stage)
            yield task, stage
        method.end_task(lab.after(task))
        method.release()


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_learns_uneven_tasks(lab, name, options):
    rate = {"icarl": 0.05 if options else 2.0, "dlcft": 0.002, "eeil": 0.02}.get(name, 0.05)
    method = make(lab, name, options, epochs=6, lr=rate)
    known = 0
    for task in lab.make_tasks():
        loop = lab.learn(method, task)
        known += len(task.classes)
        for losses in loop.losses.values():
            third = max(1, len(losses) // 3)
            first, last = sum(losses[:third]), sum(losses[-third:])
            # Where a task has nothing more to teach, noise is all that is left.
            assert last < first or last < 0.02 * third
        test = lab.make_examples(task.classes, seed=77)
        with evaluating(method), torch.no_grad():
            for readout in method.readouts().values():
                scores = readout(lab.read(test, range(len(test))))
                assert scores.shape == (len(test), known)
                assert not scores.isnan().any()
            assert method(lab.read(test, [0])).shape == (1, known)
        method.release()
        assert list(method.readouts())


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_stages_are_described_for_addons(lab, name, options):
    method = make(lab, name, options)
    for task, stage in moments(lab, method, lab.make_tasks()):
        assert stage.method is method
        images = lab.read(task.examples, range(4))
        if stage.primary:
            with evaluating(method), torch.no_grad():
                assert torch.equal(stage.logits(images), method.logits(images))
                assert method.network.cam_weights(task.examples.labels[:4]).shape == (
                    4,
                    method.network.maps(images).shape[1],
                )
        assert stage.streams[0].parts[0] is task.examples
        assert all(stream.parts[0] is task.examples for stream in stage.streams)
        assert len(stage.streams[0]) > 0
    assert [s.primary for s in method.stages(task)].count(True) == 1


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_loss_is_a_pure_function_of_parameters(lab, name, options):
    method = make(lab, name, options)
    for _, stage in moments(lab, method, lab.make_tasks()):
        method.eval()
        batch = some_batch(lab, stage)
        generator = torch.Generator().manual_seed(3)
        moved = {
            key: p + 0.1 * torch.randn(p.shape, generator=generator)
            for key, p in method.named_parameters()
            if p.requires_grad
        }
        before = {key: value.clone() for key, value in method.state_dict().items()}
        by_argument = stage.loss(batch, moved)
        assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
        own = stage.loss(batch)
        with torch.no_grad():
            for key, value in moved.items():
                method.get_parameter(key).copy_(value)
        assigned = stage.loss(batch)
        assert by_argument.keys() == assigned.keys()
        for key, value in assigned.items():
            assert value.ndim == 0
            torch.testing.assert_close(by_argument[key], value, rtol=0, atol=0)
        assert not torch.equal(total(own), total(assigned))
        with torch.no_grad():
            for key, value in before.items():
                if key in dict(method.named_parameters()):
                    method.get_parameter(key).copy_(value)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_gradient_goes_through_replaced_parameters_and_images(lab, name, options):
    """A bilevel step differentiates the updated parameters with respect to the images."""
    method, checked = make(lab, name, options), 0
    for _, stage in moments(lab, method, lab.make_tasks()):
        if not stage.primary:
            continue
        method.eval()
        with torch.no_grad():  # A classifier of zeros hides its features.
            for p in method.network.head.parameters():
                p.normal_()
        batch = some_batch(lab, stage, size=6)
        mask = torch.ones(1, requires_grad=True)
        inner = Batch(batch.images * mask, batch.labels, batch.part, batch.index)
        theta = {
            key: p
            for key, p in method.named_parameters()
            if p.requires_grad and key.startswith("network.extractors")
        }
        gradients = torch.autograd.grad(
            total(stage.loss(inner, theta)), list(theta.values()), create_graph=True
        )
        if not any(g.any() for g in gradients):
            continue  # a single class in a head of its own
        checked += 1
        stepped = {key: p - 0.1 * g for (key, p), g in zip(theta.items(), gradients, strict=True)}
        outer = stage.call(stage.logits, batch.images, parameters=stepped).square().sum()
        (slope,) = torch.autograd.grad(outer, mask)
        assert slope.isfinite().all() and slope.abs() > 0
    assert checked >= 2


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_restored_in_the_middle_of_every_stage(lab, name, options):
    method = make(lab, name, options)
    for task, stage in moments(lab, method, lab.make_tasks()):
        saved = json.loads(json.dumps(method.structure()))
        tensors = {key: value.clone() for key, value in method.tensors().items()}
        twin = make(lab, name, options)
        twin.restore(saved)
        twin.load_tensors(tensors)
        again = next(s for s in twin.stages(task) if s.name == stage.name)
        # As the trainer goes on: no begin.
        twin.train()
        twin.requires_grad_(False)
        for parameter in again.parameters():
            parameter.requires_grad_(True)
        method.train()
        assert twin.tensors().keys() == tensors.keys()
        assert [k for k, p in twin.named_parameters() if p.requires_grad] == [
            k for k, p in method.named_parameters() if p.requires_grad
        ]
        assert {k: m.training for k, m in twin.named_modules()} == {
            k: m.training for k, m in method.named_modules()
        }
        batch = some_batch(lab, stage)
        for ours, theirs in zip(stage.streams, again.streams, strict=True):
            assert ours.batch_size == theirs.batch_size
            assert callable(ours.subset) == callable(theirs.subset)
            assert torch.equal(ours.pool(), theirs.pool())
        expected, found = stage.loss(batch), again.loss(batch)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        with evaluating(method), evaluating(twin), torch.no_grad():
            assert torch.equal(method.logits(batch.images), twin.logits(batch.images))
            assert torch.equal(method.embed(batch.images), twin.embed(batch.images))
            assert list(method.readouts()) == list(twin.readouts())
        # And once more into a method that has been somewhere else.
        twin.restore(saved)
        twin.load_tensors(tensors)
        assert all(torch.equal(v, tensors[k]) for k, v in twin.tensors().items())


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_stages_change_nothing(lab, name, options):
    method = make(lab, name, options)
    for task in lab.make_tasks():
        method.begin_task(task)
        before = copy.deepcopy(method.state_dict())
        structure, state = method.structure(), torch.get_rng_state()
        method.stages(task)
        assert method.structure() == structure
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
        for stage in method.stages(task):
            lab.Loop().begin(stage)
        method.end_task(lab.after(task))
        method.release()


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits(lab, name):
    twins = [make(lab, name, {}, epochs=2) for _ in range(2)]
    for task in lab.make_tasks((2, 1)):
        for method in twins:
            lab.learn(method, task)
            method.release()
    first, second = (method.state_dict() for method in twins)
    assert all(torch.equal(second[key], value) for key, value in first.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_task_of_known_classes_only(lab, name):
    """A data-incremental task brings no new class."""
    method = make(lab, name, {}, epochs=1)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    method.release()
    again = Task(
        index=1, classes=(0, 1, 2), known=3, examples=first.examples, exemplars=second.exemplars
    )
    loop = lab.learn(method, again)
    assert all(torch.tensor(values).isfinite().all() for values in loop.losses.values())
    assert method.network.head.classes == 3


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_memory(lab, name):
    """A later task without a single exemplar still trains."""
    method = make(lab, name, {}, epochs=1)
    first, second = lab.make_tasks((3, 2), kept=0)
    lab.learn(method, first)
    method.release()
    loop = lab.learn(method, second)
    assert all(torch.tensor(values).isfinite().all() for values in loop.losses.values())
    with evaluating(method), torch.no_grad():
        scores = next(iter(method.readouts().values()))(lab.read(second.examples, range(2)))
    assert scores.shape == (2, 5)


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_configs(name):
    cls: Any = lookup("method", name)
    for preset in getattr(cls, "PRESETS", {}).values():
        assert isinstance(preset, cls.Config)
        assert preset != cls.Config()


def test_declarations():
    table = {name: lookup("method", name) for name in NAMES}
    assert {n: c.keeps for n, c in table.items() if c.keeps != "exemplars"} == {
        "finetune": "nothing",
        "lwf": "nothing",
        "ebm": "nothing",
        "eec": "nothing",
        "lecnet": "nothing",
        **dict.fromkeys(HELD, "nothing"),
        "joint": "everything",
    }
    assert {n: c.selection for n, c in table.items() if c.selection != "herding"} == {
        "er": "random",
        "gem": "random",
        "a-gem": "random",
        "dlcft": "random",
        "ebm": "random",
        "mer": "own",
        "dark": "own",
        "darkpp": "own",
        "topic": "own",
    }
    assert [n for n, c in table.items() if c.auto_augment] == ["foster"]
