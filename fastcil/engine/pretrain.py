"""Extractors trained on a data set as a whole, whose weights other runs start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastcil.contract import Recipe
from fastcil.engine.groups import GROUPS, AugmentOptions, EngineOptions
from fastcil.engine.learner import Learner
from fastcil.engine.options import check_keys, flatten, nest
from fastcil.engine.placement import place_images
from fastcil.engine.plan import Plan, check_folder, make_plan
from fastcil.engine.resolve import settle
from fastcil.engine.result import Result
from fastcil.engine.run import is_left, run_plan
from fastcil.engine.seed_run import LEARNER
from fastcil.engine.weights import save_weights
from fastcil.nn.lifecycle import linear_head

WEIGHTS = "weights.safetensors"
_METHOD = "finetune"
_NETWORK = ("name", "width", "stem", "activation")

DEFAULTS: dict[str, Any] = {
    **{name: cls() for name, cls in GROUPS.items()},
    # Shon et al. (2022) cut and mirror alone; a classifier's rows follow the data set's labels.
    "augment": AugmentOptions(brightness=0.0),
    "engine": EngineOptions(order_seed=None),
}
"""Option groups that `pretrain` takes, with the defaults it has for them."""


class Pretrained(NamedTuple):
    """What `pretrain` made.

    Args:
        weights: The safetensors file, for ``network.weights``.
        accuracy: Top-1 on the data set's test part, in percent.
        result: The run.
    """

    weights: Path
    accuracy: float
    result: Result


def pretrain(
    data: Any,
    run_dir: str | Path,
    *,
    epochs: int = 100,
    lr: float = 0.1,
    batch_size: int = 256,
    momentum: float = 0.9,
    weight_decay: float = 1e-5,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    **options: Any,
) -> Pretrained:
    """Trains a feature extractor and a linear classifier, and saves their weights.

    Cross-entropy by SGD whose learning rate falls as a cosine; the defaults are those with which
    Shon et al. (2022, Sec. 4.1) train ResNet-18 on ImageNet32. Images of up to 64 pixels that are
    all alike are padded by 4, cut and mirrored. It is a run of ``finetune`` with one task: it is
    kept, stopped, gone on with and reported as one.

    The same paper turns torchvision's network into one with LeakyReLU by an epoch of training:
    ``weights=``, ``activation="leaky"``, ``epochs=1``, ``lr=1e-4``; the weights that fit are those
    of either activation.

    The file holds the extractor's tensors under its own names and the classifier's as
    ``head.weight`` [K, C] and ``head.bias`` [K]; the header says, as JSON under ``fastcil``, what
    network it is (``name``, ``width``, ``stem``, ``activation``), what images it saw (``size``,
    ``mean``, ``std``), the data and their class names in the order of the rows, the accuracy, and
    what it was made with.

    Args:
        data: Anything `fastcil.train` takes.
        run_dir: Where to keep the run; the weights are ``weights.safetensors`` there.
        epochs: Passes over the training part.
        lr: Peak learning rate.
        batch_size: Images per step.
        momentum: SGD's momentum.
        weight_decay: L2 penalty.
        seed: Of weights, shuffles and augmentation.
        device: ``auto``, ``cpu``, ``cuda``.
        precision: ``fp32``, or autocast to ``bf16`` or ``fp16``; None: ``engine.precision``.
        **options: Dotted names of ``network``, ``augment``, ``engine`` and ``load``; among them
            ``network.weights``, to go on from other weights. Brightness is not changed unless
            ``augment.brightness`` says so.

    Returns:
        The file, the accuracy and the run's `Result`.

    Raises:
        FastcilError: Anything that can't be used, in one sentence, before anything is written.

    Example:
        >>> import tempfile
        >>> data = "scenes:classes=2,size=32,train_per_class=8,test_per_class=4"
        >>> options = {"network.width": 4, "engine.progress": False}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = pretrain(data, folder, epochs=1, batch_size=8, **options)
        ...     made.weights.name, made.weights.is_file()
        ('weights.safetensors', True)
    """
    given = nest(options)
    check_keys(given, GROUPS)
    recipe = Recipe(epochs, lr, momentum=momentum, weight_decay=weight_decay, batch_size=batch_size)
    merged = {**flatten(DEFAULTS), **flatten(given), **flatten({f"{_METHOD}.first": recipe})}
    if precision is not None:
        merged["engine.precision"] = precision
    plan = make_plan(_METHOD, data, "lfs-1", "none", None, seed, device, None, merged)
    folder = Path(run_dir)
    check_folder(folder, plan)
    place_images([plan] if is_left(plan, folder) else [])
    result = run_plan(plan, folder)
    file = folder / WEIGHTS
    if not file.is_file():
        _write(file, plan, result)
    return Pretrained(file, result.last_accuracy, result)


def _write(file: Path, plan: Plan, result: Result) -> None:
    """The weights of a finished run."""
    learner = Learner.load(file.parent / f"seed-{plan.seeds[0]}" / LEARNER, device="cpu")
    network, augmentation = learner.method.network, learner.parts.augmentation
    settled = settle(plan.settings.groups["network"], augmentation.size)
    extractor = network.extractors[0].state_dict()
    head = linear_head(network).state_dict()
    save_weights(
        file,
        {**extractor, **{f"head.{name}": value for name, value in head.items()}},
        {
            "network": {name: getattr(settled, name) for name in _NETWORK},
            "size": augmentation.size,
            "mean": list(augmentation.mean),
            "std": list(augmentation.std),
            "data": plan.data_name,
            "classes": list(learner.class_names),
            "accuracy": result.last_accuracy,
            "config": plan.config(),
            "environment": result.environment,
        },
    )
