"""Baseline forecasts that ignore the curriculum. A useful simulator beats them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simfluence.curriculum import Curriculum
from simfluence.runs import Runs
from simfluence.simulators.base import Simulator
from simfluence.simulators.learned import check_arrays
from simfluence.simulators.mean import mean_trajectory

__all__ = ["MeanTrajectorySimulator", "PersistenceSimulator"]


class PersistenceSimulator(Simulator):
    """Constant losses: ``L_t = L_0``.

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
    """The mean of the fitting runs at each step, for any curriculum: ``L_t = m_t``.

    Beyond the longest fitting run the last mean is repeated.

    Attributes:
        mean_: mean over the runs that recorded the step, ``[steps + 1, test]``.

    >>> runs = Runs.from_arrays([[[0], [1]], [[1], [1]]], [[[3.0], [2.0], [1.0]], [[3.0], [2.5], [2.0]]])
    >>> MeanTrajectorySimulator().fit(runs).simulate(runs.curricula[:1], [3.0]).ravel()
    array([3.  , 2.25, 1.5 ])
    """

    name = "mean_trajectory"

    def _fit(self, runs: Runs) -> None:
        self.mean_ = mean_trajectory(runs)

    def _check_learned(self) -> None:
        super()._check_learned()
        check_arrays(self, {"mean_": "float times test"})

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        times = np.minimum(np.arange(_times(curricula)), len(self.mean_) - 1)
        return np.repeat(self.mean_[times][None], len(curricula), axis=0)


def _times(curricula: Sequence[Curriculum]) -> int:
    return max(len(curriculum) for curriculum in curricula) + 1
