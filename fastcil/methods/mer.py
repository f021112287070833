"""Meta-experience replay: steps on new images and memory in turn, and a Reptile step over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastcil.contract import (
    Batch,
    Context,
    Losses,
    Method,
    Recipe,
    Stage,
    Stepper,
    Stream,
    Task,
    check_choices,
    check_not_negative,
    check_positive,
    total,
)
from fastcil.errors import FastcilError
from fastcil.memory.reservoir import Reservoir
from fastcil.methods.recipes import online
from fastcil.nn import TaskOutputs
from fastcil.nn.lifecycle import linear_head, start_network

_ONLINE = online(0.03)
_SINGLE = replace(_ONLINE, batch_size=1)
_P1 = online(0.1)


class MER(Method):
    r"""Meta-experience replay (Riemer et al. 2019).

    An outer update takes new images and, from memory, s draws of k images. In Algorithm 1, from
    weights :math:`\theta_A = \theta`, for each draw B

    .. math:: W \leftarrow \theta; \qquad
        \theta \leftarrow \theta - \alpha \nabla_\theta \mathrm{CE}(f(x), y)
        \;\text{ for each } (x, y) \text{ of [new, B] in turn}; \qquad
        \theta \leftarrow W + \beta (\theta - W)

    and in the end :math:`\theta \leftarrow \theta_A + \gamma (\theta - \theta_A)`: Reptile (Nichol
    and Schulman 2018) within a draw and across draws, which to first order maximises the dot
    products of the gradients of different images. In Algorithm 6 the new images come last in the
    sequence, so that the step that matters most to them follows what memory has to say, and
    gamma takes the place of beta; nothing is done across draws.

    The paper steps on one image at a time; ``inner_batch`` says how many. **Batch norm has no
    variance to estimate from one image**: a step on a single one, which may be the last of a
    sequence, leaves all batch norms in evaluation mode, so that they normalise by their running
    statistics, and don't change these. The paper's network has none. A step on several images
    normalises by them, as in other methods. Running statistics are not interpolated.

    With a single step (``batches=1, inner_batch=0``) an outer update is one of experience replay
    whose learning rate is beta times as high, or gamma times.

    Memory is a `fastcil.memory.reservoir.Reservoir`, filled while the stream passes, as in the
    paper: an outer update's new images are offered to it when it is done. A draw is without
    replacement, independent of the others; the released code draws with replacement.

    Example:
        >>> MER.Config().beta, MER.selection
        (0.03, 'own')
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of meta-experience replay.

        ``PRESETS["mnist-rotations"]`` are the released ones for Algorithm 1 on MNIST-Rotations
        with a memory of 5120 images, those of Algorithm 6 in ``"mnist-rotations-alg6"``, both for
        a ``network.name`` of ``mlp``. The default are the released ones for
        MNIST-Permutations with a memory of 200, draws of 10 among them, but new images come and
        are stepped on by tens as well, for networks with batch norm: this is ours, the paper has
        no such network.

        ``samc-cifar10``, ``samc-cifar100`` and ``samc-mini`` are those of Bai et al. (2023,
        SAMC, appendices A and E): "inner gradient steps" of 1 for each outer update, batches of
        10, learning rate and "meta learning rate" of 0.1. We take the one step to be on the new
        images and a draw of 10 together, and the meta learning rate to be beta.

        Args:
            first: Recipe of the first task; ``lr`` is alpha, ``batch_size`` the new images of an
                outer update. Its optimiser makes the inner steps: momentum, if any, is carried on.
            later: Recipe of every later task.
            algorithm: ``alg1`` or ``alg6``, of the paper.
            batches: s, draws from memory in an outer update.
            replay: k, images of a draw; 0 for none.
            inner_batch: Images of an inner step; 0 for a whole sequence at once.
            beta: Of the interpolation within a draw, in Algorithm 1.
            gamma: Of that across draws, in Algorithm 6 of that within a draw.
            head: ``all`` known classes share one softmax, or each ``task`` has its own.
        """

        first: Recipe = _ONLINE
        later: Recipe = _ONLINE
        algorithm: Literal["alg1", "alg6"] = "alg1"
        batches: int = 10
        replay: int = 10
        inner_batch: int = 10
        beta: float = 0.03
        gamma: float = 1.0
        head: Literal["all", "task"] = "all"

        def __post_init__(self) -> None:
            for name in ("beta", "gamma"):
                check_positive(name, getattr(self, name))
            for name in ("replay", "inner_batch"):
                check_not_negative(name, getattr(self, name))
            if self.batches < 1:
                raise FastcilError(f"batches is {self.batches}; it must be at least 1.")
            check_choices(self)

    PRESETS: ClassVar[dict[str, Config]] = {
        "mnist-rotations": Config(_SINGLE, _SINGLE, replay=100, inner_batch=1),
        "mnist-rotations-alg6": Config(
            _SINGLE, _SINGLE, "alg6", batches=1, replay=100, inner_batch=1, gamma=0.1
        ),
        **dict.fromkeys(
            ("samc-cifar10", "samc-cifar100", "samc-mini"),
            Config(_P1, _P1, batches=1, inner_batch=0, beta=0.1, head="task"),
        ),
    }

    config: Config
    selection = "own"

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.reservoir = Reservoir()
        self.outputs = TaskOutputs(config.head)

    def begin_task(self, task: Task) -> None:
        """Starts the network, or adds the new classes; opens the reservoir."""
        if task.first:
            self.network = start_network(self.context.make_backbone(), task.total)
        else:
            linear_head(self.network).grow(task.total)
        self.outputs.add(len(task.new_classes))
        self.reservoir.open(task.room, len(task.examples), len(task.exemplars))

    def stages(self, task: Task) -> list[Stage]:
        """One stage: new data, and a stream for each draw from memory."""
        config = self.config
        recipe = config.first if task.first else config.later
        streams = [Stream((task.examples,), recipe.batch_size)]
        if config.replay and len(self.reservoir.slots):
            draw = Stream(
                (task.examples, task.exemplars), config.replay, subset=self.reservoir.pool
            )
            streams += [replace(draw) for _ in range(config.batches)]
        return [_OuterStage(self, recipe, tuple(streams))]

    def objective(self, batch: Batch) -> Losses:
        """Cross-entropy, over all outputs or those of each image's task."""
        logits = self.network(batch.images)  # [B, K]
        return {"classification": self.outputs.cross_entropy(logits, batch.labels)}

    def sequence(self, new: Batch, drawn: Sequence[Batch]) -> Iterator[Batch]:
        """The batches of the inner steps on new images and a draw of exemplars, in their order.

        Args:
            new: New images.
            drawn: The draw, or nothing while memory is empty.
        """
        last = self.config.algorithm == "alg6"
        joined = Batch.cat([*drawn, new] if last else [new, *drawn])
        columns = (joined.images, joined.labels, joined.part, joined.index)
        size = self.config.inner_batch or len(joined)
        for columns_of_step in zip(*(column.split(size) for column in columns), strict=True):
            yield Batch(*columns_of_step)

    def offer(self, batch: Batch) -> None:
        """Offers new images to the reservoir."""
        assert batch.entry is not None
        self.reservoir.offer(batch.entry, self.reservoir.draws())

    def close(self) -> None:
        """Lets memory keep a random part of what the reservoir holds."""
        self.reservoir.shuffle()

    def chosen(self) -> Tensor:
        """What the reservoir holds."""
        return self.reservoir.slots

    def end_task(self, task: Task) -> None:
        """Empties the reservoir: memory has what it chose."""
        self.reservoir.open(0, 0, 0)


