"""Dark experience replay against its equations, and what lies in memory against a simulation."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import ConvNet
from torch.nn import functional as F

from fastcil import Learner
from fastcil.contract import Batch, Task, evaluating, total
from fastcil.errors import FastcilError
from fastcil.methods.dark import Dark, DarkPP

FORMS = pytest.mark.parametrize("cls", [Dark, DarkPP])


def make(lab, cls, epochs=2, batch=8, **options):
    torch.manual_seed(0)
    return cls(lab.shorten(cls.Config(**options), epochs=epochs, batch=batch), lab.context)


class Log:
    """A stepper that keeps the loss it is given, and steps by SGD with a rate of its own."""

    def __init__(self, method, rate=0.02):
        self.method, self.rate, self.losses = method, rate, []

    def update(self, loss):
        self.losses.append(float(loss.detach()))
        self.method.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in self.method.network.parameters():
                if p.grad is not None:
                    p.sub_(self.rate * p.grad)


def start(lab, cls, task, **options):
    method = make(lab, cls, **options)
    method.begin_task(task)
    method.eval()  # The loss of a batch then depends on no other.
    return method, method.stages(task)[0]


def batches(lab, stage, positions, entries):
    """The new data at some positions, and from each other stream the entries given."""
    new, *others = stage.streams
    drawn = [replace(lab.batch_of(new, positions), entry=positions)]
    for stream, chosen in zip(others, entries, strict=True):
        drawn.append(replace(lab.batch_of(stream, stream.pool()[chosen]), entry=chosen))
    return drawn


def test_the_step_is_the_equation(lab):
    """CE of new data, alpha times the mean square over the known outputs, beta times CE."""
    first, second = lab.make_tasks((2, 3))
    method = make(lab, DarkPP, alpha=0.7, beta=0.4)
    lab.learn(method, first)
    assert method.stored.shape == (8, 2)
    method.begin_task(second)
    (stage,) = method.stages(second)
    method.eval()
    generator, log = torch.Generator().manual_seed(0), Log(method)
    for step in range(6):
        pool = stage.streams[1].pool()
        entries = [torch.randperm(len(pool), generator=generator)[:5] for _ in range(2)]
        new, match, again = batches(lab, stage, torch.arange(step * 6, step * 6 + 6), entries)
        slots, targets = method.reservoir.occupied(), method.fresh.clone()
        with torch.no_grad():
            logits = [method.logits(b.images).double().numpy() for b in (new, match, again)]
        expected, squares = 0.0, []
        for row, label in zip(logits[0], new.labels.tolist(), strict=True):
            expected -= np.log(np.exp(row[label]) / np.exp(row).sum()) / 6
        for row, entry in zip(logits[1], entries[0].tolist(), strict=True):
            for z, stored in zip(row, targets[slots[entry]].tolist(), strict=True):
                if np.isfinite(stored):
                    squares.append((z - stored) ** 2)
        expected += 0.7 * np.mean(squares)
        for row, label in zip(logits[2], again.labels.tolist(), strict=True):
            expected -= 0.4 * np.log(np.exp(row[label]) / np.exp(row).sum()) / 5
        terms = stage.step([new, match, again], log)
        assert log.losses[-1] == pytest.approx(expected, rel=1e-5)
        assert list(terms) == ["classification", "distillation", "replay"]
        assert float(total(terms)) == pytest.approx(expected, rel=1e-5)
        assert len(squares) >= 10


@FORMS
def test_memory_holds_the_logits_of_the_step_in_which_they_were_stored(lab, cls):
    """Every row of `fresh` is what the network said of the slot's image when it was offered."""
    first, second = lab.make_tasks((2, 3))
    method = make(lab, cls)
    lab.learn(method, first)
    method.begin_task(second)
    (stage,) = method.stages(second)
    method.eval()
    log, generator = Log(method), torch.Generator().manual_seed(4)
    held = {slot: ("old", slot) for slot in range(8)}
    rows = {slot: method.stored[slot].clone() for slot in range(8)}
    for _ in range(2):
        for positions in torch.randperm(36, generator=generator).split(8):
            reservoir, generated = method.reservoir, method.reservoir.draws()
            seen, first = int(reservoir.seen - reservoir.since), int(reservoir.first)
            entries = [torch.randperm(len(stage.streams[1].pool()), generator=generator)[:4]] * (
                len(stage.streams) - 1
            )
            drawn = batches(lab, stage, positions, entries)
            with torch.no_grad():
                logits = method.logits(drawn[0].images)
            before = method.reservoir.slots.clone()
            stage.step(drawn, log)
            # The sequential algorithm, with the numbers that a step's seed gives.
            free = int((before < 0).sum())
            draws = torch.rand(
                max(0, len(positions) - free),
                dtype=torch.float64,
                generator=generated,
            ).tolist()
            for k, position in enumerate(positions.tolist()):
                empty = [s for s in range(len(before)) if s not in held]
                slot = empty[0] if empty else first + int(draws[k - free] * (seen + k + 1))
                if slot < len(before):
                    held[slot], rows[slot] = ("new", position), logits[k]
            for slot, (where, position) in held.items():
                expected = position if where == "new" else 36 + position
                assert int(method.reservoir.slots[slot]) == expected
                assert torch.equal(method.fresh[slot], rows[slot])
    kinds = {where for where, _ in held.values()}
    assert kinds == {"old", "new"} and len(held) == second.room == 20
    # At the end: the same pairs, in another order, and as many as memory keeps.
    stage.finish()
    everything = [("new", k) for k in range(36)] + [("old", k) for k in range(8)]
    for row, position in zip(method.stored, method.chosen().tolist(), strict=True):
        slots = [slot for slot, pair in held.items() if pair == everything[position]]
        assert any(torch.equal(rows[s], row) for s in slots)
    assert sorted(method.chosen().tolist()) == sorted(
        p if where == "new" else 36 + p for where, p in held.values()
    )
    done = method.stored[:15].clone()
    method.end_task(replace(second, exemplars=second.examples.select(torch.arange(15))))
    assert torch.equal(method.stored, done) and method.fresh.numel() == 0
    assert method.retained()[0].nbytes == 15 * method.beside(5)
    assert method.stored.untyped_storage().nbytes() == 15 * 5 * 4


