"""Recipes that several methods are published with."""

from __future__ import annotations

from fastcil.contract import Recipe

# Continual fine-tuning of a pre-trained network (Shon et al. 2022, Sec. 4.1); the length of a task
# and the batch are not told there, and are ours.
FINETUNING = Recipe(
    epochs=20, lr=1e-3, schedule="constant", momentum=0.9, weight_decay=1e-5, batch_size=32
)


def online(lr: float) -> Recipe:
    """One pass by plain SGD over batches of 10 images (Lopez-Paz and Ranzato 2017, Sec. 5).

    Example:
        >>> online(0.1).epochs, online(0.1).batch_size
        (1, 10)
    """
    return Recipe(
        epochs=1, lr=lr, schedule="constant", momentum=0.0, weight_decay=0.0, batch_size=10
    )
