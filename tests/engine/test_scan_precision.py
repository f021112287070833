"""Scans compute in what engine.scan_precision says, but for curvature; all answer in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backbones import ConvNet
from torch import nn

from fastcil.curvature import make_curvature
from fastcil.curvature.anchor import scan_of
from fastcil.data import Augmentation, Examples, ImageStore
from fastcil.engine.context import EngineContext
from fastcil.engine.learner import Learner
from fastcil.engine.options import make_settings
from fastcil.errors import FastcilError
from fastcil.memory.codecs.raw import RawCodec

STORE = ImageStore.from_batch(torch.arange(6 * 8 * 8 * 3).view(6, 8, 8, 3).to(torch.uint8))
EXAMPLES = Examples(STORE, torch.arange(6))


@pytest.mark.parametrize("scanned", [None, torch.bfloat16])
def test_a_scan_s_function_is_under_autocast(scanned):
    context = EngineContext(
        ConvNet, Augmentation.cifar(size=8), torch.device("cpu"), 4, scanned=scanned
    )
    torch.manual_seed(0)
    backbone, seen = context.make_backbone().eval(), []

    def features(images):
        maps = backbone(images)
        seen.append(maps.dtype)
        return maps

    found = context.scan(features, EXAMPLES)
    assert set(seen) == {scanned or torch.float32} and found.dtype == torch.float32
    plain = EngineContext(ConvNet, context.augmentation, context.device, 4)
    torch.testing.assert_close(found, plain.scan(backbone, EXAMPLES), rtol=0.05, atol=0.05)


def test_labels_and_hits_stay_what_they_are():
    context = EngineContext(
        ConvNet, Augmentation.cifar(size=8), torch.device("cpu"), scanned=torch.bfloat16
    )
    labels, hits = context.scan_labelled(lambda x, y, size: (y, y > 2), EXAMPLES)
    assert labels.dtype == torch.int64 and hits.dtype == torch.bool


@pytest.mark.parametrize("kind", ["diagonal", "mas", "kfac", "tkfac", "ekfac"])
def test_curvature_is_measured_in_the_weights_precision(kind):
    found = {}
    for scanned in (None, torch.bfloat16):
        context = EngineContext(
            ConvNet, Augmentation.cifar(size=8), torch.device("cpu"), 4, scanned=scanned
        )
        torch.manual_seed(0)
        backbone = context.make_backbone()
        features = backbone.out_channels
        model = nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model.append(nn.Linear(features, 6))
        curvature = make_curvature(kind, model)
        scan, generator = scan_of(context, model, EXAMPLES), torch.Generator()
        curvature.measure(scan, generator.manual_seed(1))
        found[scanned] = curvature.tensors()
    plain, half = found.values()
    assert plain.keys() == half.keys() and len(plain) > 2
    assert all(torch.equal(value, half[name]) for name, value in plain.items())


def test_the_option_reaches_the_scan():
    learner = Learner("finetune", "none", backbone=ConvNet, **{"engine.scan_precision": "bf16"})
    learner.prepare(STORE)
    assert learner.parts.context.scanned == torch.bfloat16
    with pytest.raises(FastcilError, match=r"engine\.scan_precision"):
        make_settings("finetune", {"engine.scan_precision": "fp8"})


@pytest.mark.parametrize("per_class", [3, 40])
def test_one_scan_chooses_what_scans_by_class_choose(per_class, monkeypatch):
    """Byte for byte, through a network with batch norms; batches hold several classes, or part."""
    images = np.random.default_rng(0).integers(0, 256, (6, per_class, 12, 12, 3), np.uint8)

    def memories():
        options = {"engine.epoch_scale": 0.01, "engine.progress": False, "engine.scan_batch": 16}
        learner = Learner("icarl", "11 images", backbone=ConvNet, **options)
        found = []
        for classes in (range(3), range(3, 6)):
            learner.learn({str(k): images[k] for k in classes})
            found.append(learner.memory.checksum())
        return found

    together = memories()
    monkeypatch.setattr(RawCodec, "leaves_images", False)
    assert memories() == together
