"""PyCIL (Zhou et al. 2023) from a folder of the user's, at the main stage of its second task.

What is timed is PyCIL's own: its model, network, data loader with its number of workers, loop and
exemplars, as its own ``exps/*.json`` set them, but for the number of classes, epochs (one), images
and device. Its data sets' files are not read: it is handed the same images as fastcil. Where
torchvision can't be imported, `torchvision_stand_in` takes its place.
"""

from __future__ import annotations

import importlib
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import checkout
import numpy as np
import torch
from step_case import Epoch, peak_of, synchronise
from torch.utils.data import DataLoader, Subset

SHOWN = 2  # test images that it looks at before its first epoch's end, as it always does
_CLASSES = {"foster": "FOSTER", "icarl": "iCaRL", "der": "DER"}
_DATASETS = {"cifar100": "iCIFAR100", "imagenet100": "iImageNet100"}


class Peer:
    """A method of PyCIL's in its second task.

    Args:
        folder: Its checkout.
        method: ``foster``, ``icarl`` or ``der``.
        dataset: PyCIL's name of the kind of data: ``cifar100`` for arrays, ``imagenet100`` for
            files of any size.
        arrays: x_train, y_train, x_test, y_test; x are images, or the paths of files.
        network: PyCIL's name of it.
        batch: Images of a step.
        memory: Exemplars in all.
        increment: Classes of each task.
        device: ``cpu`` or ``cuda``.
        remembers: Whether it fills its memory after the second task, as it does by itself, timed;
            after the first task, or else, it is given the first images of every class.
    """

    def __init__(
        self,
        folder: Path,
        method: str,
        dataset: str,
        arrays: tuple[Any, Any, Any, Any],
        network: str,
        batch: int,
        memory: int,
        increment: int,
        device: str,
        remembers: bool = True,
    ) -> None:
        checkout.load(folder, "models/foster.py", "pycil")
        self.device = torch.device(device)
        settings = json.loads((folder / "exps" / f"{method}.json").read_text(encoding="utf-8"))
        settings |= {
            "dataset": dataset,
            "convnet_type": network,
            "memory_size": memory,
            "fixed_memory": False,
            "init_cls": increment,
            "increment": increment,
            "batch_size": batch,
            "boosting_epochs": 1,
            "seed": 1993,
            "device": [self.device],
        }
        module: Any = importlib.import_module(f"models.{method}")
        vars(module).update(epochs=1, tqdm=lambda rounds: _Silent(rounds))
        if "batch_size" in vars(module):
            module.batch_size = batch
        logging.disable(logging.INFO)
        warnings.filterwarnings("ignore", message=".*(pin_memory|lr_scheduler|worker).*")
        self.learner = getattr(module, _CLASSES[method])(settings)
        self.seconds: list[float] = []
        self._train = self.learner._train
        self._loaders: tuple[Any, Any] = (None, None)
        self.learner._train = self._hold
        self.learner._feature_compression = lambda *_: None
        remember = self.learner.build_rehearsal_memory
        self.learner.build_rehearsal_memory = self._fill
        manager = _manager(dataset, arrays, increment)
        torch.manual_seed(1)
        self.learner.incremental_train(manager)
        self.learner.after_task()
        if remembers:
            self.learner.build_rehearsal_memory = lambda *a: self._time(remember, *a)
        self.learner.incremental_train(manager)

    def _hold(self, train: Any, test: Any) -> None:
        """Keeps the loaders instead of training."""
        self.learner._network.to(self.device)
        self._loaders = train, test
        self._batches = checkout.Endless(train)

    def _fill(self, manager: Any, per_class: int) -> None:
        """The first images of every class so far, without a look at features."""
        learner = self.learner
        classes = [
            np.flatnonzero(manager._train_targets == k) for k in range(learner._total_classes)
        ]
        index = np.concatenate([own[:per_class] for own in classes])
        learner._data_memory = manager._train_data[index]
        learner._targets_memory = manager._train_targets[index]

    def _time(self, work: Any, *arguments: Any) -> None:
        synchronise(self.device)
        started = time.perf_counter()
        work(*arguments)
        synchronise(self.device)
        self.seconds.append(time.perf_counter() - started)

    def _loader(self, images: int) -> Any:
        """Its loader, over so many images of its data set."""
        loader = self._loaders[0]
        chosen = np.random.default_rng(0).permutation(len(loader.dataset))[:images]
        return DataLoader(
            Subset(loader.dataset, chosen.tolist()),
            batch_size=loader.batch_size,
            shuffle=True,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
        )

    def epoch(self, steps: int) -> Epoch:
        """An epoch of so many steps; how they share the time nobody knows."""
        train = self._batches
        train.steps = steps
        _, inputs, targets = next(iter(self._test()))
        test = [(None, inputs, targets)]
        with peak_of(self.device) as peak:
            started = time.perf_counter()
            self._train(train, test)
            synchronise(self.device)
            seconds = time.perf_counter() - started
        return Epoch(seconds, steps * self._loaders[0].batch_size, {}, peak())

    def _test(self) -> Any:
        dataset = self._loaders[1].dataset
        return DataLoader(Subset(dataset, range(SHOWN)), batch_size=SHOWN)

    def extractor_parameters(self) -> int:
        """Parameters of one extractor."""
        network = self.learner._network
        nets = network.convnets if hasattr(network, "convnets") else [network.convnet]
        return sum(p.numel() for p in nets[-1].parameters())

    def remember(self) -> tuple[float, int]:
        """Seconds that its memory took after the second task, and how many exemplars it holds."""
        return self.seconds[-1], int(self.learner.exemplar_size)

    def read(self, steps: int) -> float:
        """Images a second of its loader alone, its workers started."""
        images = 0
        batches = iter(self._loader((steps + 1) * self._loaders[0].batch_size))
        next(batches)
        started = time.perf_counter()
        for _, inputs, _ in batches:
            images += len(inputs)
        return images / (time.perf_counter() - started)


class _Silent:
    """A progress bar that shows nothing."""

    def __init__(self, rounds: Any) -> None:
        self._rounds = rounds

    def __iter__(self) -> Any:
        return iter(self._rounds)

    def set_description(self, text: str) -> None:
        """Drops it."""


def _manager(dataset: str, arrays: tuple[Any, Any, Any, Any], increment: int) -> Any:
    """PyCIL's data manager over the given images."""
    data: Any = importlib.import_module("utils.data")
    managers: Any = importlib.import_module("utils.data_manager")

    def hand_over(self: Any) -> None:
        self.train_data, self.train_targets, self.test_data, self.test_targets = arrays

    getattr(data, _DATASETS[dataset]).download_data = hand_over
    return managers.DataManager(dataset, True, 1993, increment, increment)