@FORMS
def test_classes_that_came_later_have_no_stored_logits(lab, cls):
    first, second = lab.make_tasks((2, 3))
    method = make(lab, cls)
    lab.learn(method, first)
    method.begin_task(second)
    (stage,) = method.stages(second)
    method.eval()
    assert method.stored[:, 2:].isinf().all() and method.stored[:, :2].isfinite().all()
    index = torch.arange(len(second.exemplars))
    images = lab.read(second.exemplars, range(len(index)))
    method.stored[:, :2] = method.logits(images).detach()[:, :2]
    batch = Batch(images, second.exemplars.labels, torch.ones_like(index), index)
    losses = stage.loss(batch)
    assert float(losses["distillation"].detach()) == pytest.approx(0.0, abs=1e-10)
    method.stored[:, 1] += 2.0
    losses = stage.loss(batch)
    # Over two known outputs, of which one is off by two.
    assert float(losses["distillation"].detach()) == pytest.approx(0.3 * 2.0, rel=1e-5)
    method.network.requires_grad_(True)
    losses["distillation"].backward()
    gradient = method.network.head.bias.grad
    assert gradient.isfinite().all() and gradient[1] != 0 and not gradient[2:].any()


@FORMS
def test_addons_see_the_loss_of_a_joined_batch(lab, cls):
    """New images by their labels, exemplars by the logits they came with (and their labels)."""
    tasks = lab.make_tasks((2, 3))
    method = make(lab, cls, alpha=0.6)
    lab.learn(method, tasks[0])
    method.begin_task(tasks[1])
    (stage,) = method.stages(tasks[1])
    method.eval()
    new = lab.batch_of(stage.streams[1], torch.arange(0, 36, 5))
    old = lab.batch_of(stage.streams[1], torch.arange(37, 41))
    with torch.no_grad():
        found = stage.loss(Batch.cat([new, old]))
        logits = method.logits(old.images)
        expected = {
            "classification": F.cross_entropy(method.logits(new.images), new.labels),
            "distillation": 0.6 * F.mse_loss(logits[:, :2], method.stored[1:5, :2]),
        }
        if cls is DarkPP:
            expected["replay"] = 0.5 * F.cross_entropy(logits, old.labels)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@FORMS
