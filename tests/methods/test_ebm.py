"""Energy-based models: the loss against its equation, its gradient by hand, and the negatives."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import ConvNet

from fastcil import Learner
from fastcil.contract import Batch, evaluating
from fastcil.errors import FastcilError
from fastcil.methods.ebm import EBM
from fastcil.nn import outputs_of


def make(lab, **options):
    torch.manual_seed(0)
    config = lab.shorten(EBM.Config(**options), batch=8)
    return EBM(replace(config, later=replace(config.later, optimizer="sgd")), lab.context)


def ready(lab, method, task):
    """A task's stage in the middle of its training, in float64; the loss depends on no batch."""
    torch.manual_seed(7)
    method.begin_task(task)
    method.network.double()
    (stage,) = method.stages(task)
    loop = lab.Loop()
    loop.begin(stage)
    method.eval()
    return stage, loop


def some_batch(lab, stage, size=10):
    """Images from all over every stream."""
    found = []
    for stream in stage.streams:
        pool = stream.pool()
        drawn = lab.batch_of(stream, pool[:: max(1, len(pool) // size)])
        found.append(replace(drawn, images=drawn.images.double()))
    return Batch.cat(found)


def energies(method, images):
    """E of every label, in loops over the released formula, [B][K]."""
    head, rows = method.network.head, []
    with torch.no_grad():
        hidden = method.network.features(images) @ head.hidden.T + head.offset
    embedding, readout = head.embedding.tolist(), head.readout.tolist()
    for h in hidden.tolist():
        row = []
        for e in embedding:
            if head.gate == "softmax":
                whole = sum(map(math.exp, e))
                gates = [len(e) * math.exp(v) / whole for v in e]
                row.append(-sum(w * g * x for w, g, x in zip(readout, gates, h, strict=True)))
            else:
                gated = [max(0.0, x + x * v / math.hypot(*e)) for x, v in zip(h, e, strict=True)]
                row.append(-sum(w * x for w, x in zip(readout, gated, strict=True)))
        rows.append(row)
    return rows


def contrast(row, label, others):
    """E(x, y+) + log of the sum of exp(-E) over y+ and the others."""
    return row[label] + math.log(sum(math.exp(-row[y]) for y in {label, *others}))


def negatives(method, stage, batch):
    """The labels that each image's is contrasted with, as the loss draws them."""
    current = stage.objective.args[0]
    compared = method.compared(batch.labels, current)
    assert bool(compared[range(len(batch)), batch.labels].all())
    return [
        set(row.nonzero().flatten().tolist()) - {y}
        for row, y in zip(compared, batch.labels.tolist(), strict=True)
    ]


@pytest.mark.parametrize("gate", ["softmax", "normalised"])
@pytest.mark.parametrize("kind", ["random", "batch", "all"])
@pytest.mark.parametrize("head", ["all", "task"])
@pytest.mark.parametrize("replay", [None, "tasks", "images"])
def test_loss_is_the_equation(lab, gate, kind, head, replay):
    options = {"replay": True, "replay_share": replay} if replay else {}
    method = make(lab, gate=gate, negatives=kind, head=head, width=5, **options)
    for number, task in enumerate(lab.make_tasks((3, 2, 3)), 1):
        stage, loop = ready(lab, method, task)
        batch = some_batch(lab, stage)
        rows = energies(method, batch.images)
        terms = {0: [], 1: []}
        for row, y, others, part in zip(
            rows,
            batch.labels.tolist(),
            negatives(method, stage, batch),
            batch.part.tolist(),
            strict=True,
        ):
            terms[part].append(contrast(row, y, others))
            source = set(range(task.total)) if replay else set(task.classes)
            if head == "task":
                source = {c for t in ((0, 1, 2), (3, 4), (5, 6, 7)) if y in t for c in t}
            if kind == "batch":
                source &= set(batch.labels.tolist())
            source -= {y}
            assert others <= source and (others == source if kind == "all" else len(others) == 1)
        found = {name: float(value.detach()) for name, value in stage.loss(batch).items()}
        if replay == "images":
            assert bool(terms[1]) != task.first
            expected = {"classification": np.mean(terms[0] + terms[1])}
            assert found == pytest.approx(expected, rel=1e-9)
        elif replay and not task.first:
            assert found == pytest.approx(
                {
                    "classification": np.mean(terms[0]) / number,
                    "replay": (1 - 1 / number) * np.mean(terms[1]),
                },
                rel=1e-9,
            )
        else:
            assert not terms[1]
            assert found == pytest.approx({"classification": np.mean(terms[0])}, rel=1e-9)
        stage.step([replace(some_batch(lab, stage), part=batch.part)], loop)
        method.end_task(lab.after(task))


def test_least_energy_is_predicted(lab):
    (task,) = lab.make_tasks((4,))
    method = make(lab)
    stage, _ = ready(lab, method, task)
    batch = some_batch(lab, stage)
    with evaluating(method), torch.no_grad():
        scores = method.logits(batch.images)
    rows = torch.tensor(energies(method, batch.images), dtype=torch.float64)
    torch.testing.assert_close(scores, -rows)
    assert torch.equal(scores.argmax(1), rows.argmin(1))


def test_gradient_of_embeddings_by_hand(lab):
    """p_y- times what lowers E(x, y-), against it at y+; all other embeddings have none."""
    (task,) = lab.make_tasks((4,))
    method = make(lab, width=5)
    stage, _ = ready(lab, method, task)
    batch = some_batch(lab, stage)
    drawn = negatives(method, stage, batch)
    method.zero_grad()
    stage.loss(batch)["classification"].backward()
    head, rows = method.network.head, energies(method, batch.images)
    with torch.no_grad():
        hidden = (method.network.features(batch.images) @ head.hidden.T + head.offset).numpy()
    w, e = head.readout.detach().numpy(), head.embedding.detach().numpy()
    gates = np.exp(e) / np.exp(e).sum(1, keepdims=True)
    expected = np.zeros_like(e)
    for h, row, y, others in zip(hidden, rows, batch.labels.tolist(), drawn, strict=True):
        (other,) = others
        p = 1 / (1 + math.exp(row[other] - row[y]))  # of the negative
        for label, sign in ((y, -1), (other, 1)):
            s = gates[label]
            slope = len(s) * s * (w * h - (s * w * h).sum())  # of -E in the embedding
            expected[label] += sign * p * slope / len(batch)
    np.testing.assert_allclose(head.embedding.grad.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["random", "batch"])
def test_negatives_are_drawn_as_often_as_they_should(lab, kind):
    """Each other class alike, or as often as it occurs in the batch."""
    (task,) = lab.make_tasks((5,))
    method = make(lab, negatives=kind)
    ready(lab, method, task)
    labels = torch.tensor([0] * 300 + [1] * 60 + [2] * 40 + [3] * 100)
    counts: Counter[int] = Counter()
    for _ in range(20):
        compared = method.compared(labels, outputs_of(task.classes, 5))
        assert bool((compared.sum(1) == 2).all())
        mine = compared[labels == 0]
        assert bool(mine[:, 0].all())
        counts.update(mine[:, 1:].nonzero()[:, 1].tolist())
        method.draws.advance()
    shares = [counts[k] / 6000 for k in range(4)]
    expected = [0.25] * 4 if kind == "random" else [0.3, 0.2, 0.5, 0.0]
    assert shares == pytest.approx(expected, abs=0.025)


def test_draws_change_with_every_step_and_no_sooner(lab):
    (task,) = lab.make_tasks((5,))
    method = make(lab)
    stage, loop = ready(lab, method, task)
    batch = some_batch(lab, stage, size=30)
    before = negatives(method, stage, batch)
    assert negatives(method, stage, batch) == before
    state = torch.get_rng_state()
    stage.loss(batch)
    assert negatives(method, stage, batch) == before
    stage.step([batch], loop)
    assert torch.equal(torch.get_rng_state(), state)
    assert negatives(method, stage, batch) != before
    twin = make(lab)
    twin.restore(method.structure())
    twin.load_tensors({key: value.clone() for key, value in method.tensors().items()})
    (again,) = twin.stages(task)
    assert negatives(twin, again, batch) == negatives(method, stage, batch)
    method.draws.open()
    assert negatives(method, stage, batch) != negatives(twin, again, batch)


@pytest.mark.parametrize("kind", ["random", "batch", "all"])
def test_a_class_alone_in_its_task(lab, kind):
    """It is contrasted with all known ones; with a head of its own, with none."""
    for head in ("all", "task"):
        method = make(lab, negatives=kind, head=head)
        for task in lab.make_tasks((1, 1, 1)):
            stage, _ = ready(lab, method, task)
            batch = some_batch(lab, stage)
            others = negatives(method, stage, batch)
            known = set(range(task.known)) if head == "all" else set()
            for found in others:
                assert found <= known and len(found) == min(len(known), 1 if kind != "all" else 2)
            (loss,) = stage.loss(batch).values()
            assert loss.isfinite() and bool(loss > 0) is bool(known)
            method.zero_grad()
            loss.backward()
            assert all(p.grad.isfinite().all() for p in method.network.parameters())
            method.end_task(task)


def test_an_empty_batch_has_no_negatives(lab):
    (task,) = lab.make_tasks((3,))
    method = make(lab)
    ready(lab, method, task)
    nothing = torch.empty(0, dtype=torch.int64)
    assert method.compared(nothing, outputs_of((0, 1, 2), 3)).shape == (0, 3)


def test_normalised_energies_learn_and_resume(lab):
    """What the table of methods tests of the other gate, which has activation maps."""
    method = EBM(lab.shorten(EBM.Config(gate="normalised"), epochs=8), lab.context)
    for task in lab.make_tasks((3, 2)):
        (losses,) = lab.learn(method, task).losses.values()
        assert sum(losses[-4:]) < sum(losses[:4])
        twin = EBM(method.config, lab.context)
        twin.restore(method.structure())
        twin.load_tensors(method.tensors())
        with evaluating(method), evaluating(twin), torch.no_grad():
            images = lab.read(task.examples, range(5))
            assert torch.equal(twin.logits(images), method.logits(images))


OPTIONS = {"engine.epoch_scale": 0.05, "engine.batch_size": 6, "engine.progress": False}


def shelf(names, per_class=8, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 256, (per_class, 12, 12, 3), np.uint8) for name in names}


def two_tasks(method, **options):
    learner = Learner(method, memory="8 images", backbone=ConvNet, **OPTIONS, **options)
    for task in range(2):
        learner.learn(shelf([f"{task}x", f"{task}y"], seed=task))
    return learner


def test_exemplars_are_kept_only_to_be_replayed():
    assert len(two_tasks("ebm").memory) == 0
    assert two_tasks("ebm", **{"ebm.replay": True}).memory.counts(4) == [2, 2, 2, 2]


@pytest.mark.parametrize("addon", ["cam", "cim", "mrdc", "mnemonics", "aanets", "samc"])
def test_with_replay_it_composes(addon):
    short = {"cam": {"cam.refresh": 1}, "cim": {"cim.refresh": 1}}.get(addon, {})
    learner = two_tasks(f"ebm+{addon}", **{"ebm.replay": True, **short})
    assert len(learner.memory) >= 4
    assert learner.predict(shelf(["t"])["t"]).scores.shape == (8, 4)


def test_no_activation_maps_through_a_relu():
    with pytest.raises(FastcilError, match="take gate 'softmax' for activation maps"):
        two_tasks("ebm+cam", **{"ebm.replay": True, "ebm.gate": "normalised"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gate": "relu"}, "gate is 'relu'; it must be one of softmax, normalised"),
        ({"negatives": "hard"}, "negatives is 'hard'"),
        ({"head": "both"}, "head is 'both'"),
        ({"width": -1}, "width is -1"),
    ],
)
def test_odd_settings_are_a_sentence(options, says):
    with pytest.raises(FastcilError, match=says):
        EBM.Config(**options)
