"""TracIn-ideal: what happened to each test loss whenever a training example was shown (Pruthi et al. 2020, 3.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import sklearn.base
from jaxtyping import Float

from simfluence.attribution.scores import Scores
from simfluence.errors import InvalidInput, NotFittedError
from simfluence.runs import Run, Runs


class TracInIdeal(sklearn.base.BaseEstimator):
    """``Σ_t count_ti/|c_t| · (L_t(z) − L_{t+1}(z))`` over the steps t of recorded runs, read off their losses.

    A batch's change is shared out evenly among its examples. The unit is "loss": the predicted rise of z's loss if
    every occurrence of i were taken out. Of several runs, the mean over those that show i; an example that none shows
    has 0.

    >>> runs = Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> TracInIdeal().fit(runs).scores().values
    array([[ 2. , -0.5]])
    """

    def fit(self, runs: Run | Runs) -> TracInIdeal:
        """Read the runs.

        Raises:
            InvalidInput: no run, or a loss that was not recorded at every step, or is not finite.
        """
        several = [runs] if isinstance(runs, Run) else list(runs)
        if not several:
            raise InvalidInput("no run to trace: give one run or more")
        sums = np.zeros((several[0].losses.shape[1], several[0].curriculum.n_train))
        shown = np.zeros(several[0].curriculum.n_train)
        for run in several:
            sums += _traced(run)
            shown += run.curriculum.counts.sum(axis=0) > 0
        self.values_ = sums / np.maximum(shown, 1)
        self.ids_ = [side.ids if side is not None else None for side in (several[0].train, several[0].test)]
        return self

    def scores(self, test_data: Any = None, unit: str | None = None) -> Scores:
        """The scores ``[test, train]``, of the runs' own test examples.

        Raises:
            NotFittedError: before ``fit``.
            InvalidInput: other test data, which no run has losses of; or another unit.
        """
        if not hasattr(self, "values_"):
            raise NotFittedError("this TracInIdeal is not fitted yet: call fit(runs) first")
        if test_data is not None:
            raise InvalidInput("TracIn-ideal knows the runs' own test examples only: leave test_data out")
        if unit not in (None, "loss"):
            raise InvalidInput(f"no unit {unit!r}: TracIn-ideal gives 'loss'")
        return Scores(self.values_, "loss", "TracInIdeal", None, *self.ids_)


def _traced(run: Run) -> Float[np.ndarray, "test train"]:
    falls = -np.diff(run.losses.astype(np.float64), axis=0)  # [steps, test]
    if not np.isfinite(falls).all():
        raise InvalidInput(f"run {run.id} lacks losses at some steps, or diverged: TracIn-ideal needs each of them")
    shares = run.curriculum.counts.multiply(1 / np.maximum(run.curriculum.sizes, 1)[:, None])  # [steps, train]
    return np.asarray((shares.T @ falls).T)
