"""Stages that train the pixels of exemplars, the network staying as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcil.addons.free_images import FreeImages
from fastcil.contract import (
    Batch,
    Losses,
    Method,
    Recipe,
    Stage,
    Stepper,
    Stream,
    evaluating,
    total,
)
from fastcil.errors import CompositionError
from fastcil.nn.gradients import differentiate
from fastcil.ops import send


class PixelStage(Stage, ABC):
    """A stage whose one parameter is the pixels of some images.

    The method is in evaluation mode meanwhile, its parameters and batch-norm statistics stay as
    they are, and everything is in full precision. After each step values that no pixel can have
    are put back to the nearest that one can.

    Args:
        name: What progress lines call it.
        method: The method, its own stages done.
        free: The images.
        values: Gives their pixels.
        streams: Where batches come from.
        recipe: Of the pixels.
        begin: Makes ``values``.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        free: FreeImages,
        values: Callable[[], nn.Parameter],
        streams: tuple[Stream, ...],
        recipe: Recipe,
        begin: Callable[[], None],
    ) -> None:
        super().__init__(
            name=name,
            method=method,
            objective=self._classification,
            streams=streams,
            recipe=recipe,
            parameters=lambda: [values()],
            begin=begin,
        )
        self.learner = method
        self.free = free
        self.values = values

    def _classification(self, batch: Batch) -> Losses:
        """Cross-entropy of the method's logits."""
        return {"classification": F.cross_entropy(self.learner.logits(batch.images), batch.labels)}

    @abstractmethod
    def pixel_losses(self, values: Tensor, batches: Sequence[Batch]) -> Losses:
        """What the pixels are trained by, given one batch per stream."""

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """One step on the pixels.

        Args:
            batches: One batch per stream.
            stepper: Steps the pixels' optimiser.

        Returns:
            The named loss terms, detached.
        """
        values = self.values()
        with evaluating(self.method), torch.autocast(values.device.type, enabled=False):
            losses = self.pixel_losses(values, batches)
            (gradient,) = differentiate(total(losses), [values])
        # A linear function with this gradient: a backward pass through the losses themselves
        # would go on to the gradients of stepped parameters, which nobody reads.
        stepper.update((values * gradient).sum())
        self.free.clamp(values)
        return {name: value.detach() for name, value in losses.items()}


