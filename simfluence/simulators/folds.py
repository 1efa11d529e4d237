"""Cross-validation over whole runs: each run is forecast by a simulator that was fitted on the runs of other folds."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import sklearn.base

from simfluence.errors import BeyondReferenceWarning, InvalidInput, RunawayWarning, UnseenWarning
from simfluence.runs import Runs
from simfluence.simulators.mean import mean_trajectory

__all__ = [
    "at_times",
    "check_held_out",
    "fold_of",
    "forecasts_by_others",
    "means_of_others",
    "quiet",
    "refitted_forecasts",
]


def fold_of(runs: Runs, folds: int, seed: int) -> np.ndarray:
    """Return the number of the fold in which each run is held out, ``[runs]``; copies of a run share one.

    The folds depend on the ids of the runs and the seed, not on their order. Fewer runs than folds make smaller folds.
    """
    ids = sorted(set(runs.ids))
    places = dict(zip(ids, np.random.default_rng(seed).permutation(len(ids)) % folds, strict=True))
    return np.array([places[run_id] for run_id in runs.ids])


def refitted_forecasts(simulator: Any, runs: Runs, folds: np.ndarray) -> np.ndarray:
    """Forecast each run by a clone of the simulator that was fitted on the runs of the other folds.

    Args:
        simulator: simulator with its parameters, which is not changed.
        runs: the runs.
        folds: number of each run's fold, ``[runs]``.

    Returns:
        Losses ``[runs, steps + 1, test]``; NaN after a run's end.

    Raises:
        InvalidInput: the simulator cannot be fitted on these runs, or a part of it, such as an attributor, was fitted
            on one that is held out.
    """
    forecasts = np.full((len(runs), max(run.steps for run in runs) + 1, runs.n_test), np.nan)
    for fold in np.unique(folds):
        rows = np.flatnonzero(folds == fold)
        losses = forecasts_by_others(simulator, runs.take(np.flatnonzero(folds != fold)), runs.take(rows))
        forecasts[rows, : losses.shape[1]] = losses
    return forecasts


def forecasts_by_others(simulator: Any, others: Runs, held: Runs) -> np.ndarray:
    """Forecast runs that are held out by a clone of the simulator that is fitted on others, without a warning.

    Raises:
        InvalidInput: see ``refitted_forecasts``.
    """
    with quiet():
        fitted = sklearn.base.clone(simulator).fit(others)
        check_held_out(fitted, held)
        losses: np.ndarray = fitted.simulate(held.curricula, held.initial_losses)
    return losses


def check_held_out(fitted: Any, held: Runs) -> None:
    """Check that no part of a fitted simulator was fitted on a run that is held out.

    Raises:
        InvalidInput: a part was.
    """
    if seen := [run.id for run in held if fitted.was_fitted_on(run)]:
        raise InvalidInput(
            f"run {seen[0]} is held out, but a part of {fitted.name!r} was fitted on it: fit that part on other runs"
        )


def means_of_others(runs: Runs, folds: np.ndarray) -> np.ndarray:
    """Return the mean trajectory of the runs of the other folds for each run, ``[runs, steps + 1, test]``."""
    means = np.empty((len(runs), max(run.steps for run in runs) + 1, runs.n_test))
    for fold in np.unique(folds):
        others = mean_trajectory(runs.take(np.flatnonzero(folds != fold)))
        means[folds == fold] = at_times(others, means.shape[1])
    return means


def at_times(values: np.ndarray, count: int) -> np.ndarray:
    """Return the values ``[times, …]`` at the first ``count`` times; the last one is held."""
    held: np.ndarray = values[np.minimum(np.arange(count), len(values) - 1)]
    return held


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings about what a part of the runs does not cover, and about candidates that run away."""
    with warnings.catch_warnings():
        for kind in (UnseenWarning, BeyondReferenceWarning, RunawayWarning, RuntimeWarning):
            warnings.simplefilter("ignore", kind)
        yield
