"""PODNet's published settings, and what PyCIL trains otherwise."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fastcil.methods.podnet import PODNet


def test_pycil_finetunes_all_but_old_proxies_with_the_distillation(lab):
    config = replace(lab.shorten(PODNet.PRESETS["pycil"], batch=8), proxies=2)
    method, tasks = PODNet(config, lab.context), lab.make_tasks((3, 2))
    for task in tasks:
        method.begin_task(task)
        stages = method.stages(task)
    stage = stages[1]
    trained = {id(p) for p in stage.parameters()}
    assert id(method.head.new) in trained and id(method.head.old) not in trained
    assert {id(p) for p in method.network.extractors.parameters()} <= trained
    batch = lab.batch_of(stages[0].streams[0], torch.arange(8))
    assert set(stage.loss(batch)) == {"classification", "flat", "spatial"}


def test_recipes_follow_the_presets():
    paper, imagenet = PODNet.Config(), PODNet.PRESETS["imagenet"]
    pycil = PODNet.PRESETS["pycil"]
    for config in (paper, imagenet, pycil):
        clip = 0.0 if config is pycil else 5.0
        assert config.train.clip_value == config.finetune.clip_value == clip
        assert config.train.weight_decay == config.finetune.weight_decay == 5e-4
        assert config.finetune.epochs == 20 and config.proxies == 10
        constant = config.finetune.lr_at(0) == config.finetune.lr_at(19)
        assert constant == (config.finetunes == "proxies") == (config is not pycil)
    assert [round(paper.train.lr_at(e), 6) for e in (0, 40, 80, 120)] == [
        0.1,
        round(0.05 * (1 + math.sqrt(0.5)), 6),
        0.05,
        round(0.05 * (1 - math.sqrt(0.5)), 6),
    ]
    assert (paper.train.epochs, paper.train.batch_size, paper.finetune.lr) == (160, 128, 0.05)
    assert (imagenet.train.epochs, imagenet.train.lr, imagenet.train.batch_size) == (90, 0.05, 64)
    assert (imagenet.finetune.lr, imagenet.finetune.batch_size) == (0.01, 64)
    weights = [(c.spatial_weight, c.flat_weight) for c in (paper, imagenet, pycil)]
    assert weights == [(3.0, 1.0), (8.0, 10.0), (5.0, 1.0)] and pycil.finetune.lr == 0.005
