"""Bounds that forecasts stay within, because no loss of the fitting runs gives reason to go beyond them."""

from __future__ import annotations

import numpy as np

from simfluence.runs import Runs

__all__ = ["bounds_of", "kept_within", "run_away"]

_FARTHEST = 10  # largest forecast, as a multiple of the largest recorded loss


def bounds_of(runs: Runs) -> np.ndarray:
    """Return the least and the largest loss that is forecast, ``[2]``.

    Ten times the largest loss of the runs in size; and not below 0 if none of them is, as most losses have no negative
    values.
    """
    size, least = max(float(np.nanmax(np.abs(run.losses))) for run in runs), min(np.nanmin(run.losses) for run in runs)
    return np.array([0.0 if least >= 0 else -_FARTHEST * size, _FARTHEST * size])


def kept_within(losses: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Clip losses to the bounds; what is not a number has grown beyond them."""
    kept: np.ndarray = np.clip(np.nan_to_num(losses, nan=bounds[1]), *bounds)
    return kept


def run_away(losses: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Tell losses that a bound had to stop from those that fell a little below 0."""
    margin = bounds[1] / _FARTHEST
    away: np.ndarray = ~((losses >= bounds[0] - margin) & (losses <= bounds[1]))  # NaN too
    return away
