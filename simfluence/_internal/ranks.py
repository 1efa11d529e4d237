"""Rank correlation of the rows of two arrays."""

from __future__ import annotations

import numpy as np
import scipy.stats

__all__ = ["row_spearman"]


def row_spearman(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Compute Spearman's ρ along the last axis; NaN where an input is constant."""
    ranks = [scipy.stats.rankdata(values, axis=-1) for values in (left, right)]
    centred = [rank - rank.mean(-1, keepdims=True) for rank in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(-1) * (centred[1] ** 2).sum(-1))
    covariance = (centred[0] * centred[1]).sum(-1)
    values: np.ndarray = np.divide(covariance, scale, out=np.full_like(scale, np.nan), where=scale > 0)
    return values
