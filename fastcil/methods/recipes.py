"""Recipes that several methods are published with."""

from __future__ import annotations

from fastcil.contract import Recipe

# Continual fine-tuning of a pre-trained network (Shon et al. 2022, Sec. 4.1); the length of a task
# and the batch are not told there, and are ours.
FINETUNING = Recipe(
    epochs=20, lr=1e-3, schedule="constant", momentum=0.9, weight_decay=1e-5, batch_size=32
)
