"""`fastcil pretrain`: a run like others, and a file that others start from."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import fastcil
from fastcil.cli import main
from fastcil.data import load, read_batch
from fastcil.engine.learner import Learner
from fastcil.engine.trainer import Trainer
from fastcil.engine.weights import read_weights
from fastcil.errors import FastcilError
from fastcil.nn import LinearHead, Network, build_backbone

DATA = "scenes:classes=3,size=32,train_per_class=12,test_per_class=4"
NETWORK = ["--network.name=resnet20", "--network.width=4"]
FLAGS = [f"--data={DATA}", "--epochs=1", "--batch_size=16", "--engine.progress=false", *NETWORK]
FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    assert main(["pretrain", *FLAGS, f"--run-dir={folder}"]) == 0
    return folder


def saved_network(file: Path, activation: str = "relu") -> Network:
    """What the file holds, put together without fastcil's engine."""
    tensors, _ = read_weights(file)
    head = LinearHead(16, 3)
    head.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("head.")})
    extractor = build_backbone("resnet20", 4, stem="cifar", activation=activation)
    extractor.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("head.")})
    return Network([extractor], head).eval()


def test_the_file_holds_the_run_s_extractor_and_classifier_to_the_bit(trained: Path) -> None:
    learner = Learner.load(trained / "seed-0" / "learner.safetensors", device="cpu")
    network = saved_network(trained / "weights.safetensors")
    for name, value in learner.method.network.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


@torch.no_grad()
def test_its_accuracy_is_the_one_it_says(trained: Path) -> None:
    """Rows of the classifier are the data set's labels; mean and std are those of the images."""
    file = trained / "weights.safetensors"
    _, description = read_weights(file)
    test = load(DATA).test
    learner = Learner.load(trained / "seed-0" / "learner.safetensors", device="cpu")
    index = torch.arange(len(test))
    images = read_batch(
        [test.images],
        torch.zeros_like(index),
        index,
        learner.parts.augmentation,
        crops=learner.parts.augmentation.centre(test.images.sizes),
        flips=torch.zeros(len(test), dtype=torch.bool),
        device=torch.device("cpu"),
    )
    right = saved_network(file)(images).argmax(1) == test.labels
    assert description["accuracy"] == pytest.approx(100 * float(right.float().mean()))
    assert description["classes"] == list(load(DATA).class_names)
    assert description["network"] == {
        **{"name": "resnet20", "width": 4, "stem": "cifar", "activation": "relu"}
    }
    augmentation = learner.parts.augmentation
    assert description["mean"] == list(augmentation.mean) and description["size"] == 32


