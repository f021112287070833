"""The options of a run beside its composition's: network, augmentation, engine, data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastcil.errors import FastcilError


@dataclass(frozen=True)
class NetworkOptions:
    """The feature extractor.

    Args:
        name: ``resnet18``, ``resnet20``, ``resnet32``, ``mlp``; ``auto`` is resnet32 up to 40
            pixels, as the literature does on CIFAR, and resnet18 above.
        width: Channels of the first stage, units of an mlp's layers; None for the network's own.
        stem: ``imagenet``, ``cifar``, ``small``; None chooses by image size.
        activation: ``relu``, or ``leaky`` for LeakyReLU(0.01) in every place.
        weights: A safetensors file that every new extractor starts from, such as ``fastcil
            pretrain`` writes, or one with torchvision's names; in Python also a state_dict.
        last_relu: Whether the last block ends with its ReLU; None: as the method is published.
        zero_init_residual: Whether the last batch norm of each block starts at zero; likewise.
        norms: ``train`` batch norms in every task; or in the ``first`` only, after which their
            statistics, scale and shift stay as they are, as in continual fine-tuning (Shon et al.
            2022, Sec. 4.1).
    """

    name: str = "auto"
    width: int | None = None
    stem: Literal["imagenet", "cifar", "small"] | None = None
    activation: Literal["relu", "leaky"] = "relu"
    weights: str | None = None
    last_relu: bool | None = None
    zero_init_residual: bool | None = None
    norms: Literal["train", "first"] = "train"


@dataclass(frozen=True)
class AugmentOptions:
    """How training images are cut and changed; None or ``auto`` follows data and method.

    Args:
        size: Side of the square the network sees; None is the images' own up to 64 pixels when
            they are all alike, else 224.
        crop: ``padded`` (own size, zero margin), ``resized`` (RandomResizedCrop), or a ``window``
            of ``size`` anywhere in the image, in its middle when testing; ``none`` for the whole.
        resize: Side of the square that whole images are resized to before a ``window`` is cut out;
            None leaves them at their own resolution.
        min_scale: Smallest share of the area that ``resized`` keeps.
        padding: Margin of ``padded``.
        flip: Whether to mirror half of the images.
        brightness: Brightness jitter, +- this share.
        contrast: Contrast jitter, likewise.
        saturation: Saturation jitter, likewise.
        policy: AutoAugment policy (Cubuk et al. 2019); ``auto`` where the method's published
            recipe has it.
        cutout: Side of Cutout's square, 0 for none; None follows the method's published recipe.
        antialias: Whether shrinking filters.
        standardise: Whether pixels from 0 to 1 are standardised, by CIFAR-100's mean and deviation
            up to 40 pixels and ImageNet's above; else they stay as they are.
    """

    size: int | None = None
    crop: Literal["padded", "resized", "window", "none"] | None = None
    resize: int | None = None
    min_scale: float = 0.08
    padding: int = 4
    flip: bool = True
    brightness: float = 63 / 255
    contrast: float = 0.0
    saturation: float = 0.0
    policy: Literal["auto", "none", "cifar", "imagenet"] = "auto"
    cutout: int | None = None
    antialias: bool = True
    standardise: bool = True


@dataclass(frozen=True)
class EngineOptions:
    """How a run computes, none of which is part of a method.

    Args:
        precision: ``fp32``, or autocast to ``bf16`` or ``fp16``.
        compile: Whether to compile objectives with `torch.compile`.
        epoch_scale: Multiplies every length counted in epochs; 0.1 for a run a tenth as long.
        batch_size: Replaces every recipe's batch size; None leaves them.
        scan_batch: Images per step of evaluation, selection and box making.
        scan_precision: What those passes compute in: ``fp32``, or autocast to ``bf16``, which
            halves their time or better and may choose other exemplars. Curvature is always
            measured in the weights' precision.
        knn: Neighbours that vote in a readout ``knn``, a probe of the features; 0 for none.
        tsne: Whether to lay out features of the last task in the plane, by t-SNE (an extra).
        forward_transfer: Whether to measure forward transfer (Lopez-Paz and Ranzato 2017), which
            takes one more look at each task's test images, before the task is trained.
        epoch_choice: Which epoch of a few-shot session is kept: the best on ``held-out`` images,
            one of each class, base classes included, which are not trained on; that of the papers'
            ``select_best2`` rule on test images, ``paper``, named so wherever its figures stand; or
            the ``last``. See `fastcil.engine.epoch_choice`.
        epoch_choice_every: Epochs from one that is judged to the next; the last always is.
        exemplars_of: Whether memory keeps exemplars of ``all`` tasks, or of the ``first`` alone, as
            few-shot streams do where later tasks bring too few images to choose from (Tao et al.
            2020); a method that keeps everything does so all the same.
        checkpoint_seconds: Least time between two checkpoints within a task; 0 for every step.
        order_seed: Seed of the class order; None keeps the data set's.
        init_seed: Seed of weights; None is the run's seed.
        data_seed: Seed of shuffles and augmentation; None is the run's seed.
        threads: CPU threads of each process; None leaves torch's choice, or gives each of several
            processes on a machine its part of the cores.
        rank_timeout: Seconds that a process waits for the others in a step, where torchrun started
            several; while data is read and files are written, checkpoints included, it waits
            however long that takes.
        tensorboard: Whether to write TensorBoard events (an extra).
        progress: Whether to show progress.
        data: Where images stay: on the ``device``, in ``host`` memory, or in the file that they are
            mapped from, on ``disk``; ``auto`` takes the first of them where they fit (see
            `fastcil.engine.placement.choose`).
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    epoch_scale: float = 1.0
    batch_size: int | None = None
    scan_batch: int = 256
    scan_precision: Literal["fp32", "bf16"] = "fp32"
    knn: int = 0
    tsne: bool = False
    forward_transfer: bool = False
    epoch_choice: Literal["held-out", "paper", "last"] = "held-out"
    epoch_choice_every: int = 1
    exemplars_of: Literal["all", "first"] = "all"
    checkpoint_seconds: float = 60.0
    order_seed: int | None = 1993
    init_seed: int | None = None
    data_seed: int | None = None
    threads: int | None = None
    rank_timeout: float = 300.0
    tensorboard: bool = False
    progress: bool = True
    data: Literal["auto", "device", "host", "disk"] = "auto"

    def __post_init__(self) -> None:
        if not self.epoch_scale > 0:
            raise FastcilError(
                f"engine.epoch_scale is {self.epoch_scale}; it must be a positive number."
            )
        for names, least in (
            (("batch_size", "scan_batch", "threads", "epoch_choice_every", "rank_timeout"), 1),
            (("order_seed", "init_seed", "data_seed", "checkpoint_seconds", "knn"), 0),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= least:
                    raise FastcilError(f"engine.{name} is {value}; it must be at least {least}.")
        # What numpy's legacy generator, which the literature's class order comes from, can take.
        if self.order_seed is not None and self.order_seed >= 2**32:
            raise FastcilError(f"engine.order_seed is {self.order_seed}; it must be below 2**32.")


@dataclass(frozen=True)
class LoadOptions:
    """How data are read.

    Args:
        skip_bad: Skip, count and list images that can't be used, instead of stopping.
        download: Fetch CIFAR's archives if they are not there.
    """

    skip_bad: bool = False
    download: bool = False


GROUPS: dict[str, type] = {
    "network": NetworkOptions,
    "augment": AugmentOptions,
    "engine": EngineOptions,
    "load": LoadOptions,
}
