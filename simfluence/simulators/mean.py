"""The mean trajectory of recorded runs, which every simulator is compared with and some are fitted around."""

from __future__ import annotations

import numpy as np

from simfluence.runs import Runs


def mean_trajectory(runs: Runs) -> np.ndarray:
    """Mean losses ``[steps + 1, test]`` in float64, at each time over the runs that have it.

    Where no run was read, a straight line joins the times around.
    """
    longest = max(len(run.losses) for run in runs)
    sums, counts = np.zeros((longest, runs.n_test)), np.zeros(longest)
    for run in runs:  # one at a time: they may be more than memory holds
        read = np.flatnonzero(~np.isnan(run.losses).any(axis=1))
        sums[read] += run.losses[read]
        counts[read] += 1
    times = np.flatnonzero(counts)
    means = sums[times] / counts[times, None]
    return np.stack([np.interp(np.arange(len(sums)), times, column) for column in means.T], axis=1)
