"""Weights to start from: every name they may come under, and what is said of those that don't fit.

The torchvision names are written out here; torchvision is not needed.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import ConvNet
from safetensors.torch import save_file
from torch import Tensor, nn

import fastcil
from fastcil.data import Augmentation
from fastcil.engine.context import EngineContext
from fastcil.engine.groups import NetworkOptions
from fastcil.engine.options import make_settings
from fastcil.engine.resolve import make_backbone_builder, settle
from fastcil.engine.weights import (
    StartingFrom,
    StateDict,
    fit,
    read_weights,
    save_weights,
)
from fastcil.errors import FastcilError
from fastcil.nn import build_backbone, resnet18, resnet20

SMALL = NetworkOptions("resnet20", 4, "cifar")
OPTIONS = {
    "network.name": "resnet20",
    "network.width": 4,
    "engine.epoch_scale": 0.01,
    "engine.progress": False,
}
DATA = "scenes:classes=4,size=32,train_per_class=4,test_per_class=2"


def random_weights(backbone: nn.Module, seed: int = 5) -> dict[str, Tensor]:
    """Values that no initialisation draws, of every tensor of a network."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, value in backbone.state_dict().items():
        drawn = 0.1 * torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            drawn = 1 + drawn.abs()
        made[name] = drawn if value.is_floating_point() else value + 7
    return made


def norm(prefix: str) -> list[str]:
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{prefix}.{part}" for part in parts]


def torchvision_names() -> list[str]:
    """The tensors of torchvision's resnet18, in the order it has them, but for its classifier."""
    names = ["conv1.weight", *norm("bn1")]
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            place = f"layer{layer}.{block}"
            for k in (1, 2):
                names += [f"{place}.conv{k}.weight", *norm(f"{place}.bn{k}")]
            if layer > 1 and block == 0:
                names += [f"{place}.downsample.0.weight", *norm(f"{place}.downsample.1")]
    return names


def started(tensors: dict[str, Tensor], backbone=lambda: resnet20(width=4)) -> nn.Module:
    """A network that starts from tensors passed in Python."""
    given = StateDict(tensors)
    return StartingFrom(backbone, given.name, given, None)()


def assert_has(backbone: nn.Module, weights: dict[str, Tensor]) -> None:
    own = backbone.state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], value) for name, value in weights.items())


def test_torchvisions_names_go_where_they_belong() -> None:
    names = torchvision_names()
    network = resnet18(width=8, stem="imagenet")
    assert len(names) == 120 and len(set(names)) == 120
    weights = random_weights(network)
    # Both libraries have the parts of a block in the same order.
    renamed = dict(zip(names, weights.values(), strict=True))
    renamed |= {"fc.weight": torch.zeros(1000, 64), "fc.bias": torch.zeros(1000)}
    assert_has(started(renamed, lambda: resnet18(width=8)), weights)
    found = fit(network, renamed)
    assert not found.odd and found.classifier == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "extractors.0.", "network."])
@pytest.mark.parametrize("inner", ["", "extractors.0."])
def test_prefixes_are_left_out(prefix: str, inner: str) -> None:
    weights = random_weights(resnet20(width=4))
    given = {f"{prefix}{inner}{name}": value for name, value in weights.items()}
    given |= {f"{prefix}head.weight": torch.zeros(3, 16), f"{prefix}fc.bias": torch.zeros(3)}
    assert_has(started(given), weights)


def test_the_first_of_several_extractors_is_taken() -> None:
    first, second = (random_weights(resnet20(width=4), seed) for seed in (1, 2))
    given = {f"network.extractors.0.{name}": value for name, value in first.items()}
    given |= {f"network.extractors.1.{name}": value for name, value in second.items()}
    with pytest.warns(UserWarning, match=r"in part: unexpected \d+ \(network\.extractors\.1\."):
        assert_has(started(given), first)


def test_a_users_own_backbone_starts_from_its_own_names() -> None:
    weights = random_weights(ConvNet())
    assert_has(started({f"module.{k}": v for k, v in weights.items()}, ConvNet), weights)


