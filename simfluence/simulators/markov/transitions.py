"""Recorded runs as rows of a regression: the weights of a batch, and the losses before and after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from simfluence.errors import InvalidInput
from simfluence.runs import Run, Runs
from simfluence.simulators.batches import batch_weights
from simfluence.simulators.markov.least_squares import Lazy

__all__ = ["Transitions", "check_every_step"]


@dataclass(frozen=True)
class Transitions:
    """Pairs of successive readings with an update in between, a row each; losses are read from the runs when needed.

    Args:
        weights: batch weights between the readings, ``[rows, train]``: of one step, or summed over several.
        times: time of the earlier reading, ``[rows]``.
        runs: each run with the times of its earlier and its later readings, each ``[rows of the run]``.
    """

    weights: scipy.sparse.csr_array
    times: np.ndarray
    runs: Sequence[tuple[Run, np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, runs: Runs, batch_size: int) -> Transitions:
        """Collect the rows of recorded runs: one per step, or one per gap, whose steps' weights are summed."""
        longest = max(run.steps for run in runs)
        weights, _ = batch_weights(runs.curricula, longest, batch_size)
        weights.sum_duplicates()
        gaps = [np.diff(run.times) for run in runs]
        row_of_step = np.repeat(np.arange(sum(map(len, gaps))), np.concatenate(gaps))
        steps = np.concatenate([row * longest + np.arange(r.times[0], r.times[-1]) for row, r in enumerate(runs)])
        selection = scipy.sparse.csr_array(
            (np.ones(len(steps)), (row_of_step, steps)), (sum(map(len, gaps)), weights.shape[0])
        )
        between = selection @ weights
        updated = np.split(np.diff(between.indptr) > 0, np.cumsum([len(gap) for gap in gaps])[:-1])
        pairs = [(run, run.times[:-1][rows], run.times[1:][rows]) for run, rows in zip(runs, updated, strict=True)]
        times = np.concatenate([before for _, before, _ in pairs])
        return cls(between[np.flatnonzero(np.concatenate(updated))], times, pairs)

    def before(self, lag: int, span: slice) -> np.ndarray:
        """Return losses ``[rows, block]`` at ``lag`` − 1 steps before the earlier reading, from time 0 on."""
        parts = [run.losses[np.maximum(times + 1 - lag, 0), span] for run, times, _ in self.runs]
        return np.concatenate(parts).astype(np.float64)

    def after(self, span: slice) -> np.ndarray:
        return np.concatenate([run.losses[times, span] for run, _, times in self.runs]).astype(np.float64)

    def ones(self, span: slice) -> np.ndarray:
        return np.ones((len(self.times), self.after(span).shape[1]))

    def lazy(self, columns: Callable[[slice], np.ndarray]) -> Lazy:
        return Lazy((len(self.times), self.runs[0][0].losses.shape[1]), columns)


def check_every_step(runs: Runs, purpose: str) -> None:
    """Check that the losses of every run were recorded at every step.

    Raises:
        InvalidInput: a run was recorded with gaps.
    """
    if any((np.diff(run.times) > 1).any() for run in runs):
        raise InvalidInput(
            f"{purpose} learns from losses at every step, but these runs were recorded with gaps: "
            "record with every=1, or fit AdditiveSimulator(around=None)"
        )
