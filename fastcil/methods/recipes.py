"""Recipes that several methods are published with."""

from __future__ import annotations

from fastcil.contract import Recipe

# Continual fine-tuning of a pre-trained network (Shon et al. 2022, Sec. 4.1); the length of a task
# and the batch are not told there, and are ours.
FINETUNING = Recipe(
    epochs=20, lr=1e-3, schedule="constant", momentum=0.9, weight_decay=1e-5, batch_size=32
)


# PyCIL's (Zhou et al. 2023), from scratch and with replay.
PYCIL_FIRST = Recipe(
    epochs=200, lr=0.1, schedule="step", milestones=(60, 120, 170), weight_decay=5e-4
)
PYCIL_REPLAY = Recipe(epochs=70, lr=0.1, schedule="step", milestones=(30, 50), weight_decay=2e-4)


def online(lr: float) -> Recipe:
    """One pass by plain SGD over batches of 10 images (Lopez-Paz and Ranzato 2017, Sec. 5).

    Example:
        >>> online(0.1).epochs, online(0.1).batch_size
        (1, 10)
    """
    return Recipe(
        epochs=1, lr=lr, schedule="constant", momentum=0.0, weight_decay=0.0, batch_size=10
    )


# The base session of few-shot streams (Yang et al. 2021, LEC-Net, Sec. 4.1; momentum and weight
# decay as in Tao et al. 2020), which all methods that are compared share.
BASE_SESSION = Recipe(epochs=100, lr=0.1, schedule="step", milestones=(60,), nesterov=True)


def session(epochs: int, lr: float = 0.1, drop: int | None = None, batch_size: int = 128) -> Recipe:
    """A few-shot session's training, as in the code of Tao et al. (2020, TOPIC).

    All shots come in one batch, of at most 128 images, and momentum is Nesterov's.

    Args:
        epochs: Steps, where all shots make one batch.
        lr: Learning rate.
        drop: Epoch after which it is a tenth; None for never.
        batch_size: Images of a step, and exemplars beside them.

    Example:
        >>> session(70, drop=60).lr_at(60)
        0.010000000000000002
    """
    if drop is None:
        return Recipe(epochs, lr, "constant", nesterov=True, batch_size=batch_size)
    return Recipe(epochs, lr, "step", milestones=(drop,), nesterov=True, batch_size=batch_size)
