"""EEC against Ayub and Wagner 2021, written naively."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcil.contract import Batch, evaluating
from fastcil.errors import FastcilError
from fastcil.methods.eec import EEC


def make(lab, epochs=2, **options):
    torch.manual_seed(0)
    config = lab.shorten(EEC.Config(**{"width": 8, **options}), epochs=epochs)
    return EEC(config, lab.context)


def reach(lab, method, sizes=(3, 2), **changes):
    """The method at the start of its last task."""
    tasks = [replace(task, **changes) for task in lab.make_tasks(sizes)]
    for task in tasks[:-1]:
        lab.learn(method, task)
        method.release()
    method.begin_task(tasks[-1])
    return tasks


@pytest.mark.parametrize("head", ["all", "task"])
@pytest.mark.parametrize("decay", ["age", "none"])
def test_classifier_loss(lab, head, decay):
    method = make(lab, head=head, decay=decay, smoothing=0.2)
    *_, task = reach(lab, method, (3, 1, 2))
    method.episodes.gamma = torch.tensor([0.3, 0.7])
    method.double()
    stage = method.stages(task)[0]
    new, old = stage.streams[0].parts
    assert new is task.examples and old.labels.bincount().tolist() == [12] * 4
    batch = lab.batch_of(stage.streams[0], torch.arange(0, len(new) + len(old), 5))
    batch = replace(batch, images=batch.images.double())
    with evaluating(method), torch.no_grad():
        z = method.network(batch.images).numpy()
        found = {k: float(v) for k, v in stage.loss(batch).items()}
    expected = 0.0
    gammas, blocks = {0: 0.3, 1: 0.7}, [(0, 3), (3, 4), (4, 6)]
    for row, label, part in zip(z, batch.labels.tolist(), batch.part.tolist(), strict=True):
        of = next(t for t, (first, end) in enumerate(blocks) if first <= label < end)
        first, end = blocks[of] if head == "task" else (0, 6)
        log_p = row[first:end] - np.log(np.exp(row[first:end]).sum())
        term = -0.8 * log_p[label - first] - 0.2 * log_p.mean()
        weight = np.exp(-gammas[of] * (2 - of)) if part == 1 and decay == "age" else 1.0
        assert (part == 1) == (label < 4)
        expected += weight * term / len(batch)
    assert found == {"classification": pytest.approx(expected, rel=1e-6)}


@pytest.mark.parametrize("content", [0.0, 0.3, 1.0])
def test_autoencoder_loss(lab, content):
    method = make(lab, content=content)
    task = reach(lab, method, (3,))[-1]
    method.double()
    stage = method.stages(task)[1]
    lab.Loop().begin(stage)
    batch = lab.batch_of(stage.streams[0], torch.arange(5))
    batch = replace(batch, images=batch.images.double())
    method.eval()
    with torch.no_grad():
        x = batch.images
        again = method.autoencoder(x)
        pixels = ((x - again).numpy() ** 2).mean()
        maps = (method.network.maps(x) - method.network.maps(again)).numpy()
        found = sum(float(v) for v in stage.loss(batch).values())
    assert found == pytest.approx((1 - content) * pixels + content * (maps**2).mean(), rel=1e-10)


def test_autoencoder_trains_alone_and_the_classifier_does_not_move(lab):
    method = make(lab, content=0.5)
    task = reach(lab, method, (3,))[-1]
    classify, encode = method.stages(task)
    lab.Loop().run(classify)
    before = {k: v.clone() for k, v in method.network.state_dict().items()}
    loop = lab.Loop()
    loop.run(encode)
    assert all(torch.equal(v, before[k]) for k, v in method.network.state_dict().items())
    assert all(name.startswith("autoencoder.") for name in loop.trained["autoencoder"])
    assert method.network.frozen == ()


def test_what_fits_is_kept_as_it_is(lab):
    method = make(lab)
    task = reach(lab, method, (3,))[-1]
    for stage in method.stages(task):
        lab.Loop().run(stage)
    with evaluating(method), torch.no_grad():
        images = lab.read(task.examples, range(len(task.examples)))
        codes = method.autoencoder.encode(images)
        again = method.autoencoder(images)
    assert method.episodes.counts.tolist() == [1] * 36
    torch.testing.assert_close(method.episodes.centres, codes.half(), rtol=1e-3, atol=1e-3)
    method.end_task(lab.after(task))
    assert method.autoencoder is None
    second = lab.make_tasks((3, 2))[1]
    method.begin_task(second)
    made = method.stages(second)[0].streams[0].parts[1]
    pixels = ((again * 0.5 + 0.5) * 255).round().clamp(0, 255)
    found = torch.stack([made.images.image(i).permute(2, 0, 1) for i in range(36)])
    assert (found.float() - pixels).abs().mean() < 1 and made.labels.tolist() == [
        *[0] * 12,
        *[1] * 12,
        *[2] * 12,
    ]


@pytest.mark.parametrize("decoders, number", [(0.5, 3), (0.0, 1), (0.0001, 1)])
def test_an_autoencoder_for_each_task_or_one_for_all(lab, decoders, number):
    method = make(lab, decoders=decoders)
    tasks = lab.make_tasks((3, 2, 1))
    for task in tasks:
        torch.manual_seed(task.index)
        method.begin_task(task)
        classify, encode = method.stages(task)
        made = classify.streams[0].parts[1]
        parts = encode.streams[0].parts
        if number == 1 and not task.first:
            assert [len(part) for part in parts] == [len(task.examples), len(made)]
        else:
            assert len(parts) == 1 and parts[0] is task.examples
        before = method.episodes.centres.clone()
        for stage in (classify, encode):
            lab.Loop().run(stage)
        kept = torch.equal(method.episodes.centres[: len(before)], before)
        assert task.first or kept == (number == 3), "one for all encodes the old ones anew"
        method.end_task(lab.after(task))
    assert len(method.episodes.decoders) == number
    assert method.episodes.decoder_of.tolist() == ([0, 1, 2] if number == 3 else [0, 0, 0])
    assert method.episodes.labels.bincount().tolist() == [12] * 6
    assert method.episodes.born.bincount().tolist() == [36, 24, 12]


def test_one_autoencoder_takes_over_where_another_does_not_fit(lab):
    method = make(lab, decoders=1.0)
    decoder = method.costs.decoder * 2
    allowance = 2.5 * decoder + 12 * method.costs.row
    numbers = []
    for task in lab.make_tasks((3, 2, 1)):
        lab.learn(method, replace(task, allowance=allowance))
        numbers.append(len(method.episodes.decoders))
        assert method.retained()[0].nbytes <= allowance
    assert numbers == [1, 2, 1]


@pytest.mark.parametrize("rows", [1.0, 1.5, 2.1, 4.0, 7.5, 11.0, 12.0, 30.0])
@pytest.mark.parametrize("codes", ["float16", "float32"])
def test_no_more_is_kept_than_may_be(lab, rows, codes):
    """Budgets from a code of each class to all of them, of a size that is no multiple."""
    method = make(lab, codes=codes, epochs=1)
    costs = method.costs
    for task in lab.make_tasks((3, 2, 1)):
        fixed = costs.fixed(task.index + 1, task.index + 1)
        allowance = fixed + rows * task.total * costs.row + 3
        lab.learn(method, replace(task, allowance=allowance))
        (kept,) = method.retained()
        held = sum(b.numel() * b.element_size() for b in method.episodes.buffers())
        assert kept.kind == "generator" and kept.nbytes == held <= allowance
        assert sorted(method.episodes.labels.unique().tolist()) == list(range(task.total))
        if rows >= 12:
            assert (method.episodes.counts == 1).all() and len(method.episodes) == 12 * task.total
        elif rows >= 4:
            # Old classes are reduced again as others come; the codes they stand for stay.
            number = method.episodes.counts.sum()
            assert number == 12 * task.total and held > 0.5 * allowance


@pytest.mark.parametrize("short", [1, 500])
def test_a_budget_without_room_for_a_decoder_is_a_sentence(lab, short):
    method = make(lab, width=64)
    (task,) = lab.make_tasks((3,))
    least = method.costs.least(3, 1, 1)
    with pytest.raises(
        FastcilError, match=f"at least {least} bytes, .*, or set eec.width"
    ) as caught:
        method.begin_task(replace(task, allowance=least - short))
    assert "\n" not in str(caught.value)
    method = make(lab, width=64)
    lab.learn(method, replace(task, allowance=least))
    assert method.retained()[0].nbytes == least


def test_without_memory_nothing_is_kept(lab):
    method = make(lab)
    for task in lab.make_tasks((3, 2), kept=0):
        method.begin_task(task)
        assert [stage.name for stage in method.stages(task)] == ["eec"]
        method.end_task(task)
        assert method.retained()[0].nbytes == 0


def test_gamma_is_the_loss_of_accuracy(lab):
    method = make(lab, epochs=6, width=4)
    (task,) = lab.make_tasks((4,))
    lab.learn(method, task)
    rows = torch.arange(len(method.episodes))
    with evaluating(method), torch.no_grad():
        images = lab.read(task.examples, range(len(task.examples)))
        right = (method.logits(images).argmax(1) == task.examples.labels).float().mean()
        made = method._regenerate(rows).examples
        again = method.logits(lab.read(made, range(len(made)))).argmax(1) == made.labels
    gamma = max(0.0, 1 - float(again.float().mean()) / float(right))
    assert method.episodes.gamma.tolist() == [pytest.approx(gamma, abs=1e-6)]


def test_paired_replay_has_as_many_of_both(lab):
    method = make(lab, replay="paired")
    *_, task = reach(lab, method)
    new, old = method.stages(task)[0].streams
    assert (new.batch_size, old.batch_size) == (16, 16)
    batch = Batch.cat([lab.batch_of(new, torch.arange(3)), lab.batch_of(old, old.pool()[:3])])
    assert batch.part.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(old.pool()) == 36


def test_a_class_that_comes_again_is_kept_of_both_tasks(lab):
    method = make(lab)
    (first,) = lab.make_tasks((3,))
    lab.learn(method, first)
    again = replace(first, index=1, classes=(0, 1), known=3, examples=lab.make_examples([0, 1, 1]))
    lab.learn(method, again)
    assert method.episodes.groups() == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert method.episodes.labels.bincount().tolist() == [13, 14, 12]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"content": 1.5}, "content is 1.5; it must be a number from 0 to 1"),
        ({"smoothing": -0.1}, "smoothing is -0.1"),
        ({"decoders": 2}, "decoders is 2"),
        ({"width": 10}, "width is 10; it must be a multiple of 4"),
        ({"codes": "int8"}, "codes is 'int8'; it must be one of float16, float32"),
        ({"per_class": -1}, "per_class is -1"),
    ],
)
def test_odd_options_are_a_sentence(options, says):
    with pytest.raises(FastcilError, match=says):
        EEC.Config(**options)


def test_presets_are_one_pass_with_heads_of_tasks():
    for config in EEC.PRESETS.values():
        for recipe in (config.first, config.later):
            assert (recipe.lr, recipe.epochs, recipe.batch_size) == (0.1, 1, 10)
            assert (recipe.momentum, recipe.weight_decay) == (0, 0)
        assert (config.head, config.replay) == ("task", "paired")


@pytest.mark.parametrize("preset, side", [("samc-cifar10", 32), ("samc-mini", 84)])
def test_ten_images_a_task_have_room_for_the_presets(preset, side):
    """P1's memory: the first task's decoder takes less than half of it."""
    from fastcil.memory.episodes import Costs
    from fastcil.nn.image_autoencoder import code_length, decoder_length

    width = EEC.PRESETS[preset].width
    costs = Costs(code_length(width, side), decoder_length(width), 2)
    allowance = 10 * (3 * side * side + 28)
    assert costs.fixed(1, 1) < allowance / 2
    assert (allowance - costs.fixed(1, 1)) / costs.row > 20, "codes, where raw images are 10"
