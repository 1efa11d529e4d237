"""The mean trajectory of recorded runs: the baseline of every score, and the centre of some simulators."""

from __future__ import annotations

import numpy as np

from simfluence.runs import Runs

__all__ = ["mean_trajectory"]


def mean_trajectory(runs: Runs) -> np.ndarray:
    """Return mean losses ``[steps + 1, test]`` in float64, at each time over the runs that recorded it.

    Times that no run recorded are interpolated linearly.
    """
    longest = max(len(run.losses) for run in runs)
    sums, counts = np.zeros((longest, runs.n_test)), np.zeros(longest)
    for run in runs:  # one at a time: all losses together may not fit into memory
        recorded = np.flatnonzero(~np.isnan(run.losses).any(axis=1))
        sums[recorded] += run.losses[recorded]
        counts[recorded] += 1
    times = np.flatnonzero(counts)
    means = sums[times] / counts[times, None]
    return np.stack([np.interp(np.arange(len(sums)), times, column) for column in means.T], axis=1)
