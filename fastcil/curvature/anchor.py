"""What is kept of old tasks by methods that hold weights where they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from fastcil.contract import Context, evaluating
from fastcil.curvature.curvature import Curvature, Penalty, Scan, grown
from fastcil.data import Examples
from fastcil.nn import Tensors
from fastcil.nn.norms import batch_norms, batch_statistics

_WHERE, _HOW = "anchor/", "curvature/"


def scan_of(
    context: Context, model: nn.Module, examples: Examples, own_statistics: bool = False
) -> Scan:
    """Goes through a task's images, unaugmented, the model being in evaluation mode.

    Passes compute in the weights' precision, whatever the context's other scans do.

    Args:
        context: Reads the images.
        model: What the curvature is measured of.
        examples: The images.
        own_statistics: Whether batch norms that are in training mode stay so, but for the
            running statistics, which don't move.
    """
    training = [norm for norm in batch_norms(model) if norm.training]

    def scan(update: Callable[[Tensor, Tensor], None]) -> None:
        def look(images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            if len(images):
                with torch.autocast(images.device.type, enabled=False):
                    update(images, labels)
            return (labels,)

        with evaluating(model), batch_statistics(training if own_statistics else []):
            context.scan_labelled(look, examples, look="centre")

    return scan


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


def draws(index: int, seed: int = 0) -> torch.Generator:
    """The generator of one task's draws.

    Args:
        index: The task's number.
        seed: Sets runs apart. Once a task's training has begun, ``torch.initial_seed()`` is the
            one that the engine gave it, in a run that was resumed too.
    """
    return torch.Generator().manual_seed((0x5EED + index + seed) % 2**63)