def test_what_does_not_fit_is_one_warning_that_names_it(recwarn: pytest.WarningsRecorder) -> None:
    weights = random_weights(resnet20(width=4), seed=11)
    given = {name: value for name, value in weights.items() if not name.startswith("stages.2")}
    given["stem.0.weight"] = torch.zeros(4, 3, 7, 7)
    given |= {"epoch": torch.zeros(()), "fc.weight": torch.zeros(2, 16)}
    network = started(given)
    started(given)
    assert len(recwarn) == 1
    said = str(recwarn[0].message)
    assert said.startswith("network.weights is 'state_dict:") and said.endswith(".")
    for part in (
        "missing 30 (stages.2.0.conv1.weight, stages.2.0.bn1.weight, stages.2.0.bn1.bias, ...)",
        "of another shape 1 (stem.0.weight (4, 3, 7, 7) for (4, 3, 3, 3))",
        "unexpected 1 (epoch)",
        "ignored as a classifier's 1 (fc.weight)",
    ):
        assert part in said
    own = network.state_dict()
    assert torch.equal(own["stages.1.0.conv1.weight"], given["stages.1.0.conv1.weight"])


def test_a_run_s_log_names_all_that_does_not_fit(tmp_path: Path) -> None:
    weights = random_weights(resnet20(width=4), seed=12)
    given = {name: value for name, value in weights.items() if not name.startswith("stages.2")}
    options = {**OPTIONS, "network.weights": {**given, "fc.bias": torch.zeros(2)}}
    with pytest.warns(UserWarning, match="in part: missing 30"):
        fastcil.train("finetune", DATA, "lfs-2", run_dir=tmp_path, **options)
    lines = (tmp_path / "seed-0" / "events.jsonl").read_text().splitlines()
    (event,) = (e for e in map(json.loads, lines) if e["event"] == "weights")
    counter = "num_batches_tracked"
    lost = [n for n in weights if n.startswith("stages.2") and not n.endswith(counter)]
    assert event["left over"] == {"missing": lost, "ignored as a classifier's": ["fc.bias"]}


def test_nothing_is_said_of_a_classifier_or_of_counters() -> None:
    weights = random_weights(resnet20(width=4))
    given = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    found = fit(resnet20(width=4), {**given, "head.bias": torch.zeros(2)})
    assert not found.odd and found.taken.keys() == given.keys()


def test_initial_draws_are_the_same_with_weights_and_without() -> None:
    """So that the head's are: they come after the extractor's."""
    weights = random_weights(resnet20(width=4))
    torch.manual_seed(0)
    started(weights)
    after = torch.rand(1)
    torch.manual_seed(0)
    resnet20(width=4)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: {"a.weight": torch.zeros(2)}, r"of whose 1 tensors none fits this ResNet"),
        (lambda: {}, "of whose 0 tensors none fits"),
        # Counters have no shape that could be wrong.
        (lambda: random_weights(resnet20(width=8)), r"stem\.0\.weight \(8, 3, 3, 3\) for \(4, 3"),
        (lambda: {"state_dict": {"a": torch.zeros(1)}}, "such as what lies under 'state_dict'"),
        (lambda: {"epoch": 3}, "holds a int under 'epoch'; pass a mapping"),
    ],
)
def test_weights_that_do_not_fit_at_all(make, says: str) -> None:
    with pytest.raises(FastcilError, match=says):
        started(make())


@pytest.mark.parametrize(
    "value, says",
    [
        (resnet20(width=4), r"is a network \(ResNet\); pass its state_dict\(\)"),
        ("w.pth", "load it yourself and pass the state_dict"),
        ("w.pt", "run code"),
        ("none.safetensors", "is no file"),
        (".", "is no file"),
        ("state_dict:0123456789abcdef", "pass it again"),
        (5, "network.weights' is '5'"),
    ],
)
def test_what_network_weights_may_not_be(value: Any, says: str) -> None:
    with pytest.raises(FastcilError, match=says):
        fastcil.train("er", DATA, "lfs-2", **{**OPTIONS, "network.weights": value})


def test_a_damaged_file_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_weights(file, random_weights(resnet20(width=4)), {})
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\x80\x04pickle", b"x" * 100):
        file.write_bytes(damaged)
        with pytest.raises(FastcilError, match="can't be read as safetensors"):
            read_weights(file)