def test_gradients_flow_through_every_term(lab, cls):
    first, second = lab.make_tasks((2, 3))
    method = make(lab, cls)
    lab.learn(method, first)
    method.begin_task(second)
    method.network.requires_grad_(True)
    (stage,) = method.stages(second)
    entries = [torch.arange(8)] * (len(stage.streams) - 1)
    new, *drawn = batches(lab, stage, torch.arange(8), entries)
    targets = method.fresh[:8]
    terms = [method.learn(new)[0], method.match(drawn[0], targets)]
    terms += [method.replay(batch) for batch in drawn[1:]]
    for term in terms:
        method.zero_grad()
        total(term).backward()
        assert all(p.grad.isfinite().all() for p in method.network.parameters())
        assert method.network.head.weight.grad.abs().sum() > 0
        assert next(method.network.extractors.parameters()).grad.abs().sum() > 0
    assert not method.fresh.requires_grad and not method.stored.requires_grad


def test_without_room_it_is_finetuning(lab):
    method = make(lab, DarkPP)
    for task in lab.make_tasks((2, 2), kept=0):
        method.begin_task(task)
        (stage,) = method.stages(task)
        assert len(stage.streams) == 1
        lab.Loop().run(stage)
        assert method.chosen().tolist() == []
        method.end_task(task)
        assert method.retained()[0].nbytes == 0


def test_the_first_step_has_nothing_to_replay(lab):
    (task,) = lab.make_tasks((2,))
    method, stage = start(lab, DarkPP, task)
    new = replace(lab.batch_of(stage.streams[0], torch.arange(6)), entry=torch.arange(6))
    assert not len(stage.streams[1].pool())
    assert list(stage.step([new], Log(method))) == ["classification"]
    assert stage.streams[1].pool().tolist() == list(range(6))


def test_one_image_is_not_replayed(lab):
    """Batch normalisation has no variance to estimate from it."""
    (task,) = lab.make_tasks((2,))
    method, stage = start(lab, Dark, replace(task, room=1))
    new = replace(lab.batch_of(stage.streams[0], torch.arange(6)), entry=torch.arange(6))
    stage.step([new], Log(method))
    entries = [torch.arange(1)]
    assert list(stage.step(batches(lab, stage, torch.arange(6), entries), Log(method))) == [
        "classification"
    ]


def test_alpha_holds_the_old_logits(lab):
    moved = {}
    for alpha in (0.0, 3.0):
        method = make(lab, Dark, epochs=12, alpha=alpha)
        first, second = lab.make_tasks((3, 2))
        lab.learn(method, first)
        images = lab.read(first.examples, range(36))
        with evaluating(method), torch.no_grad():
            before = method.logits(images)
        lab.learn(method, second)
        with evaluating(method), torch.no_grad():
            moved[alpha] = float((method.logits(images)[:, :3] - before).square().mean())
    assert moved[3.0] < 0.5 * moved[0.0]


OPTIONS = {"engine.epoch_scale": 0.05, "engine.batch_size": 6, "engine.progress": False}


def shelf(names, per_class=8, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 256, (per_class, 12, 12, 3), np.uint8) for name in names}


