"""NCM of the few-shot tables against its loss, written naively."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcil.contract import Batch, evaluating
from fastcil.errors import FastcilError
from fastcil.methods.ncm import NCM


def second_task(lab, **options):
    torch.manual_seed(0)
    method = NCM(lab.shorten(NCM.Config(**options), epochs=1), lab.context)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    method.release()
    method.begin_task(second)
    (stage,) = method.stages(second)
    lab.Loop().begin(stage)
    method.double()
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    batch = Batch.cat([lab.batch_of(s, s.pool()[::4]) for s in stage.streams])
    return method, stage, replace(batch, images=batch.images.double())


@pytest.mark.parametrize("weight", [50.0, 1.0])
def test_loss(lab, weight):
    method, stage, batch = second_task(lab, weight=weight, normalised=True)
    with evaluating(method), torch.no_grad():
        losses = {name: float(value) for name, value in stage.loss(batch).items()}
        new, old = (n.features(batch.images).numpy() for n in (method.network, method.teacher))
        logits = method.network(batch.images).numpy()
    entropy, turned = [], []
    for row, part in enumerate(batch.part.tolist()):
        f, g, z = new[row], old[row], logits[row]
        if part:
            turned.append(1 - f @ g / (np.linalg.norm(f) * np.linalg.norm(g)))
        else:
            entropy.append(np.log(np.exp(z).sum()) - z[batch.labels[row]])
    expected = {"classification": np.mean(entropy), "distillation": weight * np.mean(turned)}
    assert losses == pytest.approx(expected)


@pytest.mark.parametrize("old_rows", ["kept", "trained"])
def test_old_rows(lab, old_rows):
    method, stage, batch = second_task(lab, old_rows=old_rows)
    sum(stage.loss(batch).values()).backward()
    gradient = method.network.head.weight.grad
    assert gradient[3:].any() and bool(gradient[:3].any()) == (old_rows == "trained")


def test_without_exemplars_there_is_only_cross_entropy(lab):
    method, stage, batch = second_task(lab)
    new = batch.part == 0
    alone = Batch(batch.images[new], batch.labels[new], batch.part[new], batch.index[new])
    assert float(stage.loss(alone)["distillation"].detach()) == 0
    method.end_task(lab.make_tasks((3, 2))[1])
    assert method.teacher is None and list(method.readouts()) == ["linear"]


def test_bad_settings():
    with pytest.raises(FastcilError, match="weight is -1"):
        NCM.Config(weight=-1)
    with pytest.raises(FastcilError, match="trains is 'some'"):
        NCM.Config(trains="some")
