"""Recorded runs as rows of a regression: what was in a batch, and the losses before and after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from simfluence.errors import InvalidInput
from simfluence.runs import Run, Runs
from simfluence.simulators.batches import batch_weights
from simfluence.simulators.markov.least_squares import Lazy


@dataclass(frozen=True)
class Transitions:
    """What happened between two readings with an update, a row each; losses are taken from the runs when asked for.

    Args:
        weights: between the readings ``[rows, train]``: of a step, or summed over several.
        times: of the reading before, ``[rows]``.
        runs: with, for each, its readings before and after, each ``[rows of the run]``.
    """

    weights: scipy.sparse.csr_array
    times: np.ndarray
    runs: Sequence[tuple[Run, np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, runs: Runs, batch_size: int) -> Transitions:
        """Additive effects of several steps add up; where every step was read a row is a step."""
        longest = max(run.steps for run in runs)
        weights, _ = batch_weights(runs.curricula, longest, batch_size)
        weights.sum_duplicates()
        gaps = [np.diff(run.times) for run in runs]
        row_of_step = np.repeat(np.arange(sum(map(len, gaps))), np.concatenate(gaps))
        steps = np.concatenate([row * longest + np.arange(r.times[0], r.times[-1]) for row, r in enumerate(runs)])
        which = scipy.sparse.csr_array(
            (np.ones(len(steps)), (row_of_step, steps)), (sum(map(len, gaps)), weights.shape[0])
        )
        between = which @ weights
        updated = np.split(np.diff(between.indptr) > 0, np.cumsum([len(gap) for gap in gaps])[:-1])
        pairs = [(run, run.times[:-1][some], run.times[1:][some]) for run, some in zip(runs, updated, strict=True)]
        times = np.concatenate([before for _, before, _ in pairs])
        return cls(between[np.flatnonzero(np.concatenate(updated))], times, pairs)

    def before(self, lag: int, some: slice) -> np.ndarray:
        """Losses ``[rows, block]`` of the reading before, or ``lag`` − 1 steps further back; held before training."""
        parts = [run.losses[np.maximum(times + 1 - lag, 0), some] for run, times, _ in self.runs]
        return np.concatenate(parts).astype(np.float64)

    def after(self, some: slice) -> np.ndarray:
        return np.concatenate([run.losses[times, some] for run, _, times in self.runs]).astype(np.float64)

    def ones(self, some: slice) -> np.ndarray:
        return np.ones((len(self.times), self.after(some).shape[1]))

    def lazy(self, columns: Callable[[slice], np.ndarray]) -> Lazy:
        return Lazy((len(self.times), self.runs[0][0].losses.shape[1]), columns)


def check_every_step(runs: Runs, purpose: str) -> None:
    """Raise ``InvalidInput`` if a run has times at which its losses were not read."""
    if any((np.diff(run.times) > 1).any() for run in runs):
        raise InvalidInput(
            f"{purpose} learns from losses at every step, and these runs were recorded with gaps: "
            "record with every=1, or fit AdditiveSimulator(around=None)"
        )
