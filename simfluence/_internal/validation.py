"""Checks of arguments: indices, numbers and choices."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from simfluence._internal.types import Indices
from simfluence.errors import InvalidInput


def checked_indices(target: Any, count: int) -> Indices:
    """Return ``target`` as an int array of indices in ``0…count−1``.

    Raises:
        InvalidInput: ``target`` is empty or not a list of integers, or an index is out of range.
    """
    array = np.asarray(target)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise InvalidInput(f"expected a filter (a string) or a list of indices or ids, got {str(target)[:100]}")
    if array.min() < 0 or array.max() >= count:
        bad = array[(array < 0) | (array >= count)][0]
        raise InvalidInput(f"no example {bad}: indices go from 0 to {count - 1}")
    return array.astype(np.int64)


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return ``value`` as an int, checked to be a Python or NumPy integer within its bounds.

    Raises:
        InvalidInput: ``value`` is not a whole number, or out of range.
    """
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)
    checked = int(value) if integral else None
    if checked is None or (least is not None and checked < least) or (most is not None and checked > most):
        raise InvalidInput(f"{name} must be a whole number{_range(least, most)}, got {value!r}")
    return checked


def number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    """Return ``value`` as a float, checked to be a finite number within its bounds.

    Raises:
        InvalidInput: ``value`` is not a finite number, or out of range.
    """
    bounds = f" above {above:g}" if above is not None else _range(least, None)
    real = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    checked = float(value) if real else math.nan
    within = (least is None or checked >= least) and (above is None or checked > above)
    if not (math.isfinite(checked) and within):
        raise InvalidInput(f"{name} must be a number{bounds}, got {value!r}")
    return checked


def one_of(name: str, value: Any, options: Sequence[Any]) -> Any:
    """Return ``value``, checked to be one of ``options``.

    Raises:
        InvalidInput: ``value`` is none of them.
    """
    if value not in options:
        raise InvalidInput(f"{name}={value!r} is unknown: choose from {', '.join(map(repr, options))}")
    return value


def _range(least: float | None, most: float | None) -> str:
    if least is None:
        return ""
    return f" from {least} up" if most is None else f" from {least} to {most}"
