"""No step of any method or addon waits for the device; `DeviceWatch` says how that is seen here.

What runs is what `test_compositions` runs. Every method is looked at alone and every addon on a
method with one extractor, two of them on methods with several; the other compositions, which run
the same code, are marked as slow. On a CUDA device torch itself raises where a step would wait.

Exempt by name, for the reason given, is nothing but what `EXEMPT` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet
from compositions import ALONE, COMPOSED, DATA, OPTIONS, OWN
from device_watch import DEVICE, DeviceWatch
from torch import Tensor
from torch.nn import functional as F

import fastcil
import fastcil.engine.placement
from fastcil.compression import (
    CodecLearner,
    CodecRecipe,
    CodecTraining,
    StoredLatents,
    build_codec,
)
from fastcil.data import Examples, ImageStore
from fastcil.engine.trainer import Trainer
from fastcil.nn.recall import Recall
from fastcil.ops import send

# Where a wait can't be helped: words of its place -> why. Insertion into codecs whose images have
# sizes of their own happens between stages, so that not even that is here.
EXEMPT: dict[str, str] = {}

PER_CLASS = 4
QUICK = {*ALONE, ("er", "samc"), ("er", "mrdc"), ("der", "cim"), ("foster", "cam")}


def learn_two_tasks(
    composition: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    in_step: Callable[[], Any],
    placed: str = "host",
    **options: Any,
) -> None:
    """Learns two tasks of two classes; each step runs inside of what ``in_step`` gives.

    Images are ``placed`` in host memory or on the device, and so are exemplars.
    """
    if device == str(DEVICE):  # on which torch would find no memory of its own
        monkeypatch.setattr(fastcil.engine.placement, "device_free", lambda _: 1 << 30)
    method = composition.partition("+")[0]
    options = {**OPTIONS, **OWN.get(method, {}), "engine.data": placed, **options}
    del options["engine.checkpoint_seconds"]
    learner = fastcil.Learner(
        composition, memory="8 images", device=device, backbone=ConvNet, **options
    )
    step = Trainer._run_step

    def watched(trainer: Trainer, *args: Any) -> int:
        with in_step():
            return step(trainer, *args)

    monkeypatch.setattr(Trainer, "_run_step", watched)
    images, labels = DATA[0]
    for classes in ((0, 1), (2, 3)):
        learner.learn({str(k): images[np.equal(labels, k)][:PER_CLASS] for k in classes})
        wanted = torch.device(device if placed == "device" else "cpu")
        assert learner.memory.device.type == wanted.type
        assert learner.memory.device.index == wanted.index or device == "cuda"


CASES = [
    pytest.param("+".join(filter(None, pair)), marks=[] if pair in QUICK else [pytest.mark.slow])
    for pair in [*ALONE, *COMPOSED]
]


@contextmanager
def counted(watch: DeviceWatch, steps: list[int]) -> Iterator[None]:
    """One step, in which what waits is noted."""
    steps.append(1)
    with watch.counting():
        yield


def waits_of(composition: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """What waits for the make-believe device."""
    watch, steps = DeviceWatch(), list[int]()
    in_step = partial(counted, watch, steps)
    with watch.running():
        learn_two_tasks(composition, str(DEVICE), monkeypatch, in_step, **options)
    assert len(steps) >= 2
    # In steps and between them.
    assert watch.mixes == []
    return [wait for wait in watch.waits if not any(place in wait[1] for place in EXEMPT)]


@pytest.mark.parametrize("composition", CASES)
def test_no_step_waits_for_the_device(composition: str, monkeypatch) -> None:
    assert waits_of(composition, monkeypatch) == []


@pytest.mark.parametrize("composition", ["er", "foster+cim", "gem+samc"])
def test_no_step_waits_for_images_on_the_device(composition: str, monkeypatch) -> None:
    assert waits_of(composition, monkeypatch, placed="device") == []


@contextmanager
def no_waits_allowed() -> Iterator[None]:
    """Torch raises where something waits for a CUDA device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("placed", ["host", "device"])