@FORMS
@pytest.mark.parametrize(
    ("memory", "counts"),
    [
        ("10 images", [10, 10, 10]),
        ("3 images/class", [6, 9, 12]),
        ("5000B", [10, 10, 10]),  # 432 + 28 bytes and a row of 8, 12 or 16
        ("1500B/class", [6, 9, 12]),
        ("unlimited", [16, 24, 32]),
        ("none", [0, 0, 0]),
    ],
)
def test_memory_holds_what_the_reservoir_chose(cls, memory, counts):
    """In the order of the logits; its size is what the budget allows."""
    name = "dark" if cls is Dark else "darkpp"
    learner = Learner(name, memory=memory, backbone=ConvNet, **OPTIONS)
    known: list[np.ndarray] = []
    for task, names in enumerate((["a", "b"], ["c"], ["d"])):
        data = shelf(names, seed=task)
        known += list(data.values())
        learner.learn(data)
        held = learner.memory.examples()
        assert len(held) == len(learner.method.stored) == counts[task]
        for place, label in enumerate(held.labels.tolist()):
            image = held.images.image(place).numpy()
            assert any(np.array_equal(image, other) for other in known[label])
        widths = learner.method.stored.isfinite().sum(1)
        # A row is as wide as the number of classes known when its image was stored.
        assert (widths > held.labels).all()
        limit = learner.budget.limit(len(learner.class_names))
        if learner.budget.unit == "bytes":
            assert learner.nbytes()["budgeted"] <= limit
        if memory == "unlimited":
            pixels = {held.images.image(k).numpy().tobytes() for k in range(len(held))}
            assert len(pixels) == len(held), "each image once"


def test_images_of_uneven_sizes_fill_a_budget_in_bytes():
    rng = np.random.default_rng(0)
    learner = Learner("darkpp", memory="30000B", backbone=ConvNet, **OPTIONS)
    for task in range(3):
        images = [rng.integers(0, 256, (*rng.integers(14, 40, 2), 3), np.uint8) for _ in range(20)]
        learner.learn({f"{task}": images})
        assert 24000 < learner.nbytes()["budgeted"] <= 30000 if task else True
        assert len(learner.memory) == len(learner.method.stored)


def test_a_budget_too_small_for_one_image_is_said():
    learner = Learner("dark", memory="100B", backbone=ConvNet, **OPTIONS)
    with pytest.warns(UserWarning, match="no room for an image and what is kept beside it; '"):
        learner.learn(shelf(["a", "b"]))
    assert len(learner.memory) == 0


@pytest.mark.parametrize("addon", ["cam", "cim"])
def test_compressed_exemplars_keep_their_logits(addon):
    """Costs are known only at the end: as many as fit are kept, and more in the next task."""
    learner = Learner(
        f"darkpp+{addon}",
        memory="8 images",
        backbone=ConvNet,
        **OPTIONS,
        **{f"{addon}.threshold": 0.9, f"{addon}.refresh": 1},
    )
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for task in range(3):
            learner.learn(shelf([f"{task}x", f"{task}y"], per_class=12, seed=task))
            counts.append(len(learner.memory))
            assert len(learner.method.stored) == counts[-1]
            assert learner.memory.units <= 8 + 1e-6
    assert counts[0] == 8 < counts[1]


@FORMS
def test_known_classes_come_again(lab, cls):
    """Of a data-incremental task all stored logits have all classes."""
    method = make(lab, cls)
    (first,) = lab.make_tasks((3,))
    lab.learn(method, first)
    old = lab.make_examples([0, 1, 2] * 4, seed=9)
    again = Task(1, (0, 1, 2), 3, examples=old, exemplars=first.examples.select(range(12)), room=15)
    losses = lab.learn(method, again).losses
    assert torch.tensor(list(losses.values())).isfinite().all()
    assert method.stored.isfinite().all() and method.stored.shape == (15, 3)


@pytest.mark.parametrize("name", ["alpha", "beta", "replay_batch"])
def test_odd_settings_are_a_sentence(name):
    with pytest.raises(FastcilError, match=f"{name} is -1"):
        DarkPP.Config(**{name: -1})
