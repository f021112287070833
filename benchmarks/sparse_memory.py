"""How many images sparse exemplars make room for: Table 4 of SAMC (Bai et al. 2023), counted truly.

python benchmarks/sparse_memory.py [--data cifar100] [--saliency predicted --norms batch]
    # -> results/sparse-memory/DEVICE.json

GEM learns the tasks of Split CIFAR-100 as in the paper, and after each of them Grad-CAM says which
pixels of its training images are salient. Of each threshold the script tells how many of these
images take as much room as ten raw ones: by the paper's account, which is the pixels kept and
nothing else; and by bytes, masks and metadata included, in each form that a mask can have. And it
tells how well, and how fast, each rule fills what the paper's threshold drops, on the same masks.

The paper's text takes the label's saliency; the code behind its Table 4 that of the class
predicted, by batch norms in training mode, which the two options above repeat. Each way is kept by
its name. Twenty tasks take hours.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from run import RESULTS, file_of
from step_run import keep
from torch import Tensor

from fastcil import Learner
from fastcil.contract import Task, evaluating
from fastcil.data import Dataset, ImageStore, load
from fastcil.engine.environment import environment
from fastcil.engine.preset_files import read_preset
from fastcil.engine.scenario import make_scenario, pick
from fastcil.memory.codecs.completion import Rule, complete
from fastcil.memory.codecs.sparse_store import form_nbytes
from fastcil.nn import GradCAM
from fastcil.ops import salient_masks

THRESHOLDS = tuple(tenth / 10 for tenth in range(10))
PUBLISHED = (10, 11.4, 12.9, 15.8, 18.6, 22.2, 30.2, 43.5, 71.2, 112.5)
# Of the paper on CIFAR-100, at which the rules are compared, on so many images of a task.
RULED_AT, RULED = 0.7, 100
RULES: tuple[Rule, ...] = ("telea", "navier-stokes", "diffusion", "zero")
FORMS = ("coo", "runs", "bitmask", "smallest")
ROOM = 10  # raw images
# Beside the string: length 4, height and width 4, form 1, label 4; of a raw one 28.
SPARSE_ROW, RAW_ROW = 13, 28


@dataclass
class Room:
    """What the images of all tasks cost at one threshold, summed up.

    Args:
        images: Their number.
        pixels: Pixels they have.
        kept: Pixels kept.
        nbytes: Form of the mask -> bytes, metadata included; ``raw`` too.
    """

    images: int = 0
    pixels: int = 0
    kept: int = 0
    nbytes: dict[str, int] | None = None

    def add(self, masks: Tensor, sizes: Tensor) -> None:
        """Adds a task's images, of which ``masks`` keeps some pixels."""
        self.images += len(sizes)
        self.pixels += len(masks)
        self.kept += int(masks.sum())
        found = {name: int(each.sum()) for name, each in form_nbytes(masks, sizes).items()}
        before = self.nbytes or dict.fromkeys(found, 0)
        rows = {name: RAW_ROW if name == "raw" else SPARSE_ROW for name in found}
        self.nbytes = {
            name: before[name] + nbytes + rows[name] * len(sizes) for name, nbytes in found.items()
        }

    def counts(self) -> dict[str, float]:
        """Images in the room of ten raw ones, by account."""
        assert self.nbytes is not None
        found = {"paper": ROOM * self.pixels / self.kept}
        return found | {form: ROOM * self.nbytes["raw"] / self.nbytes[form] for form in FORMS}


@dataclass
class Filled:
    """What a rule makes of the dropped pixels of some images, summed up.

    Args:
        squares: Squared errors of their values from 0 to 255.
        values: How many these are.
        images: How many images were completed.
        seconds: How long that took.
    """

    squares: float = 0.0
    values: int = 0
    images: int = 0
    seconds: float = 0.0

    def add(self, images: ImageStore, masks: Tensor, rule: Rule) -> None:
        """Adds raw images, of which ``masks`` keeps some pixels."""
        began = time.perf_counter()
        made = complete(images, masks, rule)
        self.seconds += time.perf_counter() - began
        errors = (made.pixels.double() - images.pixels.double()).view(-1, 3)[~masks]
        self.squares += float(errors.square().sum())
        self.values += errors.numel()
        self.images += len(images)

    def figures(self) -> dict[str, float | None]:
        """PSNR of the dropped pixels, None where none was dropped or all are right, and speed."""
        error = self.squares / self.values if self.values else 0.0
        psnr = round(10 * math.log10(255**2 / error), 3) if error else None
        return {"psnr": psnr, "ms_per_image": round(1000 * self.seconds / self.images, 4)}


