"""What methods, addons and the engine agree on."""

from fastcil.contract.addon import Addon, Fitting
from fastcil.contract.batch import Batch
from fastcil.contract.checks import check_choices, check_not_negative, check_positive
from fastcil.contract.context import Context, Look
from fastcil.contract.method import Method
from fastcil.contract.persistent import Persistent, evaluating
from fastcil.contract.recipe import (
    Recipe,
    replace_batch_size,
    restore_optimizer,
    scale_epochs,
)
from fastcil.contract.record import Record
from fastcil.contract.registry import lookup, nearest, parse_composition, register
from fastcil.contract.retained import Kind, Retained
from fastcil.contract.stage import Losses, Stage, Stepper, Stream, Views, total
from fastcil.contract.task import Task

__all__ = [
    "Addon",
    "Batch",
    "Context",
    "Fitting",
    "Kind",
    "Look",
    "Losses",
    "Method",
    "Persistent",
    "Recipe",
    "Record",
    "Retained",
    "Stage",
    "Stepper",
    "Stream",
    "Task",
    "Views",
    "check_choices",
    "check_not_negative",
    "check_positive",
    "evaluating",
    "lookup",
    "nearest",
    "parse_composition",
    "register",
    "replace_batch_size",
    "restore_optimizer",
    "scale_epochs",
    "total",
]
