"""How many images sparse exemplars make room for: Table 4 of SAMC (Bai et al. 2023), counted truly.

FASTCIL_DATA=... python benchmarks/sparse_memory.py   # -> results/sparse-memory/DEVICE.json

GEM learns the tasks of Split CIFAR-100 as in the paper, and after each of them Grad-CAM says which
pixels of its training images are salient. Of each threshold the script tells how many of these
images take as much room as ten raw ones: by the paper's account, which is the pixels kept and
nothing else; and by bytes, masks and metadata included, in each form that a mask can have.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch
from run import FACTS, RESULTS, file_of
from torch import Tensor

from fastcil import Learner
from fastcil.contract import Task, evaluating
from fastcil.data import Dataset, load
from fastcil.engine.environment import environment
from fastcil.engine.preset_files import read_preset
from fastcil.engine.scenario import make_scenario, pick
from fastcil.engine.state import write_atomically
from fastcil.memory.codecs.sparse_store import form_nbytes
from fastcil.nn import GradCAM
from fastcil.ops import salient_masks

THRESHOLDS = tuple(tenth / 10 for tenth in range(10))
PUBLISHED = (10, 11.4, 12.9, 15.8, 18.6, 22.2, 30.2, 43.5, 71.2, 112.5)
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


def measure(dataset: Dataset, tasks: int, seed: int) -> dict[float, Room]:
    """Learns the first tasks of five classes, and masks the images of each behind it."""
    preset = read_preset("samc/cifar100-10")
    options = {**preset.options_for(["gem"]), "engine": {"progress": False}}
    learner = Learner("gem", preset.arguments["memory"], seed=seed, **options)
    scenario = make_scenario(f"task-{len(dataset.class_names) // 5}", dataset, None)
    rooms = {threshold: Room() for threshold in THRESHOLDS}
    for number, arrival in enumerate(scenario.arrivals[:tasks]):
        examples = pick(dataset.train, arrival, scenario.order)
        names = [dataset.class_names[label] for label in arrival.classes]
        task = learner.next_task(_from_zero(examples), names)
        learner.learn_task(task, names, lambda event, facts: None)
        learner.method.release()
        maps = _saliency(learner, task)
        sizes = task.examples.images.sizes
        for threshold, room in rooms.items():
            room.add(salient_masks(maps, sizes, threshold), sizes)
        print(f"task {number + 1} of {tasks}", flush=True)
    return rooms


def _from_zero(examples: Any) -> Any:
    """Labels as data of their own have them."""
    return type(examples)(examples.images, examples.labels - examples.labels.min())


def _saliency(learner: Learner, task: Task) -> Tensor:
    """Grad-CAM of the label of each of the task's images, [N, h, w]."""
    method = learner.method
    see = GradCAM(method.network)

    def look(images: Tensor, labels: Tensor, sizes: Tensor) -> tuple[Tensor]:
        return (see(images, labels).float(),)

    with evaluating(method):
        return learner.parts.context.scan_labelled(look, task.examples, look="whole")[0]


def main() -> None:
    """Measures, prints the table, keeps it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="cifar100")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rooms = measure(load(arguments.data), arguments.tasks, arguments.seed)
    facts = {name: value for name, value in environment("cpu").items() if name in FACTS}
    rows: list[dict[str, Any]] = []
    for (threshold, room), published in zip(rooms.items(), PUBLISHED, strict=True):
        rows.append({"threshold": threshold, "published": published, **room.counts()})
        figures = "  ".join(f"{name} {count:.1f}" for name, count in room.counts().items())
        print(f"mu {threshold}: published {published}  {figures}")
    content = {
        "command": f"python benchmarks/sparse_memory.py --tasks {arguments.tasks}",
        "environment": {**facts, "seed": arguments.seed, "tasks": arguments.tasks},
        "thresholds": rows,
    }
    path = RESULTS / "sparse-memory" / file_of(facts).name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    print(path)


if __name__ == "__main__":
    main()
