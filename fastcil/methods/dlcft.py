"""Deep linear continual fine-tuning: a linearised network, squared error, and its curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcil.contract import (
    Batch,
    Context,
    Losses,
    Method,
    Recipe,
    Retained,
    Stage,
    Task,
    check_choices,
    check_not_negative,
    check_positive,
    evaluating,
)
from fastcil.curvature import Curvature, make_curvature
from fastcil.curvature.anchor import Hold, draws, keep, kept_curvature, scan_of
from fastcil.errors import FastcilError
from fastcil.memory.replay import replay_streams
from fastcil.methods.anchored import held_layers, held_parameters, outputs_among
from fastcil.methods.recipes import FINETUNING
from fastcil.nn import (
    Network,
    TaskOutputs,
    Tensors,
    build_module,
    leaky,
    linearize,
    masked_mean,
    outputs_of,
    rows_of_others,
)
from fastcil.nn.lifecycle import linear_head, start_network

_RECIPE = Recipe(
    epochs=20, lr=1e-4, schedule="constant", optimizer="adam", weight_decay=1e-5, batch_size=32
)


class DLCFT(Method):
    r"""Deep linear continual fine-tuning (Shon et al. 2022).

    The extractor is linearised at its pre-trained weights, :math:`g_{lin}(x; \psi) = g(x; \psi_0)
    + D_\psi g(x; \psi_0)\,\psi` (Eq. 6, `fastcil.nn.linearize`), the logits are :math:`f = w\,
    g_{lin} + b` (Eq. 7), and in task t

    .. math:: L = \tfrac1t\, E\big[\tfrac12 \lVert \alpha\, \phi(y) - f(x) \rVert^2\big]
        + \tfrac{t-1}{t}\, L_{reg}, \qquad
        L_{reg} = \tfrac{\lambda}{2} \langle \Delta, H \Delta \rangle
        + (1 - \lambda)\, E_M\big[\tfrac12 \lVert \alpha\, \phi(y) - f(x) \rVert^2\big]

    (Eq. 5, 9 to 11 and 14) with :math:`\phi` one-hot, :math:`\Delta` the displacement from the last
    task's weights, H the running mean of the tasks' curvatures, and M memory; without exemplars
    :math:`\lambda = 1`. The loss is the sum over classes. With squared error the Hessian in the
    outputs is the identity, so that H needs no labels, and the classifier's is
    :math:`E[z z^\top] \otimes I` (Eq. 13), also of units to come, which start at zero.

    f is linear in :math:`\psi` and in w, not in both: with ``classifier="joint"`` H depends on w
    through :math:`\psi`'s gradients, and is that at each task's end. ``classifier="static"`` is
    linear in all: :math:`f = w\, g(x; \psi_0) + b + \bar w\, D_\psi g\, \psi`, with
    :math:`\bar w` the ridge regression of new classes on the pre-trained features of the task that
    brings them, fixed from then on (after Mu et al. 2020, whose classifier is trained first).

    M's exemplars are chosen at random at the end of each task, as many of each class. The paper has
    a reservoir (Sec. 4.1), a uniform sample of all images seen, which has as many of each class on
    average alone. It serves streams that pass but once, or what is stored with an image as it
    passes, such as the logits of `Dark`; here a task's images are all there at its end, and nothing
    but the label is stored.

    Example:
        >>> DLCFT.Config().alpha
        15.0
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of DLCFT.

        Adam at 1e-4 and the weight decay are the paper's; how many epochs a task takes, the batch
        and the slope are not told there, nor which estimator: these are ours.

        Args:
            first: Recipe of the first task.
            later: Recipe of every later task.
            curvature: ``tkfac`` or ``kfac``, the paper's; ``ekfac`` or ``diagonal``.
            estimator: ``sampled`` normal vectors, or ``exact``: one backward pass for each class.
            samples: Vectors drawn per image.
            alpha: Size of the target.
            lam: lambda; weight of the penalty beside replay.
            merging: How a task's curvature is merged with those before: ``mean``, all tasks alike,
                as Eq. 11 weighs their losses; ``text``, the old one (t - 1) / (2t - 1), the new one
                t / (2t - 1), as Sec. 4.1 words it.
            head: ``all`` known classes share one classifier, whose weights are held too; or each
                ``task`` has its own, which nothing holds, and exemplars alone move once it is over.
            classifier: ``joint`` or ``static``.
            ridge: Of the static classifier's regression, in shares of the features' mean square.
            linear: Whether the extractor is linearised; without, in the ablations of Table 3, it
                is trained as it is.
            loss: ``squared`` error, or ``softmax`` cross-entropy, of which the curvature's labels
                are drawn from the model (Table 3).
            slope: Of the LeakyReLUs that take the place of ReLUs, where there are any; 0 leaves
                these. Better is a network that was trained with them (``network.activation``).
        """

        first: Recipe = _RECIPE
        later: Recipe = _RECIPE
        curvature: Literal["tkfac", "kfac", "ekfac", "diagonal"] = "tkfac"
        estimator: Literal["sampled", "exact"] = "sampled"
        samples: int = 1
        alpha: float = 15.0
        lam: float = 0.5
        merging: Literal["mean", "text"] = "mean"
        head: Literal["all", "task"] = "all"
        classifier: Literal["joint", "static"] = "joint"
        ridge: float = 1e-3
        linear: bool = True
        loss: Literal["squared", "softmax"] = "squared"
        slope: float = 0.01

        def __post_init__(self) -> None:
            check_positive("alpha", self.alpha)
            check_positive("ridge", self.ridge)
            for name in ("lam", "slope"):
                check_not_negative(name, getattr(self, name))
            if self.lam > 1 or self.samples < 1:
                raise FastcilError(
                    f"lam is {self.lam} and samples {self.samples}; lam is at most 1, samples at "
                    f"least 1."
                )
            check_choices(self)
            if self.classifier == "static" and not self.linear:
                raise FastcilError(
                    "classifier is 'static', which is that of a linearised network; leave linear "
                    "True, or take a 'joint' one."
                )

    PRESETS: ClassVar[dict[str, Config]] = {
        "finetuning-task": Config(head="task"),
        "kfac": Config(curvature="kfac"),
        "diagonal": Config(curvature="diagonal"),
        "softmax": Config(first=FINETUNING, later=FINETUNING, linear=False, loss="softmax"),
        "softmax-kfac": Config(
            FINETUNING, FINETUNING, curvature="kfac", linear=False, loss="softmax"
        ),
    }

    config: Config
    selection = "random"
    kept: Tensors
    static: Tensor  # [K, D], the classifier of the linear part; empty with a joint one

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.kept = Tensors()
        self.likelihood = "gaussian" if config.loss == "squared" else "categorical"
        self.outputs = TaskOutputs(config.head)
        self.register_buffer("static", torch.empty(0, 0))
        self._hold: Hold | None = None

    def restore(self, structure: Mapping[str, Any]) -> None:
        """Rebuilds the linearised network, and what is kept."""
        for name, described in structure.items():
            bare = partial(self._extractor, self.context.bare_backbone)
            setattr(self, name, build_module(described, bare))

    def _extractor(self, make: Callable[[], nn.Module]) -> nn.Module:
        if not self.config.linear:
            return make()
        backbone = make().eval()
        if self.config.slope and any(isinstance(m, nn.ReLU) for m in backbone.modules()):
            backbone = leaky(backbone, self.config.slope)
        return linearize(backbone)

    def begin_task(self, task: Task) -> None:
        """Linearises the pre-trained extractor, or adds classes whose weights start at zero."""
        if task.first:
            self.network = start_network(self._extractor(self.context.make_backbone), task.total)
            # What it can't be made of is told before anything is trained.
            self._curvature()
        else:
            linear_head(self.network).grow(task.total)
        self.outputs.add(len(task.new_classes))
        head = linear_head(self.network)
        if self.config.loss == "squared":
            with torch.no_grad():
                head.weight[task.known :].zero_()
                if head.bias is not None:
                    head.bias[task.known :].zero_()
        if self.config.classifier == "static":
            rows = self._regressed(task)
            self.static = torch.cat([self.static, rows]) if len(self.static) else rows

    def _regressed(self, task: Task) -> Tensor:
        """Ridge regression of a task's new classes on the pre-trained features, [new, D]."""
        extractor: Any = self.network.extractors[0]
        with evaluating(self.network):
            features = self.context.scan(
                lambda images: extractor.tangent(images)[0].mean((2, 3)), task.examples
            ).double()
        labels = task.examples.labels.to(features.device)
        targets = self.config.alpha * F.one_hot(labels, task.total).double()[:, task.known :]
        centred = features - features.mean(0)
        gram = centred.T @ centred
        gram += (
            self.config.ridge
            * gram.diagonal().mean().clamp(min=1e-12)
            * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        )
        rows = torch.linalg.solve(gram, centred.T @ (targets - targets.mean(0))).T
        return rows.to(linear_head(self.network).weight.dtype)

    def logits(self, images: Tensor) -> Tensor:
        """f of the images, [B, K]."""
        scores: Tensor = self._scores()(images)
        return scores

    def _scores(self) -> _Scores:
        return _Scores(self.network, self.static)

    def stages(self, task: Task) -> list[Stage]:
        """One stage, with memory as a second stream."""
        config = self.config
        recipe = config.first if task.first else config.later
        streams = replay_streams(task, recipe.batch_size)
        own, replays, unmoved = self._own(task), len(streams) > 1, None
        if own is not None and not replays:
            unmoved = partial(rows_of_others, linear_head(self.network), own)
        return [
            Stage(
                name="dlcft",
                method=self,
                objective=partial(self._loss, task.index + 1, replays),
                streams=streams,
                recipe=recipe,
                parameters=self._start,
                primary=True,
                logits=self.logits,
                unmoved=unmoved,
            )
        ]

    def _own(self, task: Task) -> Tensor | None:
        """Outputs [K] of the task's head, None where all share one."""
        if self.config.head == "all":
            return None
        return outputs_of(task.classes, task.total).to(linear_head(self.network).weight.device)

    def _loss(self, tasks: int, replays: bool, batch: Batch) -> Losses:
        """Squared error of new images and, with (t - 1) / t, the penalty and memory's error."""
        errors = self._errors(batch)
        new = batch.part == 0
        losses = {"classification": masked_mean(errors, new) / tasks}
        share, lam = (tasks - 1) / tasks, self.config.lam if replays else 1.0
        if replays:
            losses["replay"] = share * (1 - lam) * masked_mean(errors, ~new)
        if len(self.kept):
            losses["penalty"] = share * lam * self._penalty()
        return losses

    def _errors(self, batch: Batch) -> Tensor:
        """Half the squared distance to the target, summed over classes (Eq. 5), or CE, [B].

        Where every task has a head, among the outputs of that of the image's own task.
        """
        logits = self.logits(batch.images)
        if self.config.loss == "softmax":
            return self.outputs.cross_entropy(logits, batch.labels, "none")
        targets = self.config.alpha * F.one_hot(batch.labels, logits.shape[1]).to(logits)
        squares = (targets - logits).square()
        if self.config.head == "task":
            squares = squares * self.outputs.own(batch.labels, logits.shape[1])
        return 0.5 * squares.sum(1)

    def _penalty(self) -> Tensor:
        return self._held_by()(self._scores())

    def _held_by(self) -> Hold:
        """What was kept, as a penalty; to make it waits for the device."""
        if self._hold is None or self._hold.kept is not self.kept:
            self._hold = Hold(self.kept, self._curvature())
        return self._hold

    def _start(self) -> Iterable[nn.Parameter]:
        """What a stage trains, asked as it begins: before any step."""
        if len(self.kept):
            self._held_by()
        return self.network.trained_parameters()

    def _held(self) -> list[str]:
        """Parameters that are held, named as in `_Scores`."""
        return [f"network.{name}" for name in held_parameters(self.network, self.config.head)]

    def _curvature(self) -> Curvature:
        config, scores = self.config, self._scores()
        names, squared = self._held(), config.loss == "squared"
        layers = names if config.curvature == "diagonal" else held_layers(scores, names)
        return make_curvature(
            config.curvature,
            scores,
            layers,
            likelihood=self.likelihood,
            estimator=config.estimator,
            samples=config.samples,
            identity=["network.head"] if squared and config.head == "all" else [],
        )

    def end_task(self, task: Task) -> None:
        """Measures the curvature at the task's end and merges it with those before."""
        curvature, tasks = self._curvature(), task.index + 1
        if len(self.kept):
            curvature.load_tensors(kept_curvature(self.kept))
        total = tasks if self.config.merging == "mean" else 2 * tasks - 1
        old = tasks - 1
        drawn = draws(task.index, torch.initial_seed())
        squared = self.config.loss == "squared"
        with outputs_among(curvature.model, self._own(task), 0.0 if squared else None):
            scan = scan_of(self.context, self, task.examples)
            curvature.measure(scan, drawn, old / total, (total - old) / total)
        self.kept = keep(self._scores(), self._held(), curvature)
        self._hold = None

    def retained(self) -> list[Retained]:
        """The anchor and the curvature, and the static classifier."""
        buffers = {name: self.kept[name] for name in self.kept.names}
        return [
            Retained("curvature", "curvature", buffers),
            Retained("static classifier", "network", {"static": self.static}),
        ]


class _Scores(nn.Module):
    """f as a module of its own: what the curvature is of.

    Args:
        network: Extractor and classifier.
        static: Classifier of the linear part; empty for the one and only.
    """

    def __init__(self, network: Network, static: Tensor) -> None:
        super().__init__()
        self.network = network
        self.static = static

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> f [B, K]."""
        if not len(self.static):
            scores: Tensor = self.network(images)
            return scores
        extractor: Any = self.network.extractors[0]
        primal, tangent = (part.mean((2, 3)) for part in extractor.tangent(images))
        own: Tensor = self.network.head(primal)
        return own + tangent @ self.static.T
