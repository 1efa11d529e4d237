"""How good is a forecast? Metrics as pure functions of simulated and true losses.

Losses are ``[runs, steps + 1, test]``. NaN in the true losses means not recorded, and does not count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float

from simfluence._internal.types import Losses
from simfluence.errors import InvalidInput

PerRun = Float[np.ndarray, " runs"]

#: The skill of a simulator that runs away or cannot be fitted, and the least that ``bounded_skill`` tells apart.
MIN_SKILL = -1e6

_BOOTSTRAP_ENTRIES = 2_000_000  # of resampled losses ranked at a time


def all_steps_mse(simulated: Losses, true: Losses) -> PerRun:
    """Per run, the mean of (simulated − true)² over steps 1…T and test examples."""
    return np.nanmean(squared_errors(simulated, true)[:, 1:], axis=(1, 2))


def final_spearman(simulated: Losses, true: Losses) -> PerRun:
    """Per run, over test examples, Spearman's ρ of simulated and true loss after the run's last step."""
    return row_spearman(final(simulated, true), final(true, true))


def skill(simulated: Losses, true: Losses, mean: Losses) -> float:
    """1 − SSE(simulated)/SSE(mean trajectory), pooled over runs, steps 1…T and test examples."""
    return pooled_skill(all_errors(simulated, true), all_errors(mean, true))


def final_skill(simulated: Losses, true: Losses, mean: Losses) -> float:
    """``skill`` of the losses after the last step alone."""
    return pooled_skill(final_errors(simulated, true), final_errors(mean, true))


def run_correlation(simulated: Losses, true: Losses) -> float:
    """Per test example, Spearman's ρ over runs of simulated and true final loss; mean over test examples.

    A linear datamodeling score. Test examples whose forecast or truth is the same for all runs have none;
    NaN if that is all of them.
    """
    return mean_or_nan(row_spearman(final(simulated, true).T, final(true, true).T))


def correlation_over_runs(
    predicted: Float[np.ndarray, "runs test"],
    actual: Float[np.ndarray, "runs test"],
    *,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """``run_correlation`` of predicted and actual final losses, with its bootstrap interval over runs."""
    resamples = np.random.default_rng(seed).integers(len(actual), size=(bootstrap, len(actual)))
    draws = resampled_correlations(predicted, actual, resamples)
    return mean_or_nan(row_spearman(predicted.T, actual.T)), *bootstrap_interval(draws, confidence)


def coverage(low: Losses, high: Losses, true: Losses) -> float:
    """The share of final losses that lie within their intervals."""
    last = final(true, true)
    return float(((final(low, true) <= last) & (last <= final(high, true))).mean())


def delta_correlation(predicted: Float[np.ndarray, " test"], actual: Float[np.ndarray, " test"]) -> float:
    """Pearson's r over test examples of predicted and retrained change of the final loss; NaN for a constant."""
    if np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return float("nan")
    return float(np.corrcoef(predicted, actual)[0, 1])


def relative_error(predicted: Float[np.ndarray, "*changes"], actual: Float[np.ndarray, "*changes"]) -> float:
    """Mean squared error of predicted changes, as a share of that of "nothing changes"; NaN where nothing does.

    >>> relative_error(np.array([1.0, 0.0]), np.array([2.0, 0.0]))
    0.25
    """
    size = float(np.mean(actual**2))
    return float(np.mean((predicted - actual) ** 2)) / size if size > 0 else float("nan")


def hit_rate(predicted: Float[np.ndarray, " test"], actual: Float[np.ndarray, " test"], k: int = 10) -> float:
    """Of the ``k`` test examples that change most, the share among the ``k`` that were predicted to; NaN where nothing
    changes, or nothing was predicted to."""
    k = min(k, len(actual))
    if not (actual.any() and predicted.any()):
        return float("nan")
    named, found = (set(np.argsort(-np.abs(changes), kind="stable")[:k]) for changes in (predicted, actual))
    return len(named & found) / k


def seed_share(changes: Float[np.ndarray, "*queries seeds test"]) -> float:
    """Variance of retrained changes over seeds as a share of their mean square; NaN where nothing changes."""
    size = float(np.mean(changes**2))
    return float(np.var(changes, axis=-2, ddof=1).mean()) / size if size > 0 else float("nan")


def all_errors(simulated: Losses, true: Losses) -> PerRun:
    """Per run, the sum of (simulated − true)² over steps 1…T and test examples."""
    return np.nansum(squared_errors(simulated, true)[:, 1:], axis=(1, 2))


def final_errors(simulated: Losses, true: Losses) -> PerRun:
    """Per run, the sum of (simulated − true)² over test examples after the last step."""
    return np.sum((final(simulated, true) - final(true, true)) ** 2, axis=1)


def bounded_skill(sse: Any, baseline_sse: Any) -> Any:
    """``skill`` from sums of errors, or arrays of them; never below ``MIN_SKILL``."""
    with np.errstate(all="ignore"):
        return np.maximum(np.nan_to_num(1 - np.divide(sse, baseline_sse), nan=MIN_SKILL, neginf=MIN_SKILL), MIN_SKILL)


def final(losses: Losses, true: Losses) -> Float[np.ndarray, "runs test"]:
    """The losses at the last time that ``true`` has of each run."""
    recorded = ~np.isnan(true).any(axis=2)  # [runs, times]
    last = recorded.shape[1] - 1 - np.argmax(recorded[:, ::-1], axis=1)
    return losses[np.arange(len(losses)), last]


def squared_errors(simulated: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(simulated − true)², NaN only where the truth is not recorded."""
    if simulated.shape != true.shape:
        raise InvalidInput(f"simulated losses {simulated.shape} and true losses {true.shape} differ in shape")
    return (simulated - true) ** 2


def pooled_skill(sse: PerRun, baseline_sse: PerRun) -> float:
    """Skill from sums of squared errors of each run: sse, and those of the mean trajectory."""
    return float(1 - sse.sum() / baseline_sse.sum()) if baseline_sse.sum() > 0 else float("nan")


def row_spearman(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Spearman's ρ along the last axis; NaN where a side is constant."""
    ranks = [scipy.stats.rankdata(side, axis=-1) for side in (left, right)]
    centred = [rank - rank.mean(-1, keepdims=True) for rank in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(-1) * (centred[1] ** 2).sum(-1))
    covariance = (centred[0] * centred[1]).sum(-1)
    return np.divide(covariance, scale, out=np.full_like(scale, np.nan), where=scale > 0)


def resampled_correlations(simulated: np.ndarray, true: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """``run_correlation`` of every resample of the runs; inputs are final losses ``[runs, test]``."""
    chunks = np.array_split(resamples, max(1, resamples.size * simulated.shape[1] // _BOOTSTRAP_ENTRIES))
    pairs = ((simulated[chunk].swapaxes(1, 2), true[chunk].swapaxes(1, 2)) for chunk in chunks)
    return np.array([mean_or_nan(row) for left, right in pairs for row in row_spearman(left, right)])


def bootstrap_interval(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    """The interval that holds the share ``confidence`` of the finite draws; NaN where there are none."""
    known = draws[np.isfinite(draws)]
    if len(known) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean_or_nan(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN where there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def sd_or_nan(values: np.ndarray) -> float:
    """The standard deviation of the values that are not NaN; NaN where there are fewer than two."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else float("nan")