@pytest.mark.parametrize("composition", CASES)
def test_no_step_waits_for_a_cuda_device(composition: str, placed: str, monkeypatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    learn_two_tasks(composition, "cuda", monkeypatch, no_waits_allowed, placed)


@pytest.mark.parametrize(
    "options",
    [
        {"cim.optimisation": "joint"},
        {"cim.foreground_ratio": 2.0, "cim.compress_all": True},
        {"augment.policy": "cifar", "augment.cutout": 2, "engine.precision": "bf16"},
    ],
    ids=lambda options: " ".join(options),
)
def test_no_step_waits_with_other_settings(options: dict[str, Any], monkeypatch) -> None:
    assert waits_of("foster+cim", monkeypatch, **options) == []


@pytest.mark.parametrize(
    ("composition", "options"),
    [
        ("er+samc", {"samc.analyse": True, "engine.forward_transfer": True}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("lecnet", {"lecnet.analyse": True, "lecnet.later.epochs": 200}),
                ("foster+cim", {"engine.knn": 2, "cim.threshold": "held-out"}),
                ("dlcft", {"dlcft.curvature": "ekfac"}),
                ("er+mrdc", {}),
            )
        ),
    ],
)
def test_a_run_never_mixes_devices(composition: str, options: dict[str, Any], tmp_path) -> None:
    watch = DeviceWatch()
    with watch.running():
        fastcil.train(
            composition,
            DATA,
            "lfs-2",
            "8 images",
            device=str(DEVICE),
            backbone=ConvNet,
            run_dir=tmp_path,
            **{**OPTIONS, **options},
        )
    assert watch.mixes == []


# A codec that learns from its own weights on: with its moving average, and with replay.
CODECS = {
    "pre-training": ("all", {"ema": 0.9}),
    "replay of images": ("kr", {}),
    "replay of streams": ("kr", {"target": "outputs"}),
    "replay towards outputs": ("kr", {"target": "outputs", "lambda_range": (4.0, 4096.0)}),
}


def train_a_codec(
    case: str, model: str, device: str, in_step: Callable[[], Any], monkeypatch
) -> None:
    """Two steps of a codec, each inside of what ``in_step`` gives."""
    strategy, changes = CODECS[case]
    step = Trainer._run_step

    def watched(trainer: Trainer, *args: Any) -> int:
        with in_step():
            return step(trainer, *args)

    monkeypatch.setattr(Trainer, "_run_step", watched)
    small = {} if model == "hierarchical-tiny" else {"hidden": 4, "latent": 4, "embedding": 4}
    # The first step makes what later ones go on with, such as the optimiser's state.
    recipe = CodecRecipe(epochs=1, lr=1e-3, batch_size=4)
    config = CodecTraining(recipe, 2, 64, strategy=strategy, **changes)
    images = ImageStore.from_batch(torch.arange(4 * 70 * 80 * 3).byte().view(4, 70, 80, 3))
    photos = Examples(images, torch.zeros(4, dtype=torch.int64))
    place = torch.device(device)
    codec = build_codec(model, **small).to(place)
    replay: Any = photos if strategy == "kr" else None
    if case == "replay of streams":
        shapes = codec.latent_shapes(64, 128)
        replay = StoredLatents(
            tuple(torch.randn(h * w, channels) for channels, h, w in shapes),
            torch.tensor([[64, 128]]),
            torch.tensor([64.0]),
            codec.latent_strides,
            codec.multiple,
        )
    learner = CodecLearner(codec, config, seed=0)
    stage = learner.stage(photos, replay)
    Trainer(learner, learner.augmentation, place, (0,), lambda *_: None).run([stage])


@pytest.mark.parametrize("case", CODECS)
@pytest.mark.parametrize("model", ["hierarchical-tiny", "msh-vr"])
def test_no_step_of_a_codec_waits(case: str, model: str, monkeypatch) -> None:
    watch, steps = DeviceWatch(), list[int]()
    in_step = partial(counted, watch, steps)
    with watch.running():
        train_a_codec(case, model, str(DEVICE), in_step, monkeypatch)
    assert len(steps) == 2
    assert watch.waits == [] and watch.mixes == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", CODECS)
