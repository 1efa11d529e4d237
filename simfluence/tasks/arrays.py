"""Tasks from a user's own arrays and model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from simfluence.errors import InvalidInput, did_you_mean
from simfluence.examples import Examples
from simfluence.task import Data, Task, take, tensors
from simfluence.tasks.losses import BY_NAME

__all__ = ["from_arrays"]


def from_arrays(
    model: nn.Module | Callable[[], nn.Module],
    X: Any,
    y: Any,
    loss: str | Callable[[Any, Tensor], Tensor],
    *,
    test: Sequence[Any] | int | float = 0.25,
    metadata: pd.DataFrame | None = None,
    test_metadata: pd.DataFrame | None = None,
    seed: int = 0,
    name: str = "arrays",
) -> Task:
    """Build a task from arrays: NumPy, torch, or mappings and sequences of them; the first axis counts examples.

    Args:
        model: function without arguments that returns a fresh module, or a module whose present weights every run
            starts from.
        X, y: inputs and targets.
        loss: "cross_entropy", "squared_error", or ``loss(outputs, targets)`` → ``[batch]``, not reduced.
        test: test examples as ``(X, y)``, or the number (int) or fraction (float) of the examples to hold out,
            drawn with ``seed``.
        metadata: table with one row per example of ``X``, for filters. By default, whole-number targets become a
            column ``label``.
        test_metadata: the same for test examples that are given as arrays.
        seed: seed of the held-out sample.
        name: name of the task.

    Raises:
        InvalidInput: lengths differ, the loss is unknown, or no training or test example is left.

    >>> rng = np.random.default_rng(0)
    >>> from_arrays(nn.Linear(2, 3), rng.normal(size=(8, 2)), rng.integers(3, size=8), "cross_entropy")
    Task('arrays', train=6, test=2)
    """
    if isinstance(loss, str) and loss not in BY_NAME:
        raise InvalidInput(f"unknown loss {loss!r}, {did_you_mean(loss, BY_NAME)}")
    as_classes = loss == "cross_entropy"
    loss = BY_NAME[loss] if isinstance(loss, str) else loss
    data = _as_data(X, y, as_classes)
    if not isinstance(test, int | float):
        X_test, y_test = test
        train, test_data = _examples(data, metadata), _as_data(X_test, y_test, as_classes)
        return Task(name, model, data, test_data, loss, train, _examples(test_data, test_metadata))
    rows = np.random.default_rng(seed).permutation(len(data[1]))
    n_test = round(test * len(rows)) if isinstance(test, float) else test
    if not 1 <= n_test < len(rows):
        raise InvalidInput(f"test={test!r} of {len(rows)} examples: leave at least one each for training and test")
    table = _examples(data, metadata).table
    parts = [np.sort(rows[n_test:]), np.sort(rows[:n_test])]
    train_data, test_data = (take(data, torch.as_tensor(part)) for part in parts)
    train, held_out = (Examples(table["id"].iloc[part].tolist(), table.drop(columns="id").iloc[part]) for part in parts)
    return Task(name, model, train_data, test_data, loss, train, held_out)


def _as_data(X: Any, y: Any, as_classes: bool) -> Data:
    inputs, targets = _as_tensors(X), _as_tensors(y)
    if not isinstance(targets, Tensor):
        raise InvalidInput("targets must be one array")
    if as_classes:
        targets = targets.reshape(len(targets)) if targets.numel() == len(targets) else targets
        if targets.ndim == 1 and bool((targets.double() == targets.double().round()).all()):
            targets = targets.to(torch.int64)
    counts = {len(tensor) for tensor in tensors((inputs, targets))}
    if len(counts) != 1:
        raise InvalidInput(f"inputs and targets must be equally many, got {sorted(counts)}")
    return inputs, targets


def _as_tensors(data: Any) -> Any:
    """Convert NumPy and pandas data to tensors; the recipe's dtype is applied when recording."""
    if isinstance(data, dict):
        return {name: _as_tensors(part) for name, part in data.items()}
    if isinstance(data, tuple) or (isinstance(data, list) and data and isinstance(data[0], np.ndarray | Tensor)):
        return tuple(_as_tensors(part) for part in data)
    if isinstance(data, Tensor):
        return data.detach()
    array = np.asarray(data)
    if array.dtype.kind not in "biuf":
        raise InvalidInput(
            f"arrays must hold numbers, got {array.dtype}: encode text first (labels with "
            "sklearn.preprocessing.LabelEncoder, for example) and pass it as metadata="
        )
    return torch.tensor(array)


def _examples(data: Data, metadata: pd.DataFrame | None) -> Examples:
    targets = data[1]
    if metadata is None and targets.ndim == 1 and not targets.is_floating_point():
        metadata = pd.DataFrame({"label": targets.cpu().numpy()})
    return Examples.numbered(len(targets), metadata)
