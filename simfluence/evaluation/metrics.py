"""Metrics of forecasts, as pure functions of simulated and true losses.

Losses are ``[runs, steps + 1, test]``. NaN in the true losses means not recorded and is left out.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import scipy.stats
from annotated_types import Interval
from jaxtyping import Float

from simfluence._internal.checked import checked
from simfluence._internal.types import Count, Losses, Seed, Share
from simfluence.errors import InvalidInput

__all__ = [
    "MIN_SKILL",
    "Resamples",
    "all_errors",
    "all_steps_mse",
    "bootstrap_interval",
    "bounded_skill",
    "correlation_over_runs",
    "coverage",
    "delta_correlation",
    "final",
    "final_errors",
    "final_skill",
    "final_spearman",
    "hit_rate",
    "mean_or_nan",
    "pooled_skill",
    "relative_error",
    "resampled_correlations",
    "row_spearman",
    "run_correlation",
    "sd_or_nan",
    "seed_share",
    "skill",
    "squared_errors",
]

PerRun = Float[np.ndarray, " runs"]

#: A number of bootstrap resamples, bounded because each is held in memory.
Resamples = Annotated[int, Interval(ge=1, le=100_000)]

#: Smallest value of ``bounded_skill``; the skill of a simulator that diverges or cannot be fitted.
MIN_SKILL = -1e6

_BOOTSTRAP_ENTRIES = 2_000_000  # number of resampled losses to rank at a time


@checked
def all_steps_mse(simulated: Losses, true: Losses) -> PerRun:
    """Compute the mean of (simulated − true)² over steps 1…T and test examples, per run."""
    values: np.ndarray = np.nanmean(squared_errors(simulated, true)[:, 1:], axis=(1, 2))
    return values


@checked
def final_spearman(simulated: Losses, true: Losses) -> PerRun:
    """Compute Spearman's ρ of simulated and true final loss over test examples, per run."""
    return row_spearman(final(simulated, true), final(true, true))


@checked
def skill(simulated: Losses, true: Losses, mean: Losses) -> float:
    """Compute 1 − SSE(simulated)/SSE(mean trajectory), pooled over runs, steps 1…T and test examples."""
    return pooled_skill(all_errors(simulated, true), all_errors(mean, true))


@checked
def final_skill(simulated: Losses, true: Losses, mean: Losses) -> float:
    """Compute the ``skill`` of the final losses only."""
    return pooled_skill(final_errors(simulated, true), final_errors(mean, true))


@checked
def run_correlation(simulated: Losses, true: Losses) -> float:
    """Compute Spearman's ρ of simulated and true final loss over runs, averaged over test examples.

    This is a linear datamodeling score. Test examples whose forecast or true loss is the same in all runs are left
    out; NaN if none remains.
    """
    return mean_or_nan(row_spearman(final(simulated, true).T, final(true, true).T))


@checked
def correlation_over_runs(
    predicted: Float[np.ndarray, "runs test"],
    actual: Float[np.ndarray, "runs test"],
    *,
    bootstrap: Resamples = 1000,
    confidence: Share = 0.95,
    seed: Seed = 0,
) -> tuple[float, float, float]:
    """Compute the ``run_correlation`` of predicted and actual final losses, with a bootstrap interval over runs."""
    _check_same(predicted, actual)
    resamples = np.random.default_rng(seed).integers(len(actual), size=(bootstrap, len(actual)))
    draws = resampled_correlations(predicted, actual, resamples)
    return mean_or_nan(row_spearman(predicted.T, actual.T)), *bootstrap_interval(draws, confidence)


@checked
def coverage(low: Losses, high: Losses, true: Losses) -> float:
    """Compute the share of final losses that lie within their intervals."""
    for bound in (low, high):
        _check_same(bound, true)
    last = final(true, true)
    return float(((final(low, true) <= last) & (last <= final(high, true))).mean())


@checked
def delta_correlation(predicted: Float[np.ndarray, " test"], actual: Float[np.ndarray, " test"]) -> float:
    """Compute Pearson's r of predicted and retrained change over test examples; NaN if a change is constant."""
    _check_same(predicted, actual)
    if np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return float("nan")
    return float(np.corrcoef(predicted, actual)[0, 1])


@checked
def relative_error(predicted: Float[np.ndarray, "*changes"], actual: Float[np.ndarray, "*changes"]) -> float:
    """Compute the squared error of predicted changes relative to predicting no change; NaN if nothing changes.

    >>> relative_error(np.array([1.0, 0.0]), np.array([2.0, 0.0]))
    0.25
    """
    _check_same(predicted, actual)
    size = float(np.mean(actual**2))
    return float(np.mean((predicted - actual) ** 2)) / size if size > 0 else float("nan")


