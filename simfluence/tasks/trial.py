"""A trial of a task's model and loss on a few examples, so that what cannot work is refused when a task is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from simfluence._internal.generator import lent_generator
from simfluence.errors import InvalidInput, SimfluenceError
from simfluence.task import Data, Task, cast, forward, take, tensors
from simfluence.tasks.losses import cross_entropy, token_cross_entropy

__all__ = ["try_model"]

#: Examples of each part in the trial.
_TRIED = 2


def try_model(task: Task) -> None:
    """Run the model and the loss on two training and two test examples, in evaluation mode.

    Raises:
        InvalidInput: the model cannot be built or does not run, the loss is not one number per example, or a label is
            no number of a class of the model.
    """
    with lent_generator():
        failures = [_failure(task, dtype) for dtype in (torch.float32, torch.float64)]  # a recipe may ask for either
    if all(failures) and failures[0] is not None:
        raise failures[0]


def _failure(task: Task, dtype: torch.dtype) -> InvalidInput | None:
    """Return what is wrong with the task in this dtype, if anything."""
    model = task.build_model(0)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    model = model.to(device, dtype).eval()
    for part, data in (("training", task.train_data), ("test", task.test_data)):
        some = cast(take(data, torch.arange(min(_TRIED, len(data[1])))), device, dtype)
        try:
            with torch.no_grad():
                outputs = forward(model, some[0])
            _check_labels(task, part, outputs, data[1])
            with torch.no_grad():
                task.read(outputs, some[1], task.measures)
        except InvalidInput as error:
            return error
        except (SimfluenceError, Warning, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            return _explained(task, model, data, error)
    return None


def _explained(task: Task, model: nn.Module, data: Data, error: Exception) -> InvalidInput:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    message = f"the model of task {task.name!r} does not run on its data: {reason}."
    whole = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors(data[0]) if not _is_float(tensor)})
    if whole:
        message += f" Inputs are {' and '.join(whole)}: if the model expects numbers with fractions, use float32"
        message += " (X.astype('float32') in NumPy, X.float() in torch)."
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors(data[0])[:3])
    return InvalidInput(f"{message} Inputs have shape {shapes}, and targets {list(data[1].shape)}")


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _check_labels(task: Task, part: str, outputs: Any, targets: Tensor) -> None:
    """Check that class numbers are between 0 and the number of the model's classes.

    Raises:
        InvalidInput: naming the first examples with other numbers.
    """
    classes = _classes(task, outputs, targets)
    if classes is None:
        return
    ignored = getattr(task.loss, "ignore_index", None)
    bad = (targets >= classes) | ((targets < 0) & (targets != ignored) & (task.loss is not token_cross_entropy))
    rows = torch.nonzero(bad.flatten(1).any(1) if bad.ndim > 1 else bad).flatten().tolist()
    if rows:
        value = targets[rows[0]][bad[rows[0]]].flatten()[0].item()
        examples = task.train if part == "training" else task.test
        more = f"; so have {len(rows) - 1} more" if len(rows) > 1 else ""
        raise InvalidInput(
            f"{part} example {rows[0]} (id {examples.ids[rows[0]]!r}) of task {task.name!r} has label {value}, but the "
            f"model has {classes} outputs, for the classes 0 to {classes - 1}{more}: correct the labels or the model"
        )


def _classes(task: Task, outputs: Any, targets: Tensor) -> int | None:
    """Return the model's number of classes, if the loss is a cross-entropy of class numbers."""
    if not isinstance(outputs, Tensor) or targets.is_floating_point() or outputs.ndim < 2:
        return None
    if task.loss is token_cross_entropy:
        return outputs.shape[-1]
    return outputs.shape[1] if task.loss is cross_entropy or isinstance(task.loss, nn.CrossEntropyLoss) else None