@pytest.mark.parametrize("model", ["hierarchical-tiny", "msh-vr"])
def test_no_step_of_a_codec_waits_for_a_cuda_device(case: str, model: str, monkeypatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    train_a_codec(case, model, "cuda", no_waits_allowed, monkeypatch)


def test_no_step_waits_to_look_up_what_was_said(monkeypatch) -> None:
    plain = {"augment.crop": "none", "augment.flip": False, "augment.brightness": 0.0}
    longer = {"engine.epoch_scale": 0.03, "engine.batch_size": 8}
    looked, features = [], Recall.features

    def seen(recall: Recall, *arguments: Any) -> Tensor:
        before = recall.found
        found = features(recall, *arguments)
        looked.append(recall.found - before)
        return found

    monkeypatch.setattr(Recall, "features", seen)
    assert waits_of("der", monkeypatch, **plain, **longer) == []
    assert any(looked)


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x[0]),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "to the device": lambda x: torch.ones(2).to(x.device),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "mask": lambda x: x[x > 1],
    "masked_select": lambda x: x.masked_select(x > 1),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "bincount": lambda x: x.long().bincount(),
    "equal": lambda x: torch.equal(x, x + 0),
    "allclose": lambda x: torch.allclose(x, x + 0),
    "select": lambda x: x[x.long()[0]],
    "range": lambda x: range(x.long()[1]),
    "host index": lambda x: x[torch.tensor([0])],
    "set": lambda x: x.__setitem__(torch.ones_like(x).long(), 0.0),
    "copy_": lambda x: x.copy_(torch.ones(3)),
    "one_hot": lambda x: F.one_hot(x.long()),
}
GOES_ON: dict[str, Callable[[Tensor], Any]] = {
    "host": lambda x: torch.arange(3).tolist(),
    "number": lambda x: torch.where(x > 1, x, 0.0) * torch.tensor(2.0),
    "non_blocking": lambda x: torch.ones(3).to(x.device, non_blocking=True) + x,
    "made there": lambda x: torch.arange(3, device=x.device) + x,
    "one_hot": lambda x: F.one_hot(x.long(), 4),
    "mask": lambda x: x.__setitem__(x > 1, 0.0),
    "slice": lambda x: x.__setitem__(slice(1), 0.0),
    "index": lambda x: x[x.argsort()],
    "send": lambda x: send((torch.ones(3), torch.arange(3)), x.device)[0] + x,
    "repeat_interleave": lambda x: x.repeat_interleave(x.long(), output_size=3),
}


@pytest.mark.parametrize("name", [*WAITS, *(f"not {name}" for name in GOES_ON)])
def test_a_wait_is_told_from_none(name: str) -> None:
    watch, good = DeviceWatch(), name.removeprefix("not ")
    with watch.running():
        x = torch.arange(3.0).to(DEVICE)
        y = (x * 1).requires_grad_()
        assert (y.device, torch.arange(3).device) == (DEVICE, torch.device("cpu"))
        (GOES_ON if good != name else WAITS)[good](x)
        assert not watch.waits, "nothing counts outside of a step"
        with watch.counting():
            (GOES_ON if good != name else WAITS)[good](y.detach())
    assert bool(watch.waits) == (good == name), watch.waits


MIXED: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x + torch.ones(3),
    "cat": lambda x: torch.cat([x, torch.ones(3)]),
    "stack of numbers": lambda x: torch.stack([x[0], torch.tensor(1.0)]),
    "host indexed by the device": lambda x: torch.ones(3)[x.long()],
    "set": lambda x: x.__setitem__(x.argsort()[:2], torch.ones(2)),
    "gather": lambda x: x.gather(0, torch.zeros(1, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", [*MIXED, *(f"not {name}" for name in GOES_ON)])
def test_what_mixes_devices_is_seen_anywhere(name: str) -> None:
    watch, good = DeviceWatch(), name.removeprefix("not ")
    with watch.running():
        x = torch.arange(3.0).to(DEVICE)
        (GOES_ON if good != name else MIXED)[good](x)
    assert bool(watch.mixes) == (good == name), watch.mixes


def test_a_wait_in_a_backward_pass_is_seen() -> None:
    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient if gradient.sum() > 0 else -gradient

    watch = DeviceWatch()
    with watch.running():
        x = torch.ones(2).to(DEVICE).requires_grad_()
        with watch.counting():
            Looks.apply(x).sum().backward()
    assert [reason for reason, _ in watch.waits] == ["aten::_local_scalar_dense reads a scalar"]
