"""Grad-CAM: which places of an image a class score depends on, whatever the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcil.errors import FastcilError
from fastcil.nn.heads import LinearHead
from fastcil.nn.network import Network
from fastcil.nn.norms import batch_norms, batch_statistics
from fastcil.ops import cam


class GradCAM:
    r"""Saliency maps by the gradient of a class score (Selvaraju et al. 2017).

    .. math:: \alpha_k = \frac{1}{h w} \sum_{i, j} \frac{\partial y^c}{\partial A^k_{ij}}, \qquad
        L = \mathrm{ReLU}\Big(\sum_k \alpha_k A^k\Big)

    (Bai et al. 2023, Eqs. D.1, D.2), A being the maps of a layer of the network, and y the scores
    of any head. L is scaled to [0, 1] image by image, at its own size; SAMC's codec, as the code
    released with it, scales it once more when it has enlarged it. A map that is one number
    everywhere becomes zeros, which that code makes NaN.

    A batch takes one pass forward and one backward, of the sum of its scores, from the scores to
    the layer and no further. With a `LinearHead` behind the final maps that takes features as they
    are, :math:`\alpha_k` is :math:`w_{ck} / (h w)`, and there is no pass backward at all.

    Args:
        network: Its extractors have the layer. The caller puts it in evaluation mode.
        scores: Images -> scores [B, K] that come out of the network's extractors; None: those of
            the network. If they pass its extractors by, the network's own are taken.
        layer: Path of a module within each extractor, as ``"stages.2"``; None: the final maps.
        norms: Whether batch norms use their ``running`` statistics, or those of the ``batch``,
            as they do in the released code, which leaves the network in training mode. Running
            statistics stay as they are in either case. With a layer ahead of such a norm, the
            scores of a batch depend on each other's images.

    Raises:
        FastcilError: If an extractor has no such layer.

    Example:
        >>> from fastcil.nn import resnet20
        >>> network = Network([resnet20(width=4)], LinearHead(16, classes=5)).eval()
        >>> labels = torch.tensor([3, 0])
        >>> GradCAM(network)(torch.rand(2, 3, 32, 32), labels).shape
        torch.Size([2, 8, 8])
        >>> GradCAM(network, layer="stages.1")(torch.rand(2, 3, 32, 32), labels).shape
        torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        network: Network,
        scores: Callable[[Tensor], Tensor] | None = None,
        layer: str | None = None,
        norms: Literal["running", "batch"] = "running",
    ) -> None:
        self.network = network
        self.scores = scores
        self.norms = norms
        self.layers = [_layer(extractor, layer) for extractor in network.extractors]
        # Only these say exactly how maps become scores.
        self._linear = (
            scores is None
            and layer is None
            and type(network) is Network
            and type(network.head) is LinearHead
            and not network.head.normalised
        )

    def __call__(self, images: Tensor, labels: Tensor, among: Tensor | None = None) -> Tensor:
        """The maps of some images.

        Args:
            images: Normalised images.  # [B, 3, H, W]
            labels: The class c of each, int64.  # [B]
            among: Classes of which c is the one with the highest score, instead of the label.
                # [C]

        Returns:
            L, scaled to [0, 1], float32 or better.  # [B, h, w]
        """
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(images.device.type, enabled=False))
            if self.norms == "batch":
                stack.enter_context(batch_statistics(batch_norms(self.network)))
            find = self._by_weights if self._linear else self._by_gradient
            return saliency(*find(images, labels, among))

    @torch.no_grad()
    def _by_weights(
        self, images: Tensor, labels: Tensor, among: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Final maps, and the classifier's rows as the mean gradients they are."""
        maps = self.network.maps(images)
        if among is not None:
            labels = _highest(self.network.head(maps.mean((2, 3))), among)
        positions = maps.shape[2] * maps.shape[3]
        return maps, self.network.cam_weights(labels) / positions

    def _by_gradient(
        self, images: Tensor, labels: Tensor, among: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The layers' maps, and their mean gradients."""
        maps, found = self._seen(images, self.scores or self.network)
        if not maps and self.scores is not None:
            maps, found = self._seen(images, self.network)
        if not maps:
            raise FastcilError(
                "layer is a module that the network doesn't call; name another, or none for its "
                "final maps."
            )
        if any(len(part) != len(images) for part in maps):
            raise FastcilError(
                f"layer gives maps of {len(maps[0])} images for {len(images)}; name another, which "
                f"sees every image once."
            )
        chosen = labels if among is None else _highest(found.detach(), among)
        with torch.enable_grad():
            total = found.gather(1, chosen[:, None]).sum()
        gradients = torch.autograd.grad(total, maps, allow_unused=True, materialize_grads=True)
        joined = torch.cat([part.detach() for part in maps], 1)
        return joined, torch.cat([part.mean((2, 3)) for part in gradients], 1)

    def _seen(
        self, images: Tensor, scores: Callable[[Tensor], Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """What the layers give, as leaves of the graph, and the scores that come of it."""
        maps: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            maps.append(output.detach().requires_grad_())
            # A copy, for the network may go on in place.
            return maps[-1].clone()

        with ExitStack() as stack:
            stack.enter_context(_without_parameters(self.network))
            for layer in self.layers:
                stack.callback(layer.register_forward_hook(keep).remove)
            with torch.enable_grad():
                return maps, scores(images)


def saliency(maps: Tensor, weights: Tensor) -> Tensor:
    r"""What a weighted sum of feature maps shows of its class.

    .. math:: M = \frac{L - \min L}{\max L - \min L}, \qquad
        L = \mathrm{ReLU}\Big(\sum_k \alpha_k A^k\Big)

    (Bai et al. 2023, Eq. D.2, with the scaling of the released code), minimum and maximum over the
    positions of one image; zeros where they are the same.

    Args:
        maps: A.  # [B, C, h, w]
        weights: alpha.  # [B, C]

    Returns:
        M, float32 or better.  # [B, h, w]

    Example:
        >>> maps = torch.tensor([[[[-1.0, 1.0], [2.0, 4.0]]]])
        >>> saliency(maps, torch.tensor([[0.5]]))
        tensor([[[0.0000, 0.2500],
                 [0.5000, 1.0000]]])
    """
    wide = torch.promote_types(maps.dtype, torch.float32)
    summed = (maps.to(wide) * weights.to(wide)[:, :, None, None]).sum(1, keepdim=True)
    return cam(summed.relu(), summed.new_ones(len(summed), 1))


def _highest(scores: Tensor, among: Tensor) -> Tensor:
    """Of some classes the one with the highest score, int64 [B]."""
    among = among.to(scores.device)
    return among[scores[:, among].argmax(1)]


def _layer(extractor: nn.Module, path: str | None) -> nn.Module:
    """A module of an extractor, or itself."""
    if path is None:
        return extractor
    try:
        return extractor.get_submodule(path)
    except AttributeError as error:
        known = [name for name, part in extractor.named_modules() if name and name.count(".") < 2]
        raise FastcilError(
            f"layer is '{path}', which {type(extractor).__name__} has not; it has "
            f"{', '.join(known)}."
        ) from error


@contextmanager
def _without_parameters(module: nn.Module) -> Iterator[None]:
    """Keeps autograd from recording what leads to parameters."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
