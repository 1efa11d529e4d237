"""Tasks from a user's own arrays and model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from simfluence._internal.checked import checked, shown
from simfluence._internal.types import Seed
from simfluence.errors import InvalidInput
from simfluence.examples import Examples
from simfluence.task import Data, Task, take, tensors
from simfluence.tasks.conversion import as_tensors, check_finite, class_names, numbered
from simfluence.tasks.losses import BY_NAME, cross_entropy, loss_named, token_cross_entropy
from simfluence.tasks.trial import try_model

__all__ = ["from_arrays"]


@checked
def from_arrays(
    model: nn.Module | Callable[[], nn.Module],
    X: Any,
    y: Any,
    loss: str | Callable[[Any, Tensor], Tensor],
    *,
    test: int | float | Sequence[Any] = 0.25,
    metadata: pd.DataFrame | None = None,
    test_metadata: pd.DataFrame | None = None,
    seed: Seed = 0,
    name: str = "arrays",
) -> Task:
    """Build a task from arrays; the first axis counts examples.

    Arrays are NumPy's, torch's, pandas' or SciPy's sparse ones, or mappings and sequences of them. They are copied. The
    model and the loss are tried on two examples of each part.

    Args:
        model: function without arguments that returns a fresh module, or a module whose present weights every run
            starts from.
        X, y: inputs and targets. For a cross-entropy, ``y`` may be text: classes are numbered in sorted order.
        loss: "cross_entropy", "squared_error", "token_cross_entropy", or ``loss(outputs, targets)`` → ``[batch]``, not
            reduced.
        test: test examples as ``(X, y)``, or the number (int) or fraction (float) of the examples to hold out,
            drawn with ``seed``.
        metadata: table with one row per example of ``X``, for filters. By default, whole-number targets become a
            column ``label``; text labels always do.
        test_metadata: the same for test examples that are given as arrays.
        seed: seed of the held-out sample.
        name: name of the task.

    Raises:
        InvalidInput: lengths differ, a number is missing or infinite, the loss is unknown or reduced, a label is not a
            class of the model, the model does not run on the data, or no training or test example is left.

    >>> rng = np.random.default_rng(0)
    >>> from_arrays(nn.Linear(2, 3), rng.normal(size=(8, 2)), rng.integers(3, size=8), "cross_entropy")
    Task('arrays', train=6, test=2)
    """
    loss = loss_named(loss) if isinstance(loss, str) else loss
    names = class_names(y) if loss is cross_entropy or isinstance(loss, nn.CrossEntropyLoss) else None
    data, table = _part("", X, y, loss, names, metadata)
    if not isinstance(test, int | float):
        if len(test) != 2:
            raise InvalidInput(f"test must be a number, a fraction, or arrays (X, y), got {shown(test)}")
        test_data, test_table = _part("test ", test[0], test[1], loss, names, test_metadata)
        train, held_out = Examples.numbered(len(data[1]), table), Examples.numbered(len(test_data[1]), test_table)
        return _tried(Task(name, model, data, test_data, loss, train, held_out))
    if test_metadata is not None:
        raise InvalidInput(
            "test_metadata= is for test examples that are given as arrays: pass test=(X, y), or leave it"
        )
    rows = np.random.default_rng(seed).permutation(len(data[1]))
    n_test = round(test * len(rows)) if isinstance(test, float) else test
    if not 1 <= n_test < len(rows):
        raise InvalidInput(f"test={test!r} of {len(rows)} examples: leave at least one each for training and test")
    parts = [np.sort(rows[n_test:]), np.sort(rows[:n_test])]
    train_data, test_data = (take(data, torch.as_tensor(part)) for part in parts)
    train, held_out = (Examples(part.tolist(), None if table is None else table.iloc[part]) for part in parts)
    return _tried(Task(name, model, train_data, test_data, loss, train, held_out))


def _tried(task: Task) -> Task:
    try_model(task)
    return task


def _part(
    part: str, X: Any, y: Any, loss: Callable[..., Tensor], names: list[str] | None, metadata: pd.DataFrame | None
) -> tuple[Data, pd.DataFrame | None]:
    """Return data and metadata of the training examples (part "") or the test examples ("test ")."""
    _check_order(part, X, y, metadata)
    labels = None
    if names is not None:
        y, labels = numbered(y, names, f"{part}y")
    data = _as_data(part, X, y, loss)
    if metadata is not None and "id" in metadata.columns:
        raise InvalidInput("metadata must not have a column 'id', as ids are row numbers: rename the column")
    if metadata is not None and len(metadata) != len(data[1]):
        raise InvalidInput(f"{part}metadata has {len(metadata)} rows for {len(data[1])} examples: give one per example")
    if labels is not None and (metadata is None or "label" not in metadata.columns):
        table = pd.DataFrame(index=range(len(labels))) if metadata is None else metadata.reset_index(drop=True)
        return data, table.assign(label=labels)
    if metadata is None and data[1].ndim == 1 and not data[1].is_floating_point():
        metadata = pd.DataFrame({"label": data[1].numpy()})
    return data, metadata


def _check_order(part: str, X: Any, y: Any, metadata: pd.DataFrame | None) -> None:
    """Check that pandas' indices do not say that rows belong together otherwise than by position.

    Raises:
        InvalidInput: two indices have the same labels in another order.
    """
    indexed = {f"{part}X": X, f"{part}y": y, f"{part}metadata": metadata}
    indices = {name: data.index for name, data in indexed.items() if isinstance(data, pd.DataFrame | pd.Series)}
    for (one, left), (other, right) in zip(list(indices.items())[:-1], list(indices.items())[1:], strict=True):
        if len(left) == len(right) and not left.equals(right) and len(left.difference(right)) == 0 and left.is_unique:
            raise InvalidInput(
                f"{one} and {other} have the same index in another order: align them first ({other}.loc[{one}.index]), "
                f"or reset the index of both if their rows belong together as they are"
            )


def _as_data(part: str, X: Any, y: Any, loss: Callable[..., Tensor]) -> Data:
    inputs, targets = as_tensors(f"{part}X", X), as_tensors(f"{part}y", y)
    if not isinstance(targets, Tensor):
        raise InvalidInput(f"{part}y must be one array: targets must be one array (np.stack joins arrays of examples)")
    counts = {len(tensor) for tensor in tensors((inputs, targets))}
    if len(counts) != 1:
        hint = ": a list of arrays is several inputs; np.stack joins arrays of single examples"
        raise InvalidInput(
            f"{part}inputs and targets must be equally many, got {sorted(counts)}{hint if isinstance(X, list) else ''}"
        )
    check_finite(f"{part}X", inputs, X)
    if loss in BY_NAME.values() or isinstance(loss, nn.CrossEntropyLoss):  # others may take NaN for "no target"
        check_finite(f"{part}y", targets, y)
    if loss is cross_entropy or isinstance(loss, nn.CrossEntropyLoss):
        targets = _as_classes(f"{part}y", targets)
    if loss is token_cross_entropy:
        _check_tokens(f"{part}y", targets)
    return inputs, targets


def _as_classes(name: str, targets: Tensor) -> Tensor:
    """Return class numbers ``[examples]`` as int64; other targets stay as they are (probabilities, pixels)."""
    if targets.numel() == len(targets):
        targets = targets.reshape(len(targets))
    if targets.ndim > 1:
        return targets if targets.is_floating_point() else targets.to(torch.int64)
    fractions = torch.nonzero(targets.double() != targets.double().round()).flatten().tolist()
    if fractions:
        raise InvalidInput(
            f"{name} must be class numbers 0, 1, …, but row {fractions[0]} has {targets[fractions[0]].item():g}: for "
            "numbers to predict use loss='squared_error'"
        )
    return targets.to(torch.int64)


def _check_tokens(name: str, targets: Tensor) -> None:
    """Check that every example has a token with a target.

    Raises:
        InvalidInput: naming the first rows without one.
    """
    if targets.is_floating_point() or targets.ndim < 2:
        raise InvalidInput(f"{name} must be token numbers [examples, tokens], got {list(targets.shape)}")
    rows = torch.nonzero((targets < 0).flatten(1).all(1)).flatten().tolist()
    if rows:
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        raise InvalidInput(f"{name} has no target token in row {rows[0]}{more} (all are negative): leave it out")
