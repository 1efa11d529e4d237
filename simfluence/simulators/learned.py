"""Checks of what a file of a simulator holds: the shapes of its arrays, which must fit together, and its numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from simfluence._internal.validation import whole
from simfluence.errors import InvalidInput

__all__ = ["MOST", "check_arrays", "check_counts", "check_indices"]

#: Largest count in a file; it also bounds what is allocated from it.
MOST = 2**31 - 1

#: Kinds of numbers, in NumPy's letters.
_KINDS = {"float": "f", "int": "iu", "bool": "b", "number": "fiu"}


def check_arrays(simulator: Any, shapes: Mapping[str, str], empty: Collection[str] = ()) -> dict[str, int]:
    """Check that learned arrays have finite numbers of the right kind, and axes of sizes that agree.

    Return the sizes by axis.

    Args:
        simulator: has the arrays as attributes.
        shapes: for each array its kind of number ("float", "int", "bool", "number", or an exact type), then its axes:
            ``"float times test"``. An axis is its size in digits, or a name; ``train`` and ``test`` are the numbers of
            examples.
        empty: axes that may have the size 0.

    Raises:
        InvalidInput: an array is missing, does not fit, or has a NaN or an infinity.

    >>> class Fitted:
    ...     n_train_, n_test_ = 3, 2
    ...     mean_ = np.zeros((5, 2))
    >>> check_arrays(Fitted(), {"mean_": "float times test"})
    {'train': 3, 'test': 2, 'times': 5}
    """
    sizes = {"train": simulator.n_train_, "test": simulator.n_test_}
    for name, text in shapes.items():
        kind, *axes = text.split()
        array: Any = getattr(simulator, name, None)
        fits = isinstance(array, np.ndarray) and array.ndim == len(axes)
        if not fits or (array.dtype.kind not in _KINDS[kind] if kind in _KINDS else array.dtype != kind):
            raise InvalidInput(f"{name} is not an array of {kind} [{', '.join(axes)}]")
        for axis, size in zip(axes, array.shape, strict=True):
            expected = int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
            if size != expected or (size == 0 and axis not in empty):
                raise InvalidInput(f"{name} has {size} {axis}, not {expected or 'any'}")
        if array.dtype.kind == "f" and array.size and not np.isfinite([array.min(), array.max()]).all():
            raise InvalidInput(f"{name} has a NaN or an infinity")
    return sizes


def check_counts(simulator: Any, *names: str) -> None:
    """Check that learned attributes are whole numbers from 1 up.

    Raises:
        InvalidInput: one is missing, of another type or out of range.
    """
    for name in names:
        whole(name, getattr(simulator, name, None), 1, MOST)


def check_indices(name: str, values: np.ndarray, limit: int) -> None:
    """Check that whole numbers are from 0 to ``limit − 1``.

    Raises:
        InvalidInput: one is not.
    """
    if values.size and (values.min() < 0 or values.max() >= limit):
        raise InvalidInput(f"{name} has numbers that are not from 0 to {limit - 1}")