class _BilevelStage(PixelStage):
    """Pixels trained through steps of the learner on them (Liu et al. 2020, Sec. 4.3).

    Args:
        inner_lr: alpha, the learning rate of those steps.
        inner_steps: How many there are.
        **rest: See `PixelStage`.
    """

    def __init__(self, *, inner_lr: float, inner_steps: int, **rest: Any) -> None:
        super().__init__(**rest)
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps

    def stepped(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """theta' by name, as a differentiable function of the images it is trained on."""
        network = self.learner.network
        frozen = {id(p) for k in network.frozen for p in network.extractors[k].parameters()}
        trained = {id(p) for p in network.trained_parameters()} - frozen
        theta = {
            name: parameter.detach().requires_grad_()
            for name, parameter in self.method.named_parameters()
            if id(parameter) in trained
        }
        places = torch.arange(len(labels), device=labels.device)
        batch = Batch(images, labels, torch.ones_like(places), places)
        for _ in range(self.inner_steps):
            gradients = differentiate(
                total(self.loss(batch, theta)),
                list(theta.values()),
                create_graph=True,
                allow_unused=True,
            )
            if all(gradient is None for gradient in gradients):
                raise CompositionError(
                    f"addon 'mnemonics' steps the network behind logits(), and those of "
                    f"{type(self.method).__name__} do not depend on the parameters that its "
                    f"network trains; use mnemonics.form='released', which steps nothing."
                )
            theta = {
                name: value if gradient is None else value - self.inner_lr * gradient
                for (name, value), gradient in zip(theta.items(), gradients, strict=True)
            }
        return theta

    def outer(self, theta: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the stepped learner on what it was not trained on."""
        return F.cross_entropy(self.call(self.learner.logits, images, parameters=theta), labels)


class NewExemplars(_BilevelStage):
    r"""One step of a task's new exemplars E_i by what its images D_i say of them.

    .. math:: \theta' = \theta - \alpha \nabla_\theta L_{CE}(\theta; E_i), \qquad
        E_i \leftarrow E_i - \beta \nabla_{E_i} L_{CE}(\theta'(E_i); D_i)

    (Liu et al. 2020, Sec. 4.3). The first stream is the task's images, the second the exemplars,
    in the order of ``free``.
    """

    def pixel_losses(self, values: Tensor, batches: Sequence[Batch]) -> Losses:
        """The cross-entropy on new images after training on exemplars."""
        query, inner = batches
        assert inner.entry is not None
        theta = self.stepped(self.free.read(values, inner.entry), inner.labels)
        return {"outer": self.outer(theta, query.images, query.labels)}


class OldExemplars(_BilevelStage):
    r"""One step of either half of the old exemplars by what the other half says of it.

    .. math:: A \leftarrow A - \beta \nabla_A L_{CE}(\theta'(A); B), \qquad
        B \leftarrow B - \beta \nabla_B L_{CE}(\theta'(B); A)

    (Liu et al. 2020, Sec. 4.4), both from the halves as they are before the step. There is one
    stream for each half.

    Args:
        halves: Of each half, its positions in ``free``, int64 on the CPU.
        **rest: See `_BilevelStage`.
    """

    def __init__(self, *, halves: tuple[Tensor, Tensor], **rest: Any) -> None:
        super().__init__(**rest)
        self.halves = halves

    def pixel_losses(self, values: Tensor, batches: Sequence[Batch]) -> Losses:
        """The cross-entropy on each half after training on the other."""
        read = []
        for half, batch in zip(self.halves, batches, strict=True):
            assert batch.entry is not None
            read.append((self.free.read(values, half[batch.entry]), batch.labels))
        first, second = read
        return {"A": self._by_other(*first, *second), "B": self._by_other(*second, *first)}

    def _by_other(self, images: Tensor, labels: Tensor, seen: Tensor, classes: Tensor) -> Tensor:
        """The cross-entropy on one half, as it is, after training on the other."""
        return self.outer(self.stepped(images, labels), seen.detach(), classes)


class ClassMeans(PixelStage):
    r"""The released code's step: new exemplars whose features' means classify well.

    .. math:: L = \mathrm{CE}\big(\cos(f(x), \mu_k)_{k = 1 \ldots C}\big), \qquad
        \mu_k = \frac{1}{|E_k|} \sum_{e \in E_k} f(e)

    over the task's images and the old exemplars; cosines are not scaled, the means of old classes
    stay as they are. There is one stream. All images of ``free`` are read in every step.

    Args:
        labels: Of the images of ``free``, int64 [N].
        means: Gives the means of all classes, [C, D]; rows of new ones are not looked at.
        **rest: See `PixelStage`.
    """

    def __init__(self, *, labels: Tensor, means: Callable[[], Tensor], **rest: Any) -> None:
        super().__init__(**rest)
        self.labels = labels.cpu()
        self.means = means

    def pixel_losses(self, values: Tensor, batches: Sequence[Batch]) -> Losses:
        """The cross-entropy of cosines to class means."""
        (query,) = batches
        old = self.means()
        features = self.learner.embed(self.free.read(values, torch.arange(len(self.free))))
        (labels,) = send((self.labels,), features.device)
        new = mean_features(features, labels, len(old))
        mine = F.one_hot(labels, len(old)).any(0)  # [C]
        means = torch.where(mine[:, None], new, old.to(new.dtype))  # [C, D]
        found = self.learner.embed(query.images)  # [B, D]
        cosines = F.normalize(found, dim=1) @ F.normalize(means, dim=1).T  # [B, C]
        return {"classification": F.cross_entropy(cosines, query.labels)}


def mean_features(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of each class's features.

    Args:
        features: [N, D].
        labels: int64 [N].
        classes: C.

    Returns:
        [C, D]; zero for a class without features.

    Example:
        >>> mean_features(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 1]), 2)
        tensor([[0., 0.],
                [2., 3.]])
    """
    # A product with one-hot labels: unlike index_add_, the same bits on every run on CUDA.
    member = F.one_hot(labels.to(features.device), classes).to(features.dtype)  # [N, C]
    return member.T @ features / member.sum(0).clamp(min=1)[:, None]
