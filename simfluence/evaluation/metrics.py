"""Metrics of forecasts, as pure functions of simulated and true losses.

Losses are ``[runs, steps + 1, test]``. NaN in the true losses means not recorded and is left out; NaN in the mean
trajectory means that it does not go that far, and skill says nothing of such times.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from annotated_types import Interval
from jaxtyping import Float, Int

from simfluence._internal.checked import checked
from simfluence._internal.ranks import row_spearman
from simfluence._internal.types import Count, Losses, Seed, Share
from simfluence.errors import InvalidInput

__all__ = [
    "MIN_SKILL",
    "Resamples",
    "all_errors",
    "all_steps_mse",
    "baseline_losses",
    "bootstrap_interval",
    "bounded_skill",
    "correlation_over_runs",
    "coverage",
    "delta_correlation",
    "final",
    "final_errors",
    "final_skill",
    "final_skill_errors",
    "final_spearman",
    "group_correlation",
    "harmful_hit_rate",
    "hit_rate",
    "mean_or_nan",
    "pooled_skill",
    "relative_error",
    "resampled_correlations",
    "run_correlation",
    "sd_or_nan",
    "seed_share",
    "skill",
    "skill_errors",
    "squared_errors",
    "within_correlation",
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
    """Compute 1 − SSE(simulated)/SSE(mean trajectory), pooled over runs, steps 1…T and test examples.

    A mean trajectory that is held at its end is easily beaten beyond it, so times at which it is NaN are left out.

    >>> true, simulated = np.array([[[0.0], [2.0], [9.0]]]), np.array([[[0.0], [1.0], [0.0]]])
    >>> skill(simulated, true, np.array([[[0.0], [0.0], [np.nan]]]))
    0.75
    """
    return pooled_skill(*skill_errors(simulated, true, mean))


@checked
def final_skill(simulated: Losses, true: Losses, mean: Losses) -> float:
    """Compute the ``skill`` of the final losses only.

    Runs that end where the mean trajectory is NaN are left out; NaN if none remains.
    """
    return pooled_skill(*final_skill_errors(simulated, true, mean))


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
def group_correlation(
    taken: Float[np.ndarray, " train"],
    train_groups: Int[np.ndarray, " train"],
    test_groups: Int[np.ndarray, " test"],
    actual: Float[np.ndarray, " test"],
) -> float:
    """Compute how far a retrained change is explained by whose group was edited: a baseline of ``delta_correlation``.

    The only predictor of a test example's change is how much the edit takes from its group. Fitted to the retrained
    change by least squares, it correlates with it at |Pearson's r|, which is returned. For the removal of a class it is
    the indicator of that class.

    Args:
        taken: how many showings of each training example the edit takes away; negative where it adds some.
        train_groups, test_groups: number of each example's group.
        actual: retrained changes.

    Returns:
        From 0 to 1; NaN if nothing changes, or the edit takes equally much from the group of every test example.

    >>> labels, taken = np.array([0, 1, 2]), np.array([0.0, 5.0, 0.0])  # the examples of label 1 are removed
    >>> round(group_correlation(taken, labels, np.array([0, 1, 1, 2]), np.array([0.0, 2.0, 1.0, 0.0])), 3)
    0.905
    """
    _check_same(taken, train_groups)
    _check_same(test_groups, actual)
    membership = np.zeros(len(test_groups))
    for group in np.unique(test_groups):
        membership[test_groups == group] = taken[train_groups == group].sum()
    return abs(delta_correlation(membership, actual))


@checked
def within_correlation(
    predicted: Float[np.ndarray, " examples"],
    actual: Float[np.ndarray, " examples"],
    groups: Int[np.ndarray, " examples"],
) -> float:
    """Compute Pearson's r of predicted and retrained change after taking each group's mean out of both.

    So knowing the groups alone is worth nothing, however high its ``delta_correlation``.

    Args:
        predicted, actual: changes.
        groups: number of each example's group.

    Returns:
        From −1 to 1; NaN if a change is constant within every group, as it is where each group has one example.

    >>> groups = np.array([0, 0, 1, 1])
    >>> round(within_correlation(np.array([5.0, 6.0, 0.0, 1.0]), np.array([5.0, 4.0, 0.0, 3.0]), groups), 3)
    0.447
    """
    _check_same(predicted, actual)
    _check_same(groups, actual)
    return delta_correlation(*(_without_means(changes, groups) for changes in (predicted, actual)))


def _without_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Subtract the mean of each group; what rounding leaves of equal values is 0."""
    _, rows, counts = np.unique(groups, return_inverse=True, return_counts=True)
    rest: np.ndarray = values - (np.bincount(rows, values) / counts)[rows]
    rest[np.abs(rest) <= 1e-12 * np.abs(values).max()] = 0
    return rest


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
def harmful_hit_rate(
    predicted: Float[np.ndarray, "test train"], actual: Float[np.ndarray, "test train"], k: Count = 10
) -> float:
    """Compute the share of the ``k`` most harmful training examples that are among the ``k`` said to be.

    Harmful are examples whose removal lowers the mean loss over test examples most.

    Args:
        predicted, actual: changes of each test loss by the removal of each training example, positive where the loss
            rises.
        k: number of examples; at most a tenth of the training examples, but at least 1.

    Returns:
        From 0 to 1, by chance k / train; NaN if nothing changes or no change was predicted.

    >>> harmful_hit_rate(np.array([[0.1, -0.2, 0.0]]), np.array([[0.3, -0.1, 0.2]]))
    1.0
    """
    _check_same(predicted, actual)
    if not (actual.any() and predicted.any()):
        return float("nan")
    k = min(k, max(1, actual.shape[1] // 10))
    named, worst = (set(np.argsort(each.mean(axis=0), kind="stable")[:k]) for each in (predicted, actual))
    return len(named & worst) / k


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


def baseline_losses(trajectory: Float[np.ndarray, "baseline_times test"], true: Losses) -> Losses:
    """Return the mean trajectory ``[times, test]`` beside each run; NaN where the runs go on beyond its end."""
    mean = np.full(true.shape, np.nan)
    mean[:, : len(trajectory)] = trajectory[: true.shape[1]]
    return mean


def skill_errors(simulated: Losses, true: Losses, mean: Losses) -> tuple[PerRun, PerRun]:
    """Compute ``all_errors`` of the simulation and of the mean trajectory, over the times where there is one."""
    _check_same(mean, true)
    known = np.where(np.isnan(mean), np.nan, true)
    return all_errors(simulated, known), all_errors(mean, known)


def final_skill_errors(simulated: Losses, true: Losses, mean: Losses) -> tuple[PerRun, PerRun]:
    """Compute ``final_errors`` of the simulation and of the mean trajectory; 0 for runs that end beyond it."""
    sse, baseline_sse = final_errors(simulated, true), final_errors(mean, true)
    known = ~np.isnan(baseline_sse)
    return np.where(known, sse, 0.0), np.where(known, baseline_sse, 0.0)


def squared_errors(simulated: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Compute (simulated − true)², NaN where the true loss is not recorded."""
    _check_same(simulated, true)
    values: np.ndarray = (simulated - true) ** 2
    return values


def pooled_skill(sse: PerRun, baseline_sse: PerRun) -> float:
    """Compute ``skill`` from each run's sum of squared errors and that of the mean trajectory."""
    return float(1 - sse.sum() / baseline_sse.sum()) if baseline_sse.sum() > 0 else float("nan")


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
