"""LEC-Net against Yang et al. (2021), written naively."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from backbones import ConvNet
from torch.nn import functional as F

from fastcil import train
from fastcil.contract import evaluating
from fastcil.errors import FastcilError
from fastcil.methods.finetune import Finetune
from fastcil.methods.lecnet import LECNet
from fastcil.nn.growing import expanded_backbone

C = 6


def make(lab, epochs=2, **options):
    torch.manual_seed(0)
    return LECNet(lab.shorten(LECNet.Config(**options), epochs=epochs), lab.context)


def at_task(lab, method, tasks):
    """The stage of the last of some tasks, which is begun."""
    *before, task = tasks
    for earlier in before:
        lab.learn(method, earlier)
        method.release()
    torch.manual_seed(5)
    method.begin_task(task)
    (stage,) = method.stages(task)
    return stage


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("expansion", ["none", "sa"])
def test_the_base_session_is_that_of_finetuning(lab, expansion, normalised):
    first = lab.make_tasks((3, 2))[0]
    method = make(lab, expansion=expansion, normalised=normalised)
    plain = Finetune.Config(first=LECNet.Config().first, normalised=normalised)
    other = Finetune(lab.shorten(plain, epochs=2), lab.context)
    loops = [lab.learn(one, first) for one in (method, other)]
    assert method.network.structure() == other.network.structure()
    assert loops[0].losses["lecnet"] == loops[1].losses["finetune"]


@pytest.mark.parametrize("fuse", ["sum", "concat"])
@pytest.mark.parametrize("expansion", ["none", "ne", "nc", "sa"])
def test_loss(lab, expansion, fuse):
    """Eqs. 2, 3, 5 and 8 in a third task, on what Eq. 4 gives of two expansions."""
    options = {"distillation_weight": 0.7, "temperature": 3.0, "compression_weight": 0.3}
    options |= {"tau": 0.3, "price": 0.2, "gamma": 0.6}
    method = make(lab, expansion=expansion, fuse=fuse, **options)
    stage = at_task(lab, method, lab.make_tasks((3, 2, 2)))
    lab.Loop().begin(stage)
    method.double()
    batch = lab.batch_of(stage.streams[0], torch.arange(0, 24, 3))
    batch = replace(batch, images=batch.images.double())
    network = method.network
    expanded = expanded_backbone(network)
    with evaluating(method), torch.no_grad():
        extractor = network.extractors[0]
        if expanded is not None:
            extractor = expanded.backbone
            expanded.newest.beta.fill_(9.0)
        base = features = extractor(batch.images).mean((2, 3)).numpy()
        rates = []
        for e in [] if expanded is None else expanded.each():
            new = np.zeros((len(base), C))
            rows = e.weight[:, :, 0, 0].numpy()
            kept = [i for i in range(C) if e.place[i] < e.nodes]
            outputs = base @ rows.T
            alpha = {
                "ne": np.ones_like(outputs),
                "nc": None,
                "sa": 1 / (1 + np.exp(-float(e.beta) * outputs)),
            }[expansion]
            if alpha is None:
                alpha = np.tile(1 / (1 + np.exp(-e.s.numpy())), (len(base), 1))
            new[:, kept] = alpha * outputs
            rates.append(alpha.mean())
            features = (
                0.6 * features + new
                if fuse == "sum"
                else np.concatenate([0.6 * features, new[:, kept]], 1)
            )
        logits = features @ network.head.weight.numpy().T + network.head.bias.numpy()
        taught = method.teacher(batch.images).numpy()
        losses = {k: float(v) for k, v in stage.loss(batch).items()}
    entropies = [-np.log(softmax(z)[y]) for z, y in zip(logits, batch.labels.tolist(), strict=True)]
    distilled = [
        -(softmax(old / 3) * np.log(softmax(z[:5] / 3))).sum()
        for z, old in zip(logits, taught, strict=True)
    ]
    expected = {
        "classification": np.mean(entropies),
        "distillation": 0.7 * np.mean(distilled),
    }
    if expansion == "sa":
        expected["compression"] = 0.3 * (max(rates[-1] - 0.3, 0) + 0.2 * 0.3)
    if expansion == "nc":
        far = ((expanded.newest.s.detach().abs().numpy() - 10) ** 2).sum()
        expected["compression"] = 0.3 * (far + max(rates[-1] - 0.3, 0))
    assert losses == pytest.approx(expected, rel=1e-6)


def test_compression_moves_the_new_nodes_and_tau_alone(lab):
    method = make(lab, tau=0.1)
    stage = at_task(lab, method, lab.make_tasks((3, 2, 2)))
    lab.Loop().begin(stage)
    method.zero_grad()
    loss = stage.loss(lab.batch_of(stage.streams[0], torch.arange(8)))["compression"]
    loss.backward()
    moved = {n for n, p in method.network.named_parameters() if p.grad is not None}
    newest = "extractors.0.expansions.1."
    assert moved == {newest + "weight", newest + "level"}


WHOLE = ("backbone.layers.0.weight", "backbone.layers.1.bias", "backbone.layers.3.weight")


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({}, ()),
        ({"learn_tau": False}, ("expansions.1.level",)),
        ({"expansion": "nc"}, ("expansions.1.level",)),
        ({"trains": "last-block"}, WHOLE[:1]),
        ({"trains": "expansion"}, WHOLE),
        ({"expansion": "none", "trains": "expansion"}, WHOLE),
    ],
    ids=str,
)
def test_what_a_session_trains(lab, options, left_out):
    method = make(lab, **options)
    stage = at_task(lab, method, lab.make_tasks((3, 2, 2)))
    loop = lab.Loop()
    loop.begin(stage)
    trained = loop.trained["lecnet"]
    assert {"network.head.weight", "network.head.bias"} <= set(trained)
    assert not any("expansions.0" in name or "teacher" in name for name in trained)
    prefix = "network.extractors.0."
    plain = options.get("expansion") == "none"
    names = {n.removeprefix("backbone.") if plain else n for n in left_out}
    assert not {prefix + n for n in names} & set(trained)
    for name in {*WHOLE, "expansions.1.weight"} - set(left_out):
        if not plain:
            assert prefix + name in trained
    frozen = options.get("trains") == "expansion"
    backbone = method.network.extractors[0] if plain else method.network.extractors[0].backbone
    assert backbone.training != frozen
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    loop.run(stage)
    same = all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert same == frozen


def test_indicators_sharpen_and_the_last_epochs_beta_is_kept(lab):
    method, seen = make(lab, epochs=3), []
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)

    def probe(stage, epoch):
        seen.append(float(expanded_backbone(method.network).newest.beta))

    lab.learn(method, second, probe)
    assert seen == [1.0, 2.0, 3.0]
    assert float(method.state_dict()["network.extractors.0.expansions.0.beta"]) == 3


@pytest.mark.parametrize("removal", ["unused", "mean"])
@pytest.mark.parametrize("fuse", ["sum", "concat"])
def test_nodes_that_a_task_does_not_use_are_removed(lab, fuse, removal):
    method = make(lab, fuse=fuse, removal=removal)
    first, second = lab.make_tasks((3, 2))
    lab.learn(method, first)
    stage = at_task(lab, method, [second])
    expanded = expanded_backbone(method.network)
    expanded.newest.weight.data[:2] = -1.0  # The features are not below zero.
    lab.Loop().run(replace(stage, recipe=replace(stage.recipe, epochs=1, lr=1e-6), finish=None))
    images = lab.read(second.examples, range(len(second.examples)))
    with evaluating(method), torch.no_grad():
        pooled = expanded.backbone(images).mean((2, 3))
        alpha = torch.sigmoid(pooled @ expanded.newest.weight[:, :, 0, 0].T)
        wanted = (alpha >= 0.5).any(0) if removal == "unused" else alpha.mean(0) >= 0.5
        keep = torch.where(wanted, 1.0, 0.0)
        outputs = keep * alpha * (pooled @ expanded.newest.weight[:, :, 0, 0].T)
        old = 0.8 * pooled
        features = old + outputs if fuse == "sum" else torch.cat([old, outputs], 1)
        expected = method.network.head(features)
    method.train()
    stage.finish()
    assert 0 < expanded.newest.nodes == int(wanted.sum()) < C
    with evaluating(method), torch.no_grad():
        torch.testing.assert_close(method.logits(images), expected, rtol=1e-5, atol=1e-6)
    assert [e.nbytes for e in method.retained()] == [
        sum(v.numel() * v.element_size() for v in expanded.expansions.state_dict().values())
    ]
    (record,) = method.records()
    assert record.payload["y"]["nodes kept, of 1"] == [expanded.newest.nodes / C]


def test_a_smaller_network_is_saved(tmp_path, monkeypatch):
    """And read again, and trained on; all through the engine."""
    rng = np.random.default_rng(0)
    labels = [k for k in range(4) for _ in range(8)]
    images = rng.integers(0, 256, (len(labels), 16, 16, 3), np.uint8)
    data, width = ((images, labels), (images[::4], labels[::4])), 40

    def run(folder):
        options = {"engine.epoch_scale": 0.02, "engine.progress": False, "augment.size": 12}
        options["lecnet.fuse"] = "concat"
        learner = train(
            "lecnet",
            data,
            "lfs-2",
            "none",
            run_dir=folder,
            backbone=lambda: ConvNet((4, width)),
            **options,
        ).learner
        size = (folder / "seed-0" / "learner.safetensors").stat().st_size
        return learner, size, expanded_backbone(learner.method.network).newest.nodes

    learner, size, nodes = run(tmp_path / "compressed")
    with monkeypatch.context() as patch:
        patch.setattr("fastcil.methods.lecnet.compress", lambda network, keep: None)
        _, whole, all_nodes = run(tmp_path / "whole")
    assert 0 < nodes < all_nodes == width
    # A row of the expansion, and a column of the head; headers of files are a little apart.
    assert whole - size == pytest.approx(4 * (width + 4) * (width - nodes), abs=200)
    learner.learn({"new": images[:8]})
    older, newer = expanded_backbone(learner.method.network).each()
    assert older.nodes == nodes and newer.nodes <= width


@pytest.mark.parametrize("fuse", ["sum", "concat"])
@pytest.mark.parametrize("expansion", ["none", "sa"])
def test_analyses(lab, expansion, fuse):
    method = make(lab, expansion=expansion, fuse=fuse, analyse=True, samples=7)
    tasks = lab.make_tasks((3, 2, 2))
    found = []
    for task in tasks:
        lab.learn(method, task)
        with evaluating(method), torch.no_grad():
            kept = method.analysis
            images = kept.kept.pixels.view(-1, 8, 8, 3).permute(0, 3, 1, 2) / 127.5 - 1.0
            found.append(method.network.features(images).double())
        if task.first:
            assert len(images) == 7 and torch.equal(found[0].float(), kept.start)
    expected = []
    for now in found:
        before = F.pad(found[0], (0, now.shape[1] - C))
        inner = (before * now).sum(1) / (before.norm(dim=1) * now.norm(dim=1))
        expected.append(float(torch.arccos(inner.clamp(-1, 1)).mean()))
    records = {record.title: record.payload for record in method.records()}
    assert records["Feature drift"]["y"]["images of the first task"] == pytest.approx(
        expected, abs=1e-6
    )
    assert expected[0] < 1e-3 < expected[1] and json.dumps(records)
    (held,) = [entry for entry in method.retained() if entry.kind == "analysis"]
    assert held.nbytes >= 7 * 8 * 8 * 3
    if expansion == "none":
        assert set(records) == {"Feature drift"}
        return
    lines = records["Indicators of the newest nodes"]
    assert lines["x"] == [0, 1, 2] and set(records) > {"Retention rate"}
    low, high, mean, tau = lines["y"].values()
    assert all(0 <= share <= 1 for line in (low, high, mean, tau) for share in line)
    assert mean[0] == pytest.approx(0.5, abs=0.1) and low[0] == high[0] == 0
    newest = expanded_backbone(method.network).newest.requires_grad_(False)
    assert tau[-1] == pytest.approx(newest.tau.item(), abs=1e-6)


def test_what_is_looked_at_changes_nothing(lab):
    tasks = lab.make_tasks((3, 2))
    networks = []
    for analyse in (False, True):
        method = make(lab, analyse=analyse)
        for task in tasks:
            lab.learn(method, task)
        networks.append(method.network.state_dict())
    assert all(torch.equal(v, networks[1][k]) for k, v in networks[0].items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"expansion": "all"}, "expansion is 'all'"),
        ({"tau": 1.5}, "tau is 1.5"),
        ({"price": -0.1}, "price is -0.1"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"samples": 0}, "samples is 0"),
        ({"compression_weight": -1.0}, "compression_weight is -1.0"),
    ],
)
def test_bad_settings_are_a_sentence(options, says):
    with pytest.raises(FastcilError, match=says):
        LECNet.Config(**options)
