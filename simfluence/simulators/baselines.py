"""Forecasts that cost nothing. A simulator worth having beats them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simfluence.curriculum import Curriculum
from simfluence.runs import Runs
from simfluence.simulators.base import Simulator


class PersistenceSimulator(Simulator):
    """The losses stay as they started: ``L_t = L_0``.

    >>> runs = Runs.from_arrays([[[0], [1]]], [[[3.0], [2.0], [1.0]]])
    >>> PersistenceSimulator().fit(runs).simulate(runs.curricula, [5.0]).ravel()
    array([5., 5., 5.])
    """

    name = "persistence"

    def _fit(self, runs: Runs) -> None:
        pass

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        return np.repeat(initial[:, None], _times(curricula), axis=1)


class MeanTrajectorySimulator(Simulator):
    """The mean of the fitting runs at each step, whatever the curriculum: ``L_t = m_t``.

    Beyond the longest fitting run the last mean is held.

    Attributes:
        mean_: ``[steps + 1, test]``, over the runs that have that step.

    >>> runs = Runs.from_arrays([[[0], [1]], [[1], [1]]], [[[3.0], [2.0], [1.0]], [[3.0], [2.5], [2.0]]])
    >>> MeanTrajectorySimulator().fit(runs).simulate(runs.curricula[:1], [3.0]).ravel()
    array([3.  , 2.25, 1.5 ])
    """

    name = "mean_trajectory"

    def _fit(self, runs: Runs) -> None:
        self.mean_ = mean_trajectory(runs)

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        times = np.minimum(np.arange(_times(curricula)), len(self.mean_) - 1)
        return np.repeat(self.mean_[times][None], len(curricula), axis=0)


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


def _times(curricula: Sequence[Curriculum]) -> int:
    return max(len(curriculum) for curriculum in curricula) + 1
