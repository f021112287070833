"""The mask-level step of CIM: learning the compression of images through a step of the learner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcil.contract import Batch, Losses, Recipe, Stage, Stepper, Stream, evaluating, total
from fastcil.errors import CompositionError
from fastcil.nn import Network
from fastcil.nn.gradients import differentiate
from fastcil.ops import cam, soft_compose


class MaskStage(Stage):
    r"""One gradient step on phi, the curves of a network's Padé branch, per mask-level step.

    With phi's maps A = w_y^T F(x; theta, phi), scaled to masks M in [0, 1] (Luo et al. 2023,
    Eqs. S1a, S1b), and the new images of the inner batch composed with their downsampled selves,
    x~ = M x + (1 - M) x_eta (Eq. S1c):

    .. math:: \theta^+ = \theta - \beta_1 \nabla_\theta L_{CIL}(\tilde x; \theta, \omega)

    (Eq. 7), the loss being the main stage's own, and phi follows the gradient of

    .. math:: L_{CE}(D_i; \theta^+, \omega) + \mu \, \mathrm{mean}(M^2)
        + \mu' L_{CE}(E \cup D_i; \theta, \phi, \omega)

    (Eq. 9) through theta+, second derivatives included. theta is what the main stage trains of
    the extractors; heads stay as they are, and so do all batch-norm statistics, for the whole
    method is in evaluation mode meanwhile (as in the released code). Where derivatives aren't
    finite, which an overflowing theta+ leads to, phi stays as it is.

    Args:
        main: The stage that learns the new data. Its ``logits`` gives the outer loss its scores.
        streams: What the inner batch is drawn from (part 0 new, part 1 exemplars), and the outer.
        recipe: Of phi. beta_1 follows its schedule.
        steps: Steps after each epoch of ``main``.
        network: Gives the network whose maps become masks.
        branch: Gives that network with Padé activations, in evaluation mode.
        curves: Gives phi, the parameters learned.
        inner_lr: beta_1 at the start.
        ratio: eta of x_eta.
        foreground_ratio: eta' of what takes the place of x where the mask is 1; 1 for x itself.
        mu: Weight of the masks' size.
        mu_prime: Weight of the branch's own cross-entropy.
        compress_all: Whether exemplars, compressed already, are composed too.
    """

    def __init__(
        self,
        main: Stage,
        streams: tuple[Stream, Stream],
        recipe: Recipe,
        steps: int,
        *,
        network: Callable[[], Network],
        branch: Callable[[], Network],
        curves: Callable[[], Iterable[nn.Parameter]],
        inner_lr: float,
        ratio: float,
        foreground_ratio: float,
        mu: float,
        mu_prime: float,
        compress_all: bool,
    ) -> None:
        if main.logits is None:
            raise CompositionError(
                f"addon 'cim' steps the logits of stage '{main.name}', which names none; give the "
                f"Stage logits=self.logits, or what classifies while it trains."
            )
        super().__init__(
            name="mask",
            method=main.method,
            objective=main.objective,
            streams=streams,
            recipe=recipe,
            parameters=self._start,
            steps=steps,
            unmoved=self._refused,
        )
        self.main = main
        self.scores = main.logits
        self.network = network
        self.branch = branch
        self.curves = curves
        self.inner_lr = inner_lr
        self.ratios = ratio, foreground_ratio
        self.mu = mu
        self.mu_prime = mu_prime
        self.compress_all = compress_all
        self._learned: list[nn.Parameter] = []
        self._theta: list[str] = []
        self._usable = torch.tensor(True)

    def _refused(self) -> list[tuple[nn.Parameter, Tensor]]:
        """phi, where it is not to move: without a gradient momentum and decay would still do it."""
        return [(p, ~self._usable) for p in self._learned]

    def _start(self) -> list[nn.Parameter]:
        """Finds phi and theta, once: while phi trains, nothing else says that it does."""
        self._learned = list(self.curves())
        # Made now, the branch makes no step wait for it.
        self.branch()
        extractors = {id(p) for p in self.network().extractors.parameters()}
        trained = {id(p) for p in self.main.parameters()}
        self._theta = [
            name
            for name, parameter in self.method.named_parameters()
            if id(parameter) in extractors & trained
        ]
        if not self._theta:
            raise CompositionError(
                f"addon 'cim' steps the extractor that stage '{self.main.name}' trains, and it "
                f"trains none of the localiser's; let localiser() return the network it trains."
            )
        return self._learned

    def step(self, batches: Sequence[Batch], stepper: Stepper) -> Losses:
        """One mask-level step: Eqs. S1, 7 and 9.

        Args:
            batches: The inner batch and the outer one.
            stepper: Steps phi's optimiser.

        Returns:
            The terms of Eq. 9, weighted and detached: ``outer``, ``mask``, ``branch``.
        """
        inner, outer = batches
        # Never in half precision: derivatives of derivatives drown in its rounding.
        full = torch.autocast(inner.images.device.type, enabled=False)
        with evaluating(self.method), full:
            losses = self._outer_losses(inner, outer, stepper.lr / self.recipe.lr)
            gradients = differentiate(
                total(losses), self._learned, allow_unused=True, materialize_grads=True
            )
        # Early in training theta+ may overflow; one such step would spoil phi for good.
        self._usable = torch.stack([g.isfinite().all() for g in gradients]).all()
        gradients = tuple(torch.where(self._usable, g, 0.0) for g in gradients)
        # A linear function with these gradients: a backward pass through the losses themselves
        # would go on to the gradients of theta, which nobody reads.
        pairs = zip(self._learned, gradients, strict=True)
        stepper.update(torch.stack([(p * g).sum() for p, g in pairs]).sum())
        return {name: value.detach() for name, value in losses.items()}

    def _outer_losses(self, inner: Batch, outer: Batch, factor: float) -> Losses:
        """The terms of Eq. 9, with beta_1 at ``factor`` of its start."""
        network, branch = self.network(), self.branch()
        maps = branch.maps(inner.images)  # [B, C, h, w]
        masks = cam(maps, network.cam_weights(inner.labels).detach())  # [B, h, w]
        branch_logits = network.head(maps.mean((2, 3)))
        theta = self._inner_step(self._compressed(inner, masks), self.inner_lr * factor)
        logits = self.main.call(self.scores, outer.images, parameters=theta)
        return {
            "outer": F.cross_entropy(logits, outer.labels),
            "mask": self.mu * masks.square().mean(),
            "branch": self.mu_prime * F.cross_entropy(branch_logits, inner.labels),
        }

    def _compressed(self, batch: Batch, masks: Tensor) -> Batch:
        """The batch with its new images composed as the masks say (Eq. S1c)."""
        new = None if self.compress_all else batch.part == 0
        return replace(batch, images=compose_batch(batch.images, masks, *self.ratios, new))

    def _inner_step(self, batch: Batch, rate: float) -> dict[str, Tensor]:
        """theta+ by name, as a differentiable function of the batch's images (Eq. 7)."""
        named = dict(self.method.named_parameters())
        theta = {name: named[name].detach().requires_grad_() for name in self._theta}
        gradients = differentiate(
            total(self.main.loss(batch, theta)),
            list(theta.values()),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        pairs = zip(theta.items(), gradients, strict=True)
        return {name: value.detach() - rate * gradient for (name, value), gradient in pairs}


def compose_batch(
    images: Tensor, masks: Tensor, ratio: float, foreground_ratio: float, which: Tensor | None
) -> Tensor:
    r"""Images composed as their masks say (Luo et al. 2023, Eq. S1c).

    .. math:: M \odot x_{\eta'} + (1 - M) \odot x_\eta

    with x itself for :math:`x_{\eta'}` where eta' is 1, as everywhere but in Table 3, row 11.

    Args:
        images: x.  # [B, 3, H, W]
        masks: M, of any resolution.  # [B, h, w]
        ratio: eta.
        foreground_ratio: eta'.
        which: Which images to compose, bool [B]; None for all.

    Returns:
        [B, 3, H, W]

    Example:
        >>> images = torch.arange(16.0).view(1, 1, 4, 4)
        >>> torch.equal(compose_batch(images, torch.ones(1, 2, 2), 4.0, 1.0, None), images)
        True
    """
    composed = soft_compose(images, masks, ratio)
    if foreground_ratio > 1:
        # M x + (1 - M) x_eta, less M x + (1 - M) x_eta', plus x_eta'.
        composed = composed - soft_compose(images, masks, foreground_ratio)
        composed = composed + soft_compose(images, torch.zeros_like(masks), foreground_ratio)
    if which is None:
        return composed
    return torch.where(which[:, None, None, None], composed, images)
