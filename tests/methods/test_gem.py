"""gem and a-gem: what their steps are made of, against quadprog and against each other."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastcil.contract import Batch, Task, total
from fastcil.errors import FastcilError
from fastcil.methods.a_gem import AGEM
from fastcil.methods.finetune import Finetune
from fastcil.methods.gem import GEM

qpsolvers = pytest.importorskip("qpsolvers")

BOTH = [GEM, AGEM]


@pytest.fixture
def float64():
    """Networks and images in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(lab, cls, **options):
    torch.manual_seed(0)
    return cls(lab.shorten(cls.Config(**options)), lab.context)


def at_the_last(lab, method, tasks):
    """All tasks but the last learned; the last one's stage, and a batch of each stream."""
    for task in tasks[:-1]:
        lab.learn(method, task)
    torch.manual_seed(50)
    method.begin_task(tasks[-1])
    (stage,) = method.stages(tasks[-1])
    lab.Loop().begin(stage)
    new, *memory = stage.streams
    batches = [lab.batch_of(new, torch.arange(0, len(new), 2))]
    return stage, batches + [lab.batch_of(s, s.pool()[: s.batch_size]) for s in memory]


class Recorder:
    """A stepper that keeps the gradient of what it is given, [P], and steps nothing."""

    def __init__(self, stage):
        self.parameters = list(stage.parameters())

    def update(self, loss):
        found = torch.autograd.grad(loss, self.parameters)
        self.gradient = torch.cat([g.flatten() for g in found])


def stepped(stage, batches):
    recorder = Recorder(stage)
    stage.step(batches, recorder)
    return recorder.gradient


def naive_gradients(stage, batches):
    """Of the loss on each batch, [n, P], the method staying as it is."""
    twin = copy.deepcopy(stage.method.network).train()
    found = []
    for batch in batches:
        logits, labels = twin(batch.images), batch.labels
        if stage.method.config.head == "task":
            ends = stage.method.outputs.brought.cumsum(0).tolist()
            terms = []
            for row, label in zip(logits, labels.tolist(), strict=True):
                last = next(end for end in ends if label < end)
                first = max([0, *[end for end in ends if end <= label]])
                terms.append(row[first:last].logsumexp(0) - row[label])
            loss = torch.stack(terms).mean()
        else:
            loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        found.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(found)


def opposing(batches, head, known):
    """Exemplars instead of new images, said to be another class of their task, or the last."""
    new, *memory = batches
    another = torch.tensor([1, 2, 0, 4, 5, 3, 7, 6])
    wrong = another if head == "task" else torch.full((8,), known - 1)
    labels = wrong[memory[0].labels]
    return [Batch(memory[0].images, labels, new.part[:1], new.index[:1]), *memory]


