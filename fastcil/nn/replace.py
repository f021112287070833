"""Learnable activations in place of a network's own, or in a second branch that shares the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcil.errors import FastcilError
from fastcil.nn.pade import Pade

Activation = type[nn.Module] | tuple[type[nn.Module], ...]


class Replaced(NamedTuple):
    """A model with ``Pade`` activations, and where they are."""

    model: nn.Module
    names: tuple[str, ...]  # as in named_modules(), "" for the model itself


def _init_like(part: nn.Module) -> str | Callable[[Tensor], Tensor]:
    """What an activation that takes the place of ``part`` starts as."""
    if type(part) is nn.LeakyReLU and part.negative_slope == 0.01:
        return "leaky_relu"
    if type(part) is nn.GELU and part.approximate == "none":
        return "gelu"
    for kind, name in ((nn.ReLU, "relu"), (nn.SiLU, "silu"), (nn.Tanh, "tanh")):
        if type(part) is kind:
            return name
    probe = copy.deepcopy(part).to("cpu", torch.float64).eval()

    @torch.no_grad()
    def function(x: Tensor) -> Tensor:
        try:
            # An activation may work in place.
            y = probe(x.clone())
        except RuntimeError as error:
            raise FastcilError(
                f"{part} is no function of one number ({error}); say what to start as: init."
            ) from error
        if y.shape != x.shape:
            raise FastcilError(f"{part} changes the shape of its input; it is no activation.")
        return y

    return function


def _kind_of(part: nn.Module) -> Hashable:
    """Equal for modules that are the same function; what torch's own print says it all."""
    own = type(part).__module__.startswith("torch.nn.") and next(part.parameters(), None) is None
    return repr(part) if own else id(part)


def replace_activations(
    model: nn.Module,
    activation: Activation = nn.ReLU,
    degrees: tuple[int, int] = (5, 4),
    version: str = "A",
    init: str | Callable[[Tensor], Tensor] | None = None,
    groups: int = 1,
    share: bool = False,
) -> Replaced:
    """Puts a ``Pade`` activation in the place of every activation module of a model.

    One for each module: what is used in several places by one module still is. The new ones are on
    the model's device, in float32, trainable, and in training or evaluation mode as what they
    replace. Only modules can be found: an activation that the model calls as a function
    (``torch.relu``) or keeps outside its submodules stays.

    With ``share`` the model stays as it is and a second branch is made (Luo et al. 2023, Fig. 3): a
    copy that shares with it every Parameter and buffer, the very objects, so that training the one
    changes the other, and under the same names, so that ``torch.func.functional_call`` takes the
    same dictionary for both. They stay shared as long as they stay what they are: make the branch
    after the model has moved to its device and its head has grown. For a branch with weights of its
    own give ``copy.deepcopy(model)``.

    Args:
        model: Any module; changed in place unless ``share``.
        activation: Class or classes of the modules to replace.
        degrees: Degrees of the new activations.
        version: Form of their denominator.
        init: What they start as, as for ``Pade``; None: each as what it replaces.
        groups: Their groups of channels, which must divide the channels at each place.
        share: Whether to make a second branch that shares all else.

    Returns:
        ``model``, the model given, or the branch (or the ``Pade`` by itself where the model is
        itself an activation); ``names``, every name of a module that was replaced.

    Raises:
        FastcilError: If the model has no such module, or one of them is no function of one number
            and ``init`` is None.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> branch, names = replace_activations(model, share=True)
        >>> branch[0].weight is model[0].weight, names, type(branch[1]).__name__
        (True, ('1',), 'Pade')
        >>> replace_activations(model, nn.ReLU, version="B").model is model
        True
    """
    places = [
        (name, part)
        for name, part in model.named_modules(remove_duplicate=False)
        if isinstance(part, activation)
    ]
    if not places:
        kinds = activation if isinstance(activation, tuple) else (activation,)
        raise FastcilError(
            f"model {type(model).__name__} has no {' or '.join(kind.__name__ for kind in kinds)} "
            "module to replace; give each of its activations a module of its own instead of "
            "calling a function."
        )
    tensors = (*model.parameters(), *model.buffers())
    device = tensors[0].device if tensors else None
    made: dict[Hashable, Pade] = {}
    fresh: dict[int, Pade] = {}
    for _, part in places:
        if id(part) in fresh:
            continue
        kind = _kind_of(part) if init is None else None
        if kind not in made:
            made[kind] = Pade(degrees, version, init or _init_like(part), groups)
        fresh[id(part)] = copy.deepcopy(made[kind]).to(device).train(part.training)
    names = tuple(name for name, _ in places)
    if share:
        # What the memo of a deep copy already holds is used as it is.
        memo: dict[int, object] = {id(tensor): tensor for tensor in tensors}
        return Replaced(_without_shortcuts(copy.deepcopy(model, {**memo, **fresh})), names)
    for name, part in places:
        owner, _, own_name = name.rpartition(".")
        if name:
            setattr(model.get_submodule(owner), own_name, fresh[id(part)])
    return Replaced(_without_shortcuts(fresh.get(id(model), model)), names)


def _without_shortcuts(model: nn.Module) -> nn.Module:
    """Takes from torch's own encoder layers the note that their activation is ReLU or GELU.

    In evaluation they would compute that, whatever their activation module is by now.
    """
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoderLayer) and isinstance(part.activation, Pade):
            part.activation_relu_or_gelu = 0
    return model


def share_with_pade(
    module: nn.Module,
    activation: Activation = nn.ReLU,
    degrees: tuple[int, int] = (5, 4),
    version: str = "A",
) -> nn.Module:
    """A second branch: the same weights, other activations (Luo et al. 2023, Fig. 3).

    Args:
        module: A network or a part of one.
        activation: Class or classes of the modules to replace.
        degrees: Degrees of the new activations.
        version: Form of their denominator.

    Returns:
        The branch that ``replace_activations(..., share=True)`` makes.

    Raises:
        FastcilError: If ``module`` has no such module.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> branch = share_with_pade(network)
        >>> branch[0].weight is network[0].weight, type(branch[1]).__name__
        (True, 'Pade')
    """
    return replace_activations(module, activation, degrees, version, share=True).model
