"""What LUCIR's stages may touch, and that they go on from their middle."""

from __future__ import annotations

import json

import pytest
import torch

from fastcil.contract import evaluating
from fastcil.methods.lucir import LUCIR
from fastcil.nn.scaling import has_scales


def make(lab, seed=0, **options):
    torch.manual_seed(seed)
    config = lab.shorten(LUCIR.Config(**options), epochs=2)
    return LUCIR(config, lab.context)


def loss_of(method, stage, batch):
    with evaluating(method), torch.no_grad():
        return {name: float(value) for name, value in stage.loss(batch).items()}


def test_old_rows_stay_while_all_else_trains(lab):
    method, sigmas = make(lab), [1.0]
    for task in lab.make_tasks((3, 2, 1)):
        seen = []
        method.begin_task(task)
        before = {k: v.clone() for k, v in method.state_dict().items()}
        assert float(before["network.head.sigma"]) == sigmas[-1]
        loop = lab.Loop(lambda *_, method=method, seen=seen: seen.append(method.teacher))
        for stage in method.stages(task):
            loop.run(stage)
        after = method.state_dict()
        trained = {"network.head.new", "network.head.sigma"} | {
            k for k, p in method.named_parameters() if k.startswith("network.extractors")
        }
        assert set(loop.trained["lucir"]) == trained
        assert all(not torch.equal(after[k], before[k]) for k in trained)
        assert torch.equal(after["network.head.old"], before["network.head.old"])
        for key in before:
            if key.startswith("teacher."):
                assert torch.equal(after[key], before[key])
        assert (seen[-1] is None) == task.first
        sigma = float(method.network.head.sigma.detach())
        method.end_task(lab.after(task))
        method.release()
        assert method.teacher is None and sigmas[-1] != sigma != 1
        sigmas.append(sigma)


def test_weight_transfer(lab):
    method = make(lab, transfer=True)
    tasks = lab.make_tasks((3, 2, 1))
    scales = None
    for task in tasks:
        method.begin_task(task)
        assert has_scales(method.network) == (not task.first)
        convolutions = {k: v.clone() for k, v in method.network.named_buffers() if v.ndim == 4}
        if scales is not None:  # They go on from where the last task left them.
            assert all(torch.equal(method.get_parameter(k), v) for k, v in scales.items())
        loop = lab.Loop()
        loop.run(method.stages(task)[0])
        if not task.first:
            assert len(convolutions) == 2
            buffers = dict(method.network.named_buffers())
            assert all(torch.equal(buffers[k], v) for k, v in convolutions.items())
            trained = loop.trained["lucir"]
            assert not any(p.ndim == 4 and p.shape[2] > 1 for p in method.network.parameters())
            assert sum(name.endswith(".scale") for name in trained) == 2
            assert sum(name.endswith(".bias") for name in trained) == 2  # batch norms
            scales = {
                k: p.detach().clone()
                for k, p in method.named_parameters()
                if k.startswith("network.") and k.endswith(".scale")
            }
            assert all(not torch.equal(v, torch.ones_like(v)) for v in scales.values())
        method.end_task(lab.after(task))


def test_scaled_networks_are_restored(lab):
    method = make(lab, transfer=True)
    for task in lab.make_tasks((2, 1, 1)):
        method.begin_task(task)
        stage = method.stages(task)[0]
        lab.Loop().run(stage)
        twin = make(lab, seed=5, transfer=True)
        twin.restore(json.loads(json.dumps(method.structure())))
        twin.load_tensors({k: v.clone() for k, v in method.tensors().items()})
        assert has_scales(twin.network) == (task.index > 0)
        assert (twin.teacher is not None and has_scales(twin.teacher)) == (task.index > 1)
        batch = lab.batch_of(stage.streams[0], torch.arange(0, 12, 2))
        assert loss_of(twin, twin.stages(task)[0], batch) == loss_of(method, stage, batch)
        method.end_task(lab.after(task))


@pytest.mark.parametrize("options", [{}, {"transfer": True, "finetune": True}], ids=str)
def test_a_task_goes_on_from_its_middle(lab, options):
    """Epoch by epoch the same, whether or not the method was saved and restored in between."""

    def run(method, task, interrupted):
        method.begin_task(task)
        for number in range(len(method.stages(task))):
            stage = method.stages(task)[number]
            loop = lab.Loop()
            loop.begin(stage)
            for epoch in range(3):
                if interrupted:
                    twin = make(lab, seed=9, **options)
                    twin.restore(json.loads(json.dumps(method.structure())))
                    twin.load_tensors({k: v.clone() for k, v in method.tensors().items()})
                    method, stage = twin, twin.stages(task)[number]
                    method.train()
                    method.requires_grad_(False)
                    for parameter in stage.parameters():
                        parameter.requires_grad_(True)
                loop.optimizer = torch.optim.SGD(stage.parameters(), lr=0.05)
                pool = stage.streams[0].pool()
                batch = lab.batch_of(stage.streams[0], pool[epoch::3])
                stage.step([batch], loop)
            if stage.finish is not None:
                stage.finish()
        method.end_task(lab.after(task))
        return method

    ends = []
    for interrupted in (False, True):
        method = make(lab, **options)
        for task in lab.make_tasks((3, 2, 1)):
            torch.manual_seed(task.index)
            method = run(method, task, interrupted)
        ends.append(method.tensors())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_balanced_finetuning_touches_the_rows_alone(lab):
    method = make(lab, finetune=True)
    first, second = lab.make_tasks((3, 2))
    assert [s.name for s in lab_stages(method, first)] == ["lucir"]
    lab.learn(method, first)
    method.begin_task(second)
    main, finetuning = method.stages(second)
    assert (main.primary, finetuning.primary) == (True, False)
    loop = lab.Loop()
    loop.run(main)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    loop.begin(finetuning)
    assert method.network.frozen == (0,) and not method.network.extractors[0].training
    chosen = finetuning.streams[0].pool()
    labels = torch.cat([p.labels for p in finetuning.streams[0].parts])[chosen]
    assert labels.bincount().tolist() == [4] * 5
    assert set(range(24, 36)) <= set(chosen.tolist())  # every exemplar
    loop.run(finetuning)
    after = method.state_dict()
    moved = {k for k, v in before.items() if k in after and not torch.equal(after[k], v)}
    assert moved - {"balanced.positions"} == {"network.head.old", "network.head.new"}
    assert method.network.frozen == () and method.network.extractors[0].training
    method.end_task(lab.after(second))
    assert not len(method.balanced.positions)


def lab_stages(method, task):
    """The stages of a task that begins."""
    method.begin_task(task)
    return method.stages(task)


def test_nothing_is_finetuned_without_exemplars(lab):
    method = make(lab, finetune=True)
    first, second = lab.make_tasks((3, 2), kept=0)
    lab.learn(method, first)
    assert [s.name for s in lab_stages(method, second)] == ["lucir"]
