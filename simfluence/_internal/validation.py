"""Lists of example indices from outside, checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from simfluence._internal.types import Indices
from simfluence.errors import InvalidInput


def checked_indices(target: Any, count: int) -> Indices:
    """``target`` as an int array, each in ``0…count−1``.

    Raises:
        InvalidInput: it is empty, not a list of integers, or out of range.
    """
    array = np.asarray(target)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise InvalidInput(f"expected a filter text, or a list of indices or ids, got {target!r}")
    if array.min() < 0 or array.max() >= count:
        bad = array[(array < 0) | (array >= count)][0]
        raise InvalidInput(f"no example {bad}: indices go from 0 to {count - 1}")
    return array.astype(np.int64)
