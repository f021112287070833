"""What is kept of old tasks by methods that hold weights where they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastcil.contract import Context, evaluating
from fastcil.curvature.curvature import Curvature, Penalty, Scan, grown
from fastcil.data import Examples
from fastcil.nn import Tensors

_WHERE, _HOW = "anchor/", "curvature/"


def scan_of(
    context: Context, model: nn.Module, examples: Examples, batch_statistics: bool = False
) -> Scan:
    """Goes through a task's images, unaugmented, the model being in evaluation mode.

    Args:
        context: Reads the images.
        model: What the curvature is measured of.
        examples: The images.
        batch_statistics: Whether batch norms that are in training mode stay so, but for the
            running statistics, which don't move.
    """
    training = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]

    def scan(update: Callable[[Tensor, Tensor], None]) -> None:
        def look(images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            if len(images):
                update(images, labels)
            return (labels,)

        with evaluating(model), _unmoved(training if batch_statistics else []):
            context.scan_labelled(look, examples, look="centre")

    return scan


@contextmanager
def _unmoved(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch norms that use a batch's own statistics, and keep the running ones as they were."""
    before = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for norm, values in zip(norms, before, strict=True):
            for name, value in values.items():
                norm.get_buffer(name).copy_(value)


def keep(model: nn.Module, names: Iterable[str], curvature: Curvature | None) -> Tensors:
    """Where some parameters are now, and the curvature there."""
    own = dict(model.named_parameters())
    values = {f"{_WHERE}{name}": own[name].detach().clone() for name in names}
    if curvature is not None:
        values |= {f"{_HOW}{name}": value for name, value in curvature.tensors().items()}
    return Tensors(values)


def kept_curvature(kept: Tensors) -> dict[str, Tensor]:
    """The tensors of the curvature that was kept."""
    return kept.group(_HOW)


def displacements(kept: Tensors, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters less where they were; what came since counts from zero.

    Args:
        kept: From `keep`.
        parameters: Of the model, by name; those of a head may have grown.
    """
    return {
        name: parameters[name] - grown(where, parameters[name].shape)
        for name, where in kept.group(_WHERE).items()
    }


class Hold:
    """The penalty for leaving what was kept, made when it is first needed.

    Args:
        kept: From `keep`.
        curvature: Empty, of the model as it is now.
    """

    def __init__(self, kept: Tensors, curvature: Curvature) -> None:
        self.kept = kept
        curvature.load_tensors(kept_curvature(kept))
        self._penalty = Penalty(curvature)

    def __call__(self, model: nn.Module) -> Tensor:
        """1/2 <D, H D> of the model's displacement, its parameters being those in force."""
        return self._penalty(displacements(self.kept, dict(model.named_parameters())))


def draws(index: int) -> torch.Generator:
    """The generator of one task's draws."""
    return torch.Generator().manual_seed(0x5EED + index)
