"""Errors of the model or the loss in words: what was computed, on which examples, and which of them cause the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from simfluence.errors import InvalidInput, SimfluenceError
from simfluence.examples import Examples
from simfluence.task import Data, Task

__all__ = ["PASSED_ON", "explained", "named"]

#: Errors that are not explained: they say themselves what to do, or are not about the examples.
PASSED_ON = (SimfluenceError, Warning, MemoryError, torch.OutOfMemoryError)

#: Most examples that a message names, and most that are tried one by one.
_NAMED, _TRIED = 5, 1000


def named(examples: Examples, rows: Sequence[int]) -> str:
    """Name examples by row and id for an error message.

    >>> named(Examples(["a", "b", "c"]), [0, 2])
    "row 0 (id 'a'), row 2 (id 'c')"
    """
    shown = ", ".join(f"row {row} (id {examples.ids[row]!r})" for row in rows[:_NAMED])
    return shown + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")


def explained(
    error: Exception,
    doing: str,
    task: Task,
    side: str,
    rows: Sequence[int],
    model: nn.Module | None = None,
    data: Data | None = None,
) -> InvalidInput:
    """Return the error that tells the user what failed on which examples.

    Args:
        error: the error of torch or of the user's code.
        doing: what was being computed, such as "step 3".
        task: the task.
        side: "train" or "test", the examples' side.
        rows: rows of the examples.
        model, data: model and data of that side, with which each example is tried alone to find those at fault.
    """
    examples: Examples = getattr(task, side)
    kind = {"train": "training", "test": "test"}[side]
    rows = list(dict.fromkeys(rows))
    lines = str(error).strip().splitlines() or ["no message"]
    reason = f"{type(error).__name__}: {lines[0].rstrip('.')}"
    message = f"task {task.name!r}: {doing} failed on the {kind} examples {named(examples, rows)} with {reason}."
    at_fault = [] if model is None or data is None else _failing(task, model, data, rows[:_TRIED])
    if at_fault and len(at_fault) < len(rows):
        message += f" By itself, each of these fails: {named(examples, at_fault)}. Correct their inputs or targets."
    else:
        message += (
            " Check their inputs and targets, and that the model and the loss take a batch of this size (BatchNorm, "
            "for example, cannot train on a batch of one example: leave such batches out of the curriculum)."
        )
    return InvalidInput(message)


def _failing(task: Task, model: nn.Module, data: Data, rows: Sequence[int]) -> list[int]:
    """Return the rows on which the model or the loss fails alone, in evaluation mode."""
    model.eval()

    def evaluate(row: int) -> None:
        with torch.no_grad():
            task.batch_losses(model, task.some(data, torch.tensor([row])))

    return [row for row in rows if _fails(evaluate, row)]


def _fails(function: Callable[[int], Any], row: int) -> bool:
    try:
        function(row)
    except Exception:
        return True
    return False
