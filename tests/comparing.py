"""How far numbers that are computed in two ways are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def relative(found: Any, true: Any) -> float:
    """The largest error relative to the largest number: float32 rounds losses near 10 more than those near 1."""
    found, true = (np.asarray(x.detach() if isinstance(x, Tensor) else x, np.float64) for x in (found, true))
    assert found.shape == true.shape
    return float(np.abs(found - true).max() / np.abs(true).max())