@pytest.mark.parametrize("head", ["all", "task"])
@pytest.mark.parametrize("margin, ridge", [(0.5, 1e-3), (0.0, 0.0)])
def test_gem_steps_by_the_quadratic_programme(lab, float64, head, margin, ridge):
    method = make(lab, GEM, head=head, margin=margin, ridge=ridge)
    stage, batches = at_the_last(lab, method, lab.make_tasks((3, 3, 2, 2)))
    batches = opposing(batches, head, known=8)
    g, *rows = naive_gradients(stage, batches)
    G = torch.stack(rows)
    assert len(G) == 3 and (G @ g).min() < 0
    P, q = (G @ G.T + ridge * torch.eye(3)).numpy(), (G @ g).numpy()
    v = qpsolvers.solve_qp(P, q, -np.eye(3), -np.full(3, margin), solver="quadprog")
    expected = g + G.T @ torch.from_numpy(v)
    torch.testing.assert_close(stepped(stage, batches), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("head", ["all", "task"])
def test_no_past_task_is_opposed(lab, float64, cls, head):
    options = {"margin": 0.0, "ridge": 0.0} if cls is GEM else {}
    method = make(lab, cls, head=head, **options)
    stage, batches = at_the_last(lab, method, lab.make_tasks((3, 3, 2, 2), per_class=8))
    batches = opposing(batches, head, known=8)
    g, *rows = naive_gradients(stage, batches)
    G = torch.stack(rows)
    assert (G @ g).min() < 0
    found = stepped(stage, batches)
    assert float((G @ found / (G.norm(dim=1) * g.norm())).min()) >= -1e-9
    assert float((found - g) @ found) == pytest.approx(0.0, abs=1e-9 * float(g @ g))


def test_a_gem_steps_as_gem_with_one_constraint(lab, float64):
    """With a single past task, no margin and no ridge."""
    found = []
    for cls, options in ((GEM, {"margin": 0.0, "ridge": 0.0}), (AGEM, {})):
        stage, batches = at_the_last(lab, make(lab, cls, **options), lab.make_tasks((3, 2)))
        batches = opposing(batches, "task", known=3)
        g, r = naive_gradients(stage, batches)
        assert g @ r < 0
        found.append(stepped(stage, batches))
        torch.testing.assert_close(found[-1], g - (g @ r) / (r @ r) * r, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cls", BOTH)
def test_small_steps_do_not_raise_the_past_loss(lab, float64, cls):
    """To first order; those of finetuning do."""
    raised = {}
    for learner in (cls, Finetune):
        options = {"margin": 0.0, "ridge": 0.0} if learner is GEM else {}
        method = make(lab, learner, **options)
        tasks = lab.make_tasks((3, 2))
        for task in tasks[:1]:
            lab.learn(method, task)
        method.begin_task(tasks[1])
        (stage,) = method.stages(tasks[1])
        stage.recipe = replace(stage.recipe, lr=1e-4, epochs=20, momentum=0.0, weight_decay=0.0)
        old = lab.read(tasks[1].exemplars, range(len(tasks[1].exemplars)))
        losses = []

        def measure(*_, method=method, old=old, losses=losses, labels=tasks[1].exemplars.labels):
            method.train()
            with torch.no_grad():
                losses.append(float(F.cross_entropy(method.logits(old), labels)))

        measure()
        lab.Loop(measure).run(stage)
        raised[learner] = losses[-1] - losses[0]
    assert raised[Finetune] > 0
    assert raised[cls] < 0.01 * raised[Finetune], raised


@pytest.mark.parametrize("cls", BOTH)
def test_the_first_task_is_plain_training(lab, cls):
    method = make(lab, cls)
    (task,) = lab.make_tasks((3,))
    method.begin_task(task)
    (stage,) = method.stages(task)
    lab.Loop().begin(stage)
    batch = lab.batch_of(stage.streams[0], torch.arange(6))
    assert len(stage.streams) == 1
    wanted = torch.autograd.grad(total(stage.loss(batch)), list(stage.parameters()))
    expected = torch.cat([g.flatten() for g in wanted])
    torch.testing.assert_close(stepped(stage, [batch]), expected)


def test_gem_has_a_stream_for_every_past_task(lab):
    method = make(lab, GEM, memory_batch=5)
    first, second, third = lab.make_tasks((2, 1, 3))
    for task in (first, second):
        method.begin_task(task)
        method.end_task(lab.after(task))
    method.begin_task(third)
    (stage,) = method.stages(third)
    _, one, two = stage.streams
    assert (one.batch_size, two.batch_size) == (5, 5)
    for stream, labels in ((one, [0] * 4 + [1] * 4), (two, [2] * 4)):
        drawn = lab.batch_of(stream, stream.pool())
        assert drawn.labels.tolist() == labels and drawn.part.unique().tolist() == [1]
    method.config = replace(method.config, memory_batch=0)
    (stage,) = method.stages(third)
    assert [len(s) for s in stage.streams[1:]] == [s.batch_size for s in stage.streams[1:]]
    none = replace(third, exemplars=third.exemplars.select(torch.arange(8)))
    assert len(method.stages(none)[0].streams) == 2  # nothing is left of the second task


def test_gem_in_a_data_incremental_stream_has_one_past_task(lab):
    method = make(lab, GEM)
    first, later = lab.make_tasks((3, 2))
    lab.learn(method, first)
    for index in (1, 2):
        again = Task(index, (0, 1, 2), known=3, examples=first.examples, exemplars=later.exemplars)
        method.begin_task(again)
        (stage,) = method.stages(again)
        assert [len(stream) for stream in stage.streams] == [36, 12]


def test_a_gem_draws_from_all_of_memory(lab):
    method = make(lab, AGEM, memory_batch=7)
    tasks = lab.make_tasks((2, 1, 3))
    for task in tasks[:2]:
        lab.learn(method, task)
    method.begin_task(tasks[2])
    (stage,) = method.stages(tasks[2])
    new, memory = stage.streams
    assert (new.batch_size, memory.batch_size, len(memory)) == (16, 7, 12)


def statistics(module):
    return {k: v.clone() for k, v in module.state_dict().items() if "running" in k or "num" in k}


@pytest.mark.parametrize("memory_norms", ["move", "keep"])
@pytest.mark.parametrize("cls", BOTH)
def test_running_statistics(lab, cls, memory_norms):
    """Moved by memory's passes and then the new one, or by the new one alone."""
    method = make(lab, cls, memory_norms=memory_norms)
    stage, batches = at_the_last(lab, method, lab.make_tasks((2, 2, 2)))
    twin = copy.deepcopy(method.network).train()
    for batch in [*(batches[1:] if memory_norms == "move" else []), batches[0]]:
        twin(batch.images)
    gradient = stepped(stage, batches)
    expected, found = statistics(twin), statistics(method.network)
    assert expected and all(torch.equal(found[key], value) for key, value in expected.items())
    assert gradient.isfinite().all()


def test_a_single_exemplar_is_seen_by_running_statistics(lab):
    method = make(lab, GEM, margin=0.0, ridge=0.0)
    stage, batches = at_the_last(lab, method, lab.make_tasks((1, 2), kept=1))
    (_, memory) = batches
    assert len(memory) == 1
    twin = copy.deepcopy(method.network).train()
    twin(batches[0].images)
    found = stepped(stage, batches)
    assert found.isfinite().all() and method.training
    moved, expected = statistics(method.network), statistics(twin)
    assert all(torch.equal(moved[key], value) for key, value in expected.items())


@pytest.mark.parametrize("cls", BOTH)
def test_weight_decay_and_clipping_come_after_the_projection(lab, cls):
    """What the optimiser gets is the projected gradient, as that of the parameters themselves."""
    method = make(lab, cls)
    stage, batches = at_the_last(lab, method, lab.make_tasks((2, 2)))
    wanted = stepped(stage, batches)
    loop = lab.Loop()
    loop.begin(stage)
    before = torch.cat([p.detach().flatten() for p in stage.parameters()])
    loop.optimizer = torch.optim.SGD(list(stage.parameters()), lr=0.1, weight_decay=0.01)
    stage.step(batches, loop)
    after = torch.cat([p.detach().flatten() for p in stage.parameters()])
    torch.testing.assert_close(after, before - 0.1 * (wanted + 0.01 * before))


@pytest.mark.parametrize(
    ("cls", "options", "says"),
    [
        (GEM, {"margin": -0.1}, "margin is -0.1"),
        (GEM, {"ridge": -1}, "ridge is -1"),
        (GEM, {"memory_batch": -1}, "memory_batch is -1"),
        (GEM, {"head": "two"}, "head is 'two'; it must be one of all, task"),
        (GEM, {"memory_norms": "no"}, "memory_norms is 'no'; it must be one of move, keep"),
        (AGEM, {"memory_batch": 0}, "memory_batch is 0"),
        (AGEM, {"memory_norms": "no"}, "memory_norms is 'no'"),
    ],
)
def test_odd_settings_are_a_sentence(cls, options, says):
    with pytest.raises(FastcilError, match=says):
        cls.Config(**options)
