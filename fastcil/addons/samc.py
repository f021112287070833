"""Saliency-augmented memory completion: exemplars of which only the salient pixels are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastcil.addons.completed import Completed, first_of_each, pair_up
from fastcil.addons.completion import Completion
from fastcil.addons.completion_records import CompletionRecords, output_errors
from fastcil.addons.compression import check_exemplars, check_network
from fastcil.addons.transfer_records import Transfer
from fastcil.contract import (
    Addon,
    Context,
    Fitting,
    Method,
    Recipe,
    Record,
    Retained,
    Stage,
    Stream,
    Task,
    check_choices,
    check_positive,
    evaluating,
)
from fastcil.data import Examples, ImageStore, read_images
from fastcil.errors import CompositionError, FastcilError
from fastcil.memory import Codec, make_codec
from fastcil.nn import GradCAM
from fastcil.ops import salient_masks

_FIRST = Recipe(
    epochs=30, lr=5e-3, schedule="cosine", optimizer="adam", weight_decay=0.0, batch_size=16
)
_LATER = Recipe(
    epochs=1, lr=5e-4, schedule="constant", optimizer="adam", weight_decay=0.0, batch_size=16
)
_PICTURES = 4
# Buffers that were added when learners had been saved without them.
_ADDED = ("figures.flat", "figures.whole", "transfer.steps")


class SAMC(Addon):
    r"""Saliency-augmented memory completion (Bai et al. 2023).

    Of an exemplar only the pixels are kept whose saliency is above mu,

    .. math:: x' = x \odot 1\{\Phi(x, f_\theta, y) > \mu\}

    (Eq. 4.4), by the codec ``sparse``, so that a budget holds more of them. Phi is Grad-CAM
    (Selvaraju et al. 2017) of the method's own network, as it is when the task is learned. As the
    next task begins, memory is completed,

    .. math:: \tilde x = A_\xi(R(x'))

    (Eq. 4.6) with a rule R and an autoencoder A, and the method trains on that. A learns to
    complete new images at the end of each task (Eq. 4.10, `fastcil.addons.completion.Completion`),
    masked as exemplars will be. It is kept with the exemplars, 86,244 bytes: a budget in bytes
    counts them, one in images, as the paper's, does not.

    The rows of Table 2 are options, the last of which is the method:

    ============================== =============================
    row                            options
    ============================== =============================
    zero padding                   ``completion="zero"``
    rule-based inpainting          ``completion="rule"``
    autoencoder without rule       ``completion="autoencoder"``
    autoencoder with rule          as it is
    ============================== =============================

    The paper's learner is GEM: ``gem+samc``. Alg. 1 masks every batch as it comes, by the network
    of that moment, and keeps the images that come last. Here the masks of all exemplars of a task
    are made when its training is done, by the network that has learned all of it, and which images
    are kept is the method's choice: GEM draws them at random, the quota the same for each class.

    Where text and released code disagree:

    - the class of Grad-CAM is the label (text), or the one predicted among the task's, by batch
      norms in training mode (code): ``saliency`` and ``norms``;
    - memory is completed as a task begins (text, and here), or once, as it is stored (code), which
      then holds whole images: only the account of its bytes knows what was dropped. There is no
      option for that;
    - the autoencoder's output is taken whole (Eq. 4.6) or for dropped pixels alone (code, and the
      proof of Lemma 4.2, which copies the others): ``paste``;
    - the code has no autoencoder, or in a variant loads one trained elsewhere, which stays as it
      is; here there is none to load. The text trains it for "a few" steps after each task, and says
      neither at which rate nor how it starts. The recipes here are ours: long in the first task,
      short in later ones, which is the early stopping by which the text keeps it from forgetting.
      On 400 images of ``scenes`` under smooth masks that keep 37 %, where Telea leaves a mean
      squared error of 0.0275 in the holes of other classes' images, the autoencoder behind it comes
      to 0.0250 in 75 steps of Adam at 5e-3, to 0.0235 in 250 and to 0.0232 in 1000.

    ``SAMC.PRESETS["released"]`` sets ``saliency`` and ``norms`` as in the code, and nothing else:
    ``rule``, ``radius`` and ``paste`` are the code's by default, masks and choice of exemplars are
    as above, and an autoencoder is trained unless ``completion="rule"``.

    Records are the lemmas in figures; see `fastcil.addons.completion_records` and, with
    ``analyse``, `fastcil.addons.transfer_records`.

    Example:
        >>> SAMC.Config().threshold, SAMC.PRESETS["released"].saliency
        (0.6, 'predicted')
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of saliency-augmented memory completion.

        The presets ``samc-cifar10``, ``samc-cifar100`` and ``samc-mini`` have the paper's
        thresholds for these (App. E). The autoencoder stands behind an online stream: it learns
        from images held meanwhile, as often as its recipes say.

        Args:
            threshold: mu: pixels whose saliency is above it are kept.
            completion: ``both`` the rule and the autoencoder, one of them, or ``zero``.
            rule: ``telea`` (released code) or ``navier-stokes``, OpenCV's, by way of the host where
                images are on a GPU; or ``diffusion``, ours, which fills them there, whole batches
                at once: the one to take on a GPU.
            radius: Pixels around a missing one that telea and navier-stokes look at.
            saliency: The class is the ``label``, or the one that is ``predicted`` among the task's.
            layer: Path of a module within each extractor, as ``stages.2``; None: the final maps.
            norms: Batch norms use ``running`` statistics for Grad-CAM, or those of the ``batch``.
            paste: Whether only dropped pixels are taken from the autoencoder.
            images: How many of a task's images it learns from, drawn by chance. They are held
                twice meanwhile, uncompressed. Images of several sizes are squeezed to the
                network's.
            first: Recipe of the autoencoder in the first task.
            later: Recipe of it in every later one.
            samples: Exemplars of each task that figures in the report are measured on.
            analyse: Whether to keep the originals of these, which no budget counts, and compare
                gradients on them with those on completed ones as later tasks begin and end.
        """

        threshold: float = 0.6
        completion: Literal["zero", "rule", "autoencoder", "both"] = "both"
        rule: Literal["telea", "navier-stokes", "diffusion"] = "telea"
        radius: int = 3
        saliency: Literal["label", "predicted"] = "label"
        layer: str | None = None
        norms: Literal["running", "batch"] = "running"
        paste: bool = True
        images: int = 1024
        first: Recipe = field(default=_FIRST, metadata={"own_batch": True})
        later: Recipe = field(default=_LATER, metadata={"own_batch": True})
        samples: int = 32
        analyse: bool = False

        def __post_init__(self) -> None:
            check_choices(self)
            if not 0 <= self.threshold < 1:
                raise FastcilError(
                    f"threshold is {self.threshold}; it must lie from 0 to below 1 (0.6 or 0.7 in "
                    f"the paper)."
                )
            for name in ("radius", "images", "samples"):
                check_positive(name, getattr(self, name))

        @property
        def learned(self) -> bool:
            """Whether there is an autoencoder."""
            return self.completion in ("autoencoder", "both")

    PRESETS: ClassVar[dict[str, Config]] = {
        "released": Config(saliency="predicted", norms="batch"),
        "samc-cifar10": Config(threshold=0.6),
        "samc-cifar100": Config(threshold=0.7),
        "samc-mini": Config(threshold=0.7),
    }

    config: Config
    brings_codec: ClassVar[str | None] = "sparse"
    seed: Tensor

    def __init__(self, config: Any, context: Context, method: Method) -> None:
        super().__init__(config, context, method)
        self.completion = Completion(config.paste) if config.learned else None
        self.figures = CompletionRecords()
        self.transfer = Transfer(context, config.samples) if config.analyse else None
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        # From memory's update to the end of the task: the maps of the task's images.
        self._maps: Tensor | None = None

    def check(self, method: Method) -> None:
        """Raises `CompositionError` if there are no exemplars, or no layer to look at."""
        check_exemplars("samc", method)
        check_network("samc", method, ("extractors", "maps"))
        if getattr(method, "network", None) is not None:
            try:
                GradCAM(method.localiser(), layer=self.config.layer)
            except FastcilError as error:
                raise CompositionError(f"option samc.{error}") from error

    def codec_options(self) -> dict[str, Any]:
        """Threshold and rule, and the autoencoder's part."""
        own = self._rule_options()
        return own if self.completion is None else {**own, "refine": self.completion.complete}

    def _rule_options(self) -> dict[str, Any]:
        """What completes without an autoencoder."""
        config = self.config
        rule = config.rule if config.completion in ("rule", "both") else "zero"
        return {"threshold": config.threshold, "rule": rule, "radius": config.radius}

    def begin_task(self, task: Task) -> None:
        """Draws the autoencoder's weights, in the first task."""
        self.check(self.method)
        # Draws follow the task's seed of weights, which the engine sets for each.
        self.seed = torch.full_like(self.seed, torch.initial_seed() % 2**62)
        if task.index == 0 and self.completion is not None:
            self.completion.start()

    def stages(self, task: Task, stages: list[Stage]) -> list[Stage]:
        """The method's stages, and behind them the autoencoder's."""
        if self.transfer is not None:
            self.transfer.watch(task, self.primary("samc", stages)[0], self._completed)
        if self.completion is None:
            return stages
        recipe = self.config.first if task.first else self.config.later
        generator = torch.Generator().manual_seed(int(self.seed))
        order = torch.randperm(len(task.examples), generator=generator)
        chosen = order[: self.config.images]
        stream = Stream((task.examples,), recipe.batch_size, subset=chosen)
        if not (len(chosen) and recipe.epochs):
            return stages
        stage = self.completion.stage(stream, recipe, lambda: self._hold(task, chosen))
        return [*stages, stage]

    def _hold(self, task: Task, chosen: Tensor) -> None:
        """Gives the autoencoder what to learn from, masked by the network as it is."""
        assert self.completion is not None
        examples = task.examples.select(chosen.to(task.examples.labels.device))
        maps = self._saliency(examples, torch.tensor(task.classes))
        images = self._of_one_size(examples.images)
        codec: Codec[Any] = make_codec("sparse", **self._rule_options())
        self.completion.hold(images, codec.decode(codec.encode(images, maps)))

    def _of_one_size(self, images: ImageStore) -> ImageStore:
        """The images as they are, or squeezed to the network's size if their sizes differ."""
        if len(images.sizes.unique(dim=0)) == 1:
            return images.reconstruct()
        augmentation = self.context.augmentation
        index = torch.arange(len(images))
        squeezed = read_images(
            [images],
            torch.zeros_like(index),
            index,
            (augmentation.size, augmentation.size),
            crops=augmentation.whole(images.sizes.cpu()),
            antialias=augmentation.antialias,
        )
        return ImageStore.from_batch(squeezed.permute(0, 2, 3, 1))

    def _saliency(self, examples: Examples, classes: Tensor) -> Tensor:
        """Grad-CAM of each image, float32 [N, h, w]; ``classes`` are the task's."""
        method, config = self.method, self.config
        network = method.localiser()
        apart = type(method).logits is Method.logits or network is not method.network
        see = GradCAM(network, None if apart else method.logits, config.layer, config.norms)
        among = classes if config.saliency == "predicted" else None

        def look(images: Tensor, labels: Tensor, sizes: Tensor) -> tuple[Tensor]:
            return (see(images, labels, among).float(),)

        with evaluating(method):
            return self.context.scan_labelled(look, examples, look="whole")[0]

    def _completed(self, images: ImageStore, maps: Tensor) -> ImageStore:
        """Images as memory would give them back."""
        codec: Codec[Any] = make_codec("sparse", **self.codec_options())
        return codec.decode(codec.encode(images, maps))

    def prepare_memory(self, task: Task, fitting: Fitting) -> None:
        """From here on exemplars are completed by what the autoencoder has become."""
        if self.completion is not None:
            self.completion.settle()

    def marks(self, examples: Examples) -> Tensor:
        """The saliency maps, float32 [N, h, w]."""
        self._maps = self._saliency(examples, examples.labels.unique())
        return self._maps

    def end_task(self, task: Task) -> None:
        """Measures what completion does to some of the exemplars just chosen."""
        maps, self._maps = self._maps, None
        if maps is None:
            return
        self.figures.see(task, maps)
        shown = self._some(task, maps)
        if not len(shown):
            return
        ruled: Codec[Any] = make_codec("sparse", **self._rule_options())
        filled = ruled.decode(ruled.encode(shown.originals.images, shown.maps))
        with evaluating(self.method):
            errors = output_errors(
                self.context,
                self.method.logits,
                shown.originals,
                shown.images,
                self.config.threshold,
            )
        self.figures.note(task, shown, filled, errors, _PICTURES)
        if self.transfer is not None:
            self.transfer.keep(task, shown)

    def _some(self, task: Task, maps: Tensor) -> Completed:
        """Exemplars of the task's classes whose original is one of its images."""
        threshold, chosen = self.config.threshold, first_of_each(task, self.config.samples)
        places, found = pair_up(task, chosen, maps, threshold)
        originals = task.examples.select(found.to(task.examples.labels.device))
        images = task.exemplars.images.select(places.to(task.exemplars.images.device))
        maps = maps[found.to(maps.device)]
        masks = salient_masks(maps, originals.images.sizes, threshold)
        return Completed.of(originals, images, maps, masks, exact=self.config.paste)

    def retained(self) -> list[Retained]:
        """The autoencoder, and for an analysis the originals."""
        held = [part.retained() for part in (self.completion, self.transfer) if part is not None]
        return [entry for entry in held if entry.nbytes]

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts saved values back; learners from before there were some figures have none."""
        own = self.tensors()
        later = {name: own[name][:0] for name in _ADDED if name in own}
        super().load_tensors({**later, **tensors})

    def records(self) -> list[Record]:
        """Figures of all tasks, pictures of the last one's exemplars."""
        records = self.figures.records(self.config.threshold)
        return records if self.transfer is None else [*records, *self.transfer.records()]