def test_the_defaults_are_those_of_shon_et_al(trained: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((trained / "config.yaml").read_text())
    recipe = {**config["finetune"]["first"], "epochs": 100, "batch_size": 256}
    assert recipe == {
        **{"epochs": 100, "lr": 0.1, "schedule": "cosine", "momentum": 0.9, "weight_decay": 1e-5},
        **{"batch_size": 256, "optimizer": "sgd", "warmup": 0, "clip": 0.0},
        **{"milestones": [], "gamma": 0.1, "clip_value": 0.0, "nesterov": False},
    }
    learner = Learner.load(trained / "seed-0" / "learner.safetensors", device="cpu")
    look = learner.parts.augmentation
    assert (look.crop, look.padding, look.flip, look.policy) == ("padded", 4, True, "none")
    assert (look.brightness, look.contrast, look.cutout) == (0.0, 0.0, 0)
    assert config["scenario"] == "lfs-1" and config["engine"]["order_seed"] is None


def test_what_it_was_made_with_is_in_the_file(trained: Path) -> None:
    with safe_open(trained / "weights.safetensors", framework="pt") as file:
        description = json.loads(file.metadata()["fastcil"])
    environment = yaml.safe_load((trained / "environment.yaml").read_text())
    assert description["environment"].keys() == environment.keys()
    assert description["environment"]["torch"] == torch.__version__
    assert description["data"] == DATA


def test_a_finished_one_is_read_and_its_file_written_again(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trainer, "run", None)
    file = trained / "weights.safetensors"
    before = file.read_bytes()
    file.unlink()
    assert main(["pretrain", *FLAGS, f"--run_dir={trained}"]) == 0
    assert file.read_bytes() == before
    accuracy = read_weights(file)[1]["accuracy"]
    assert capsys.readouterr().out.splitlines() == [
        f"weights: {file}",
        f"test accuracy: {accuracy:.2f} %",
        f"report: {trained / 'report.html'}",
    ]


def test_a_run_starts_from_the_file(trained: Path, tmp_path: Path) -> None:
    """Without an epoch that would change them."""
    file = trained / "weights.safetensors"
    options = {"network.name": "resnet20", "network.width": 4, "engine.progress": False}
    made = fastcil.pretrain(
        DATA, tmp_path / "run", epochs=0, **{**options, "network.weights": file}
    )
    before, after = read_weights(file)[0], read_weights(made.weights)[0]
    assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith("head."))
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_relu_to_leaky_relu(trained: Path, tmp_path: Path) -> None:
    file, folder = trained / "weights.safetensors", tmp_path / "leaky"
    flags = [f"--network.weights={file}", "--network.activation=leaky", "--lr=1e-4"]
    assert main(["pretrain", *FLAGS, *flags, f"--run_dir={folder}"]) == 0
    tensors, description = read_weights(folder / "weights.safetensors")
    assert description["network"]["activation"] == "leaky"
    assert description["config"]["network"]["weights"] == str(file)
    before = read_weights(file)[0]
    moved = [
        float((tensors[name] - value).abs().max())
        for name, value in before.items()
        if name.startswith("stages") and name.endswith("conv1.weight")
    ]
    # Trained, but by very little.
    assert min(moved) > 0 and max(moved) < 1e-2
    # Such weights are not taken for those of a network with ReLU.
    leaky = f"--network.weights={folder / 'weights.safetensors'}"
    assert main(["pretrain", *FLAGS, leaky, f"--run_dir={tmp_path / 'x'}"]) == 2
    assert not (tmp_path / "x").exists()


def test_python_and_the_command_line_make_the_same(trained: Path, tmp_path: Path) -> None:
    made = fastcil.pretrain(
        DATA,
        tmp_path / "run",
        epochs=1,
        batch_size=16,
        precision="fp32",
        **{"network": {"name": "resnet20", "width": 4}, "engine.progress": False},
    )
    ours, theirs = read_weights(made.weights)[0], read_weights(trained / "weights.safetensors")[0]
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert made.accuracy == made.result.last_accuracy
    assert made.result.learner.class_names == load(DATA).class_names


@pytest.mark.parametrize(
    "options, says",
    [
        ({"epochs": -1}, "epochs is -1"),
        ({"finetune.first.lr": 0.3}, "option 'finetune.first.lr' is unknown"),
        ({"network.widht": 4}, "did you mean 'network.width'"),
        ({"precision": "fp8"}, "engine.precision"),
    ],
)
def test_bad_arguments_are_a_sentence(options, says: str, tmp_path: Path) -> None:
    with pytest.raises(FastcilError, match=says):
        fastcil.pretrain(DATA, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_killed_and_started_again_it_makes_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL in the middle of training; the rest of the way ends in the same bits."""
    FORKS.set_forkserver_preload(["fastcil.cli", "fastcil.engine.arguments", "torch._dynamo"])
    long = [*FLAGS, "--epochs=4", "--batch_size=9"]
    saving = ["--engine.checkpoint_seconds=0", "--engine.threads=1"]
    folder = tmp_path / "killed"
    command = ["pretrain", *long, *saving, f"--run_dir={folder}"]
    process = FORKS.Process(target=main, args=(command,))
    process.start()
    log = folder / "seed-0" / "events.jsonl"
    # Its lines: the run, the task, the stage and each epoch.
    while process.is_alive() and (not log.is_file() or log.read_bytes().count(b"\n") < 5):
        time.sleep(0.003)
    process.kill()
    process.join()
    assert not (folder / "seed-0" / "result.json").exists(), "it ended before it was killed"
    assert main(command) == 0
    assert b'"resumed"' in log.read_bytes()
    assert main(["pretrain", *long, *saving, f"--run_dir={tmp_path / 'whole'}"]) == 0
    ours, theirs = (
        read_weights(tmp_path / name / "weights.safetensors")[0] for name in ("killed", "whole")
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