@dataclass
class Found:
    """What was measured.

    Args:
        rooms: Threshold -> what images cost.
        rules: Rule -> what it makes of what `RULED_AT` drops.
    """

    rooms: dict[float, Room] = field(default_factory=lambda: {mu: Room() for mu in THRESHOLDS})
    rules: dict[Rule, Filled] = field(default_factory=lambda: {rule: Filled() for rule in RULES})


def measure(
    dataset: Dataset,
    tasks: int,
    seed: int,
    saliency: Literal["label", "predicted"],
    norms: Literal["running", "batch"],
) -> Found:
    """Learns the first tasks of five classes, and masks the images of each behind it."""
    preset = read_preset("samc/cifar100-10")
    options = {**preset.options_for(["gem"]), "engine": {"progress": False}}
    learner = Learner("gem", preset.arguments["memory"], seed=seed, **options)
    scenario = make_scenario(f"task-{len(dataset.class_names) // 5}", dataset, None)
    found = Found()
    for number, arrival in enumerate(scenario.arrivals[:tasks]):
        examples = pick(dataset.train, arrival, scenario.order)
        names = [dataset.class_names[label] for label in arrival.classes]
        task = learner.next_task(_from_zero(examples), names)
        learner.learn_task(task, names, lambda event, facts: None)
        learner.method.release()
        maps = _saliency(learner, task, saliency, norms)
        sizes = task.examples.images.sizes
        for threshold, room in found.rooms.items():
            room.add(salient_masks(maps, sizes, threshold), sizes)
        some = torch.arange(min(RULED, len(maps)))
        images = task.examples.images.select(some).reconstruct()
        masks = salient_masks(maps[some], images.sizes, RULED_AT)
        for rule, filled in found.rules.items():
            filled.add(images, masks, rule)
        print(f"task {number + 1} of {tasks}", flush=True)
    return found


def _from_zero(examples: Any) -> Any:
    """Labels as data of their own have them."""
    return type(examples)(examples.images, examples.labels - examples.labels.min())


def _saliency(
    learner: Learner,
    task: Task,
    saliency: Literal["label", "predicted"],
    norms: Literal["running", "batch"],
) -> Tensor:
    """Grad-CAM of each of the task's images, [N, h, w]."""
    method = learner.method
    see = GradCAM(method.network, norms=norms)
    among = torch.tensor(task.classes) if saliency == "predicted" else None

    def look(images: Tensor, labels: Tensor, sizes: Tensor) -> tuple[Tensor]:
        return (see(images, labels, among).float(),)

    with evaluating(method):
        return learner.parts.context.scan_labelled(look, task.examples, look="whole")[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, keeps them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="cifar100")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--saliency", choices=("label", "predicted"), default="label")
    parser.add_argument("--norms", choices=("running", "batch"), default="running")
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse-memory")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(load(given.data), given.tasks, given.seed, given.saliency, given.norms)
    facts = environment("cpu")
    thresholds: list[dict[str, Any]] = []
    for (threshold, room), published in zip(found.rooms.items(), PUBLISHED, strict=True):
        thresholds.append({"threshold": threshold, "published": published, **room.counts()})
        figures = "  ".join(f"{name} {count:.1f}" for name, count in room.counts().items())
        print(f"mu {threshold}: published {published}  {figures}")
    rules = [{"rule": rule, **filled.figures()} for rule, filled in found.rules.items()]
    for row in rules:
        print(f"{row['rule']}: PSNR {row['psnr']} dB, {row['ms_per_image']} ms an image")
    rows = {"thresholds": thresholds, f"rules at mu {RULED_AT}": rules}
    named = {name: getattr(given, name) for name in ("data", "tasks", "seed", "saliency", "norms")}
    command = "python benchmarks/sparse_memory.py " + " ".join(
        f"--{name} {value}" for name, value in named.items()
    )
    path = given.out / file_of(facts).name
    keep(path, f"{given.saliency}, {given.norms}", rows, facts, command)
    print(path)


if __name__ == "__main__":
    main()