def test_a_file_keeps_the_bits_and_is_the_same_each_time(tmp_path: Path) -> None:
    weights = random_weights(resnet20(width=4))
    description = {"network": {"name": "resnet20"}, "classes": ["a", "b"], "accuracy": 12.5}
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file in files:
        save_weights(file, weights, description)
    tensors, read = read_weights(files[0])
    assert read == description and tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[name], value) for name, value in weights.items())
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({}, None),
        ({"name": "resnet32"}, "made with network.name=resnet32, and the run has network.name=res"),
        ({"width": 16}, "network.width=16, and the run has network.width=4"),
        ({"stem": "small", "width": 8}, "network.width=8, network.stem=small, and"),
        ({"activation": "leaky"}, "network.activation=leaky, and the run has network.activation"),
    ],
)
def test_a_file_says_what_it_was_made_with(tmp_path: Path, changes, says: str | None) -> None:
    file = tmp_path / "w.safetensors"
    made = dataclasses.asdict(dataclasses.replace(SMALL, **changes))
    del made["weights"]
    weights = random_weights(resnet20(width=4))
    save_weights(file, weights, {"network": made})
    start = StartingFrom(lambda: resnet20(width=4), str(file), None, SMALL)
    if says is None:
        assert_has(start(), weights)
    else:
        with pytest.raises(FastcilError, match=says):
            start()


def test_weights_of_relu_start_a_network_of_leaky_relu(tmp_path: Path) -> None:
    """The conversion of Shon et al. (2022); the other way round it would be a mistake."""
    file = tmp_path / "w.safetensors"
    weights = random_weights(resnet20(width=4))
    save_weights(file, weights, {"network": {"name": "resnet20", "activation": "relu"}})
    leaky = dataclasses.replace(SMALL, activation="leaky")

    def build() -> nn.Module:
        return build_backbone("resnet20", 4, stem="cifar", activation="leaky")

    assert_has(StartingFrom(build, str(file), None, leaky)(), weights)


def test_settling_leaves_nothing_open() -> None:
    flags = {"last_relu": True, "zero_init_residual": False}
    assert settle(NetworkOptions(), 224) == NetworkOptions("resnet18", 64, "imagenet", **flags)
    assert settle(NetworkOptions(name="resnet18", stem="imagenet"), 32).stem == "imagenet"
    assert settle(NetworkOptions(width=5), 33) == NetworkOptions("resnet32", 5, "cifar", **flags)


@pytest.mark.parametrize("asked", [None, True, False])
def test_a_network_ends_as_asked_or_as_published(asked):
    options = NetworkOptions(name="resnet20", width=4, last_relu=asked)
    build = make_backbone_builder(options, 32, {"last_relu": False, "zero_init_residual": True})
    network = build()
    assert isinstance(network.stages[-1][-1].relu2, nn.ReLU if asked else nn.Identity)
    assert not any(network.stages[k][0].bn2.weight.any() for k in range(3))


def test_a_network_without_blocks_is_not_asked_what_it_has_not():
    published = {"last_relu": False}
    make_backbone_builder(NetworkOptions(name="mlp", width=4), 8, published)()
    with pytest.raises(FastcilError, match="last_relu is True, and 'mlp' has none"):
        make_backbone_builder(NetworkOptions(name="mlp", width=4, last_relu=True), 8)()


