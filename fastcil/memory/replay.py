"""New data and exemplars side by side, as methods replay them."""

from __future__ import annotations

import torch

from fastcil.contract import Stream, Task


def replay_streams(task: Task, batch_size: int) -> tuple[Stream, ...]:
    """A stream of the new data and one of exemplars, as many of each in a step.

    Args:
        task: The task.
        batch_size: Images of each stream in a step.

    Returns:
        Two streams, or the first alone while memory is empty. Exemplars are part 1 in every batch.
    """
    new = Stream((task.examples,), batch_size)
    if not len(task.exemplars):
        return (new,)
    # Both parts, of which only the second is drawn.
    old = torch.arange(len(task.examples), len(task.examples) + len(task.exemplars))
    return new, Stream((task.examples, task.exemplars), batch_size, subset=old)