class _OuterStage(Stage):
    """One outer update in each step, the inner ones being the trainer's."""

    def __init__(self, mer: MER, recipe: Recipe, streams: tuple[Stream, ...]) -> None:
        super().__init__(
            name="meta-experience replay",
            method=mer,
            objective=mer.objective,
            streams=streams,
            recipe=recipe,
            parameters=mer.network.trained_parameters,
            primary=True,
            logits=mer.logits,
            finish=mer.close,
        )
        self._mer = mer

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """Inner steps and interpolations; the losses are means over the inner steps."""
        config, (new, *draws) = self._mer.config, batches
        first = config.algorithm == "alg1"
        within, across = (config.beta, config.gamma) if first else (config.gamma, 1.0)
        values = list(self.parameters())
        start, sums, steps = _copies(values, across), dict[str, Tensor](), 0
        for number in range(config.batches):
            before = _copies(values, within)
            for batch in self._mer.sequence(new, draws[number : number + 1]):
                losses = self._inner(batch, stepper)
                sums = {name: sums.get(name, 0.0) + losses[name] for name in losses}
                steps += 1
            _interpolate(values, before, within)
        _interpolate(values, start, across)
        self._mer.offer(new)
        return {name: value / steps for name, value in sums.items()}

    def _inner(self, batch: Batch, stepper: Stepper) -> Losses:
        """One step of the optimiser."""
        with _norms_held(self.method, len(batch) == 1):
            losses = self.loss(batch)
            stepper.update(total(losses))
        return {name: value.detach() for name, value in losses.items()}


def _copies(values: Sequence[Tensor], rate: float) -> list[Tensor]:
    """What an interpolation by ``rate`` starts from; nothing where it would change nothing."""
    return [] if rate == 1.0 else [value.detach().clone() for value in values]


@torch.no_grad()
def _interpolate(values: Sequence[Tensor], before: list[Tensor], rate: float) -> None:
    """values <- before + rate (values - before), in place; nothing if there is no ``before``."""
    if before:
        torch._foreach_lerp_(list(values), before, 1.0 - rate)


@contextmanager
def _norms_held(module: nn.Module, held: bool) -> Iterator[None]:
    """Puts batch norms that train in evaluation mode meanwhile, if ``held``."""
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in module.modules() if isinstance(m, kind) and m.training] if held else []
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
