"""Mammoth (Boschini et al. 2022) from a folder of the user's, in the second task of Seq-CIFAR-100.

What is timed is Mammoth's own: its model, backbone, buffer, data set, loader with its number of
workers, and loop over an epoch. Its data set's files are not read: it is handed the same images as
fastcil. Where torchvision can't be imported, `torchvision_stand_in` takes its place.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import checkout
import numpy as np
import torch
import torchvision_stand_in
from step_case import Epoch, peak_of, synchronise

_MODELS = {"darkpp": ("derpp", "Derpp"), "gem": ("gem", "Gem")}
_OPTIONS = {
    **{"optimizer": "sgd", "lr": 0.03, "optim_wd": 0.0, "optim_mom": 0.0, "optim_nesterov": 0},
    **{"alpha": 0.1, "beta": 0.5, "gamma": 0.5},
    **{"label_perc": 1, "label_perc_by_class": 1, "permute_classes": 0, "joint": 0},
    **{"custom_task_order": None, "custom_class_order": None, "noise_rate": 0},
    **{"validation": None, "validation_mode": "current", "drop_last": False},
    **{"seed": None, "num_workers": None, "nowand": 1, "debug_mode": 0, "code_optimization": 0},
    **{"fitting_mode": "iters", "scheduler_mode": "epoch"},
}


def load(folder: Path) -> None:
    """Makes Mammoth's modules importable, and only those that are used.

    Its packages import every data set and every backbone there is, and what these need.
    """
    checkout.load(folder, "models/derpp.py", "mammoth")
    for name in ("datasets", "models"):
        package = ModuleType(name)
        package.__path__ = [str(folder.resolve() / name)]
        package.__getattr__ = torchvision_stand_in.absent  # type: ignore[method-assign]
        sys.modules[name] = package
    sys.modules["backbone.vit"] = ModuleType("backbone.vit")


class Peer:
    """A method of Mammoth's in its second task.

    Args:
        folder: Its checkout.
        method: ``darkpp`` or ``gem``, as fastcil calls them.
        arrays: x_train, y_train, x_test, y_test of CIFAR-100.
        network: Mammoth's name of the backbone.
        batch: Images of a step, and of each draw from the buffer.
        memory: Images in the buffer, all of the first task's.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(
        self,
        folder: Path,
        method: str,
        arrays: tuple[Any, Any, Any, Any],
        network: str,
        batch: int,
        memory: int,
        device: str,
    ) -> None:
        load(folder)
        self.device = torch.device(device)
        logging.disable(logging.WARNING)
        options = {"batch_size": batch, "minibatch_size": batch, "buffer_size": memory}
        self.options = Namespace(**_OPTIONS, **options, device=device, backbone=network)
        self.dataset = _data_set(arrays, self.options)
        file, name = _MODELS[method]
        self.model = self._make(getattr(importlib.import_module(f"models.{file}"), name), network)
        self.seen = 0
        self.model.net.register_forward_pre_hook(self._count)
        self._fill(method, memory)
        self._train = checkout.Endless(self.dataset.get_data_loaders()[0])
        self.model.meta_begin_task(self.dataset)
        self._run = importlib.import_module("utils.training").train_single_epoch

    def _make(self, kind: Any, network: str) -> Any:
        importlib.import_module("backbone.ResNetBlock")
        backbones = sys.modules["backbone"].REGISTERED_BACKBONES
        torch.manual_seed(1)
        backbone = backbones[network]["class"](num_classes=self.dataset.N_CLASSES)
        loss, transform = self.dataset.get_loss(), self.dataset.get_transform()
        model = kind(backbone, loss, self.options, transform, self.dataset)
        assert type(model.transform).__name__ == "KorniaAugNoGrad", "it fell back to single images"
        model.device = backbone.device = self.device
        model.net.to(self.device).train()
        return model

    def _count(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self.seen += len(inputs[0])

    def _fill(self, method: str, memory: int) -> None:
        """The first task, of which only the buffer is filled."""
        train, _ = self.dataset.get_data_loaders()
        self.model.meta_begin_task(self.dataset)
        if method == "darkpp":
            data = train.dataset.data[:memory]
            images = torch.from_numpy(data).permute(0, 3, 1, 2).float().div(255)
            labels = torch.as_tensor(train.dataset.targets[:memory])
            logits = torch.zeros(memory, self.dataset.N_CLASSES)
            tensors = {"examples": images, "labels": labels, "logits": logits}
            self.model.buffer.add_data(**{k: v.to(self.device) for k, v in tensors.items()})
        self.model.meta_end_task(self.dataset)

    def epoch(self, steps: int) -> Epoch:
        """An epoch of so many steps; how they share the time nobody knows."""
        self.options.n_iters = self.model.task_iteration + steps
        seen = self.seen
        with peak_of(self.device) as peak, contextlib.redirect_stdout(io.StringIO()):
            started = time.perf_counter()
            self._run(self.model, self._train, self.options, 0, _Silent(), lambda: None)
            synchronise(self.device)
            seconds = time.perf_counter() - started
        return Epoch(seconds, self.seen - seen, {}, peak())

    def extractor_parameters(self) -> int:
        """Parameters of the backbone but for the classifier."""
        named = self.model.net.named_parameters()
        return sum(p.numel() for name, p in named if not name.startswith("classifier."))


class _Silent:
    """A progress bar that shows nothing."""

    def set_postfix(self, *_: Any, **__: Any) -> None:
        """Drops it."""

    def update(self) -> None:
        """Drops it."""


def _data_set(arrays: tuple[Any, Any, Any, Any], options: Namespace) -> Any:
    """Mammoth's Seq-CIFAR-100 over the given images."""
    module: Any = importlib.import_module("datasets.seq_cifar100")
    transforms: Any = importlib.import_module("torchvision.transforms")
    x, y, x_test, y_test = arrays

    def given(kind: Any, images: Any, labels: Any) -> Any:
        def make(root: str, *, transform: Any, **_: Any) -> Any:
            made = kind.__new__(kind)
            made.not_aug_transform = transforms.Compose([transforms.ToTensor()])
            made.data, made.targets = np.array(images), [int(k) for k in labels]
            made.transform, made.target_transform = transform, None
            return made

        return make

    own = module.MyCIFAR100
    own.__len__ = lambda self: len(self.data)
    module.MyCIFAR100, module.TCIFAR100 = given(own, x, y), given(own, x_test, y_test)
    return module.SequentialCIFAR100(options)