@checked
def hit_rate(predicted: Float[np.ndarray, " test"], actual: Float[np.ndarray, " test"], k: Count = 10) -> float:
    """Compute the share of the ``k`` most changed test examples that are among the ``k`` predicted to change most.

    NaN if nothing changes or no change was predicted.
    """
    _check_same(predicted, actual)
    k = min(k, len(actual))
    if not (actual.any() and predicted.any()):
        return float("nan")
    named, largest = (set(np.argsort(-np.abs(changes), kind="stable")[:k]) for changes in (predicted, actual))
    return len(named & largest) / k


@checked
def seed_share(changes: Float[np.ndarray, "*queries seeds test"]) -> float:
    """Compute the variance of retrained changes over seeds, as a share of their mean square; NaN if nothing changes."""
    if changes.ndim < 2 or changes.shape[-2] < 2:
        raise InvalidInput(f"changes must be of two seeds or more, [queries, seeds, test], got {list(changes.shape)}")
    size = float(np.mean(changes**2))
    return float(np.var(changes, axis=-2, ddof=1).mean()) / size if size > 0 else float("nan")


def all_errors(simulated: Losses, true: Losses) -> PerRun:
    """Compute the sum of (simulated − true)² over steps 1…T and test examples, per run."""
    values: np.ndarray = np.nansum(squared_errors(simulated, true)[:, 1:], axis=(1, 2))
    return values


def final_errors(simulated: Losses, true: Losses) -> PerRun:
    """Compute the sum of (simulated − true)² of the final losses over test examples, per run."""
    values: np.ndarray = np.sum((final(simulated, true) - final(true, true)) ** 2, axis=1)
    return values


def bounded_skill(sse: Any, baseline_sse: Any) -> Any:
    """Compute ``skill`` from sums of squared errors, or arrays of them; never below ``MIN_SKILL``."""
    with np.errstate(all="ignore"):
        return np.maximum(np.nan_to_num(1 - np.divide(sse, baseline_sse), nan=MIN_SKILL, neginf=MIN_SKILL), MIN_SKILL)


def final(losses: Losses, true: Losses) -> Float[np.ndarray, "runs test"]:
    """Return each run's losses at the last time that is recorded in ``true``."""
    _check_same(losses, true)
    recorded = ~np.isnan(true).any(axis=2)  # [runs, times]
    last = recorded.shape[1] - 1 - np.argmax(recorded[:, ::-1], axis=1)
    values: np.ndarray = losses[np.arange(len(losses)), last]
    return values


def squared_errors(simulated: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Compute (simulated − true)², NaN where the true loss is not recorded."""
    _check_same(simulated, true)
    values: np.ndarray = (simulated - true) ** 2
    return values


def pooled_skill(sse: PerRun, baseline_sse: PerRun) -> float:
    """Compute ``skill`` from each run's sum of squared errors and that of the mean trajectory."""
    return float(1 - sse.sum() / baseline_sse.sum()) if baseline_sse.sum() > 0 else float("nan")


def row_spearman(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Compute Spearman's ρ along the last axis; NaN where an input is constant."""
    ranks = [scipy.stats.rankdata(values, axis=-1) for values in (left, right)]
    centred = [rank - rank.mean(-1, keepdims=True) for rank in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(-1) * (centred[1] ** 2).sum(-1))
    covariance = (centred[0] * centred[1]).sum(-1)
    values: np.ndarray = np.divide(covariance, scale, out=np.full_like(scale, np.nan), where=scale > 0)
    return values


def resampled_correlations(simulated: np.ndarray, true: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """Compute the ``run_correlation`` of every resample of the runs; inputs are final losses ``[runs, test]``."""
    chunks = np.array_split(resamples, max(1, resamples.size * simulated.shape[1] // _BOOTSTRAP_ENTRIES))
    pairs = ((simulated[chunk].swapaxes(1, 2), true[chunk].swapaxes(1, 2)) for chunk in chunks)
    return np.array([mean_or_nan(row) for left, right in pairs for row in row_spearman(left, right)])


def bootstrap_interval(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the central interval with the share ``confidence`` of the finite draws; NaN without finite draws."""
    finite = draws[np.isfinite(draws)]
    if len(finite) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean_or_nan(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN; NaN without such values."""
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def sd_or_nan(values: np.ndarray) -> float:
    """Return the standard deviation of the values that are not NaN; NaN for fewer than two."""
    finite = values[~np.isnan(values)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else float("nan")


def _check_same(predicted: np.ndarray, actual: np.ndarray) -> None:
    """Check that two arrays have the same shape, and any content."""
    if predicted.shape != actual.shape:
        raise InvalidInput(
            f"predicted and actual values differ in shape: {list(predicted.shape)} and {list(actual.shape)}; give both "
            "for the same runs, times and test examples"
        )
    if predicted.size == 0:
        raise InvalidInput(f"there is nothing to compare: the values are empty, of shape {list(predicted.shape)}")