@pytest.mark.parametrize("method", ["finetune", "joint"])
def test_every_new_extractor_starts_from_the_weights(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked as they are made: before anything trains them."""
    weights = random_weights(resnet20(width=4), seed=21)
    made: list[dict[str, Tensor]] = []
    make = EngineContext.make_backbone

    def watched(self: EngineContext) -> nn.Module:
        backbone = make(self)
        made.append({k: v.clone() for k, v in backbone.state_dict().items()})
        return backbone

    monkeypatch.setattr(EngineContext, "make_backbone", watched)
    fastcil.train(method, DATA, "lfs-2", "8 images", **{**OPTIONS, "network": {"weights": weights}})
    # Two checks before the run, and one extractor, or one for each task.
    assert len(made) == 2 + (2 if method == "joint" else 1)
    for state in made:
        assert all(torch.equal(state[name], value) for name, value in weights.items())


def test_a_state_dict_is_kept_by_its_checksum(tmp_path: Path) -> None:
    weights = random_weights(resnet20(width=4), seed=31)
    settings = make_settings("er", {"network.weights": weights})
    name = settings.groups["network"].weights
    assert name.startswith("state_dict:") and settings.as_dict()["network"]["weights"] == name
    # The same bits, the same name, whatever the order; others, another.
    turned = dict(reversed(weights.items()))
    assert make_settings("er", {"network": {"weights": turned}}).groups["network"].weights == name
    gc.collect()
    assert StateDict.find(name) is settings.state_dict
    other = {**weights, "stem.0.weight": weights["stem.0.weight"] + 1e-6}
    assert make_settings("er", {"network.weights": other}).groups["network"].weights != name
    # Settings made anew from plain data, as a run that goes on makes them.
    again = make_settings("er", {"network.weights": name})
    assert again.state_dict is make_settings("er", {"network.weights": name}).state_dict
    assert again.state_dict.values.keys() == weights.keys()
    del settings, again
    gc.collect()
    assert StateDict.find(name) is None


def test_training_after_it_was_handed_over_does_not_change_it() -> None:
    network = resnet20(width=4)
    given = StateDict(network.state_dict())
    before = given.values["stem.0.weight"].clone()
    nn.init.ones_(network.stem[0].weight)
    assert torch.equal(given.values["stem.0.weight"], before)


def test_a_run_names_its_state_dict_and_goes_on_with_the_same(tmp_path: Path) -> None:
    weights = random_weights(resnet20(width=4), seed=41)
    options = {**OPTIONS, "network.weights": weights}

    def run(**options: Any) -> fastcil.Result:
        return fastcil.train("der", DATA, "lfs-2", "8 images", run_dir=tmp_path, **options)

    first = run(**options)
    assert first.config["network"]["weights"].startswith("state_dict:")
    # The same weights find the run again; others are another run.
    assert run(**options).accuracy_matrix.tobytes() == first.accuracy_matrix.tobytes()
    with pytest.raises(FastcilError, match=r"network\.weights was state_dict:"):
        run(**{**options, "network.weights": random_weights(resnet20(width=4), seed=42)})


def test_a_run_goes_on_with_the_same_file_only(tmp_path: Path, monkeypatch: Any) -> None:
    file, moved = tmp_path / "w.safetensors", tmp_path / "moved.safetensors"
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(random_weights(resnet20(width=4), seed=43), file)

    def run(weights: Path | str) -> fastcil.Result:
        options = {**OPTIONS, "network.weights": weights, "run_dir": tmp_path / "run"}
        return fastcil.train("finetune", DATA, "lfs-2", **options)

    first = run(file)
    file.rename(moved)
    # It is known by what is in it, wherever it lies.
    for place in (moved, "~/moved.safetensors"):
        assert run(place).accuracy_matrix.tobytes() == first.accuracy_matrix.tobytes()
    save_file(random_weights(resnet20(width=4), seed=44), file)
    with pytest.raises(FastcilError, match=r"network\.weights was sha256 \w{16}, now sha256"):
        run(file)


def images(value: int) -> np.ndarray:
    return np.random.default_rng(value).integers(0, 255, (4, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("passed", ["a file", "a state_dict"])
def test_loading_needs_no_weights_but_a_new_extractor_does(passed: str, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    weights = random_weights(resnet20(width=4), seed=51)
    save_file(weights, file)
    given: Any = str(file) if passed == "a file" else dict(weights)
    learner = fastcil.Learner("joint", "8 images", **{**OPTIONS, "network.weights": given})
    learner.learn({"a": images(0), "b": images(1)})
    expected = learner.predict(images(9)).scores
    saved = tmp_path / "learner.safetensors"
    learner.save(saved)
    file.unlink()
    del learner
    gc.collect()
    loaded = fastcil.Learner.load(saved)
    assert torch.equal(loaded.predict(images(9)).scores, expected)
    with pytest.raises(
        FastcilError, match=r"is no file" if passed == "a file" else "pass it again"
    ):
        loaded.learn({"c": images(2)})
    # That failed, and left the learner as it was.
    assert torch.equal(loaded.predict(images(9)).scores, expected)
    # Given back, it goes on.
    save_file(weights, file)
    kept = StateDict.of(weights)
    loaded = fastcil.Learner.load(saved)
    assert loaded.learn({"c": images(2)}).class_names == ("a", "b", "c")
    assert kept.name


def test_a_bare_extractor_is_of_the_same_shape_and_reads_nothing() -> None:
    def fails() -> nn.Module:
        raise AssertionError("it read the weights")

    bare = EngineContext(
        fails, Augmentation.cifar(), torch.device("cpu"), bare=lambda: resnet20(width=4)
    ).bare_backbone()
    assert bare.out_channels == 16
    same = EngineContext(lambda: resnet20(width=4), Augmentation.cifar(), torch.device("cpu"))
    assert same.bare_backbone().out_channels == 16
