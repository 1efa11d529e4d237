"""How good is a forecast? Metrics as pure functions of simulated and true losses, and their table.

Losses are ``[runs, steps + 1, test]``. NaN in the true losses means not recorded, and does not count.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import sklearn.base
from jaxtyping import Float

from simfluence._html import card, picture
from simfluence._tables import as_html, readable
from simfluence._types import Losses
from simfluence.errors import BeyondReferenceWarning, InvalidInput, UnseenWarning, did_you_mean
from simfluence.runs import Runs
from simfluence.simulators import ConformalSimulator, Simulator
from simfluence.simulators.base import usable
from simfluence.simulators.baselines import MeanTrajectorySimulator

PerRun = Float[np.ndarray, " runs"]

#: Columns of ``evaluate`` in order: what can be asked for by ``metrics=``.
METRICS = ("mse", "final_spearman", "skill", "final_skill", "run_correlation")

#: The skill of a simulator that runs away or cannot be fitted, and the least that ``bounded_skill`` tells apart.
HOPELESS = -1e6

_COVERED = 0.9  # the confidence whose coverage ``evaluate`` reports
_BOOTSTRAP_ENTRIES = 2_000_000  # of resampled losses ranked at a time


class EvaluationTable(pd.DataFrame):
    """What ``evaluate`` returns: a DataFrame that notebooks show with the first of its metrics as bars.

    Its ``attrs`` say which task it is of, and how many runs the reference has. Whatever is made of it (a part, a
    rounded copy) is a plain DataFrame.
    """

    def plot_metric(self, metric: str = "skill", ax: Any = None, title: str = "") -> Any:
        """A bar per simulator: ``plots.evaluation``."""
        from simfluence import plots

        return plots.evaluation(self, ax, title, metric=metric)

    def _repr_html_(self) -> str:
        drawn = [name for name in ("skill", *METRICS) if name in self.columns][:1]
        facts = {"task": self.attrs.get("task") or "not known", "runs to fit on": self.attrs.get("fit", "not known")}
        bars = [picture(lambda ax: self.plot_metric(drawn[0], ax), 6.5, 1.4 + 0.3 * len(self))] if drawn else []
        return card("Evaluation on runs that were held out", facts, as_html(readable(self)), *bars)


def all_steps_mse(simulated: Losses, true: Losses) -> PerRun:
    """Per run, the mean of (simulated − true)² over steps 1…T and test examples."""
    return np.nanmean(_squares(simulated, true)[:, 1:], axis=(1, 2))


def final_spearman(simulated: Losses, true: Losses) -> PerRun:
    """Per run, over test examples, Spearman's ρ of simulated and true loss after the run's last step."""
    return _row_spearman(final(simulated, true), final(true, true))


def skill(simulated: Losses, true: Losses, mean: Losses) -> float:
    """1 − SSE(simulated)/SSE(mean trajectory), pooled over runs, steps 1…T and test examples."""
    return _skill(all_errors(simulated, true), all_errors(mean, true))


def final_skill(simulated: Losses, true: Losses, mean: Losses) -> float:
    """``skill`` of the losses after the last step alone."""
    return _skill(final_errors(simulated, true), final_errors(mean, true))


def run_correlation(simulated: Losses, true: Losses) -> float:
    """Per test example, Spearman's ρ over runs of simulated and true final loss; mean over test examples.

    A linear datamodeling score. Test examples whose forecast or truth is the same for all runs have none;
    NaN if that is all of them.
    """
    return _mean_or_nan(_row_spearman(final(simulated, true).T, final(true, true).T))


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
    draws = _resampled_correlations(predicted, actual, resamples)
    return _mean_or_nan(_row_spearman(predicted.T, actual.T)), *_interval(draws, confidence)


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


def evaluate(
    simulators: Mapping[str, Simulator],
    held: Runs,
    reference: Runs,
    *,
    metrics: Sequence[str] = METRICS,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> EvaluationTable:
    """Score fitted simulators on runs they have not seen: one row per simulator.

    Args:
        simulators: fitted, by the name of their row.
        held: the runs to be forecast, from their initial losses and curricula.
        reference: the fitting runs, whose mean trajectory has skill 0.
        metrics: some of ``METRICS``; each comes with its spread: ``_sd`` over runs (mse, final_spearman), or
            ``_low`` and ``_high``, the bootstrap interval over runs (skill, final_skill, run_correlation).
        bootstrap, confidence, seed: number of resamples, coverage and seed of those intervals.

    Returns:
        A table indexed by simulator, with the columns above, ``runs`` and ``test_examples``: how many went in.
        If a simulator gives intervals, ``coverage``: the share of final losses within its 90 % intervals.
        A metric that is not defined (run correlation of a constant forecast) is NaN.

    Raises:
        InvalidInput: an unknown metric, no run, or runs in both ``held`` and ``reference``.

    >>> rng = np.random.default_rng(0)
    >>> runs = Runs.from_arrays(rng.integers(3, size=(8, 5, 2)), rng.normal(size=(8, 6, 2)).cumsum(axis=1))
    >>> fit, held = runs.split(held_out=3)
    >>> mean = MeanTrajectorySimulator().fit(fit)
    >>> evaluate({"mean": mean}, held, reference=fit)[["skill", "final_skill", "runs"]].loc["mean"].tolist()
    [0.0, 0.0, 3.0]
    """
    for metric in metrics:
        if metric not in METRICS:
            raise InvalidInput(f"unknown metric {metric!r}, {did_you_mean(metric, METRICS)}")
    held, reference = _checked(simulators, held, reference, confidence)
    true = held.losses.astype(np.float64)
    mean = MeanTrajectorySimulator().fit(reference).simulate(held.curricula, held.initial_losses)
    resamples = np.random.default_rng(seed).integers(len(held), size=(bootstrap, len(held)))
    rows = {}
    for name, simulator in simulators.items():
        simulated = simulator.simulate(held.curricula, held.initial_losses)
        scores: dict[str, Any] = {}
        for metric in metrics:
            scores |= _scored(metric, simulated, true, mean, resamples, confidence)
        if isinstance(simulator, ConformalSimulator):
            scores["coverage"] = coverage(*simulator.interval(held.curricula, held.initial_losses, _COVERED), true)
        rows[name] = scores | {"runs": len(held), "test_examples": held.n_test}
    table = EvaluationTable(pd.DataFrame.from_dict(rows, orient="index").rename_axis("simulator"))
    table.attrs |= {"task": held.task_name, "fit": len(reference), "held": len(held)}
    return table


def skill_over_steps(
    simulators: Mapping[str, Simulator],
    held: Runs,
    reference: Runs,
    *,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Where along training is a forecast good? The skill at each step, pooled over runs and test examples.

    Args:
        simulators, held, reference, bootstrap, confidence, seed: as of ``evaluate``.

    Returns:
        A row per simulator and step that was read: simulator, step, skill and its bootstrap interval over runs,
        ``low`` and ``high``. Where the mean trajectory is exact there is no skill, and no row.

    Raises:
        InvalidInput: as ``evaluate``.

    >>> rng = np.random.default_rng(0)
    >>> runs = Runs.from_arrays(rng.integers(3, size=(8, 5, 2)), rng.normal(size=(8, 6, 2)).cumsum(axis=1))
    >>> table = skill_over_steps({"mean": MeanTrajectorySimulator().fit(runs[:4])}, runs[4:], runs[:4])
    >>> table[["step", "skill"]].to_numpy().tolist()
    [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0], [5.0, 0.0]]
    """
    held, reference = _checked(simulators, held, reference, confidence)
    true = held.losses.astype(np.float64)
    mean = MeanTrajectorySimulator().fit(reference).simulate(held.curricula, held.initial_losses)
    theirs = np.nansum(_squares(mean, true), axis=2)  # [runs, times]
    steps = 1 + np.flatnonzero(theirs[:, 1:].sum(axis=0) > 0)
    draws = np.random.default_rng(seed).multinomial(len(held), np.full(len(held), 1 / len(held)), size=bootstrap)
    tables = []
    for name, simulator in simulators.items():
        ours = np.nansum(_squares(simulator.simulate(held.curricula, held.initial_losses), true), axis=2)
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw may have no run that goes so far
            resampled = 1 - (draws @ ours[:, steps]) / (draws @ theirs[:, steps])
        low, high = np.array([_interval(column, confidence) for column in resampled.T]).reshape(-1, 2).T
        values = 1 - ours[:, steps].sum(axis=0) / theirs[:, steps].sum(axis=0)
        tables.append(pd.DataFrame({"simulator": name, "step": steps, "skill": values, "low": low, "high": high}))
    table = pd.concat(tables, ignore_index=True)
    table.attrs |= {"task": held.task_name, "fit": len(reference), "held": len(held)}
    return table


def _checked(simulators: Mapping[str, Simulator], held: Runs, reference: Runs, confidence: float) -> tuple[Runs, Runs]:
    """The runs that can be used.

    Raises:
        InvalidInput: no mapping of simulators, no run, runs in both parts, or a confidence out of range.
    """
    if not isinstance(simulators, Mapping) or not simulators:
        raise InvalidInput('simulators must be a mapping from row names to simulators, such as {"linear": linear}')
    if not 0 < confidence < 1:
        raise InvalidInput(f"confidence must be between 0 and 1, got {confidence}")
    held, reference = usable(held, "evaluate on"), usable(reference, "compare with")
    if shared := set(held.ids) & set(reference.ids):
        raise InvalidInput(f"{len(shared)} runs are both held out and in the reference: split(…) gives disjoint parts")
    return held, reference


def _scored(
    metric: str, simulated: Losses, true: Losses, mean: Losses, resamples: np.ndarray, confidence: float
) -> dict[str, float]:
    """One metric and its spread, as columns."""
    if metric in ("mse", "final_spearman"):
        per_run = all_steps_mse(simulated, true) if metric == "mse" else final_spearman(simulated, true)
        return {metric: _mean_or_nan(per_run), f"{metric}_sd": _sd_or_nan(per_run)}
    if metric == "run_correlation":
        value = run_correlation(simulated, true)
        draws = _resampled_correlations(final(simulated, true), final(true, true), resamples)
    else:
        errors = all_errors if metric == "skill" else final_errors
        ours, theirs = errors(simulated, true), errors(mean, true)
        value = _skill(ours, theirs)
        draws = 1 - ours[resamples].sum(1) / theirs[resamples].sum(1)
    low, high = _interval(draws, confidence)
    return {metric: value, f"{metric}_low": low, f"{metric}_high": high}


def all_errors(simulated: Losses, true: Losses) -> PerRun:
    """Per run, the sum of (simulated − true)² over steps 1…T and test examples."""
    return np.nansum(_squares(simulated, true)[:, 1:], axis=(1, 2))


def final_errors(simulated: Losses, true: Losses) -> PerRun:
    """Per run, the sum of (simulated − true)² over test examples after the last step."""
    return np.sum((final(simulated, true) - final(true, true)) ** 2, axis=1)


def fitted_errors(simulator: Simulator, part: Runs, held: Runs) -> Float[np.ndarray, "2 runs"]:
    """Per held-out run, ``all_errors`` and ``final_errors`` of the simulator fitted on ``part``.

    A rollout that runs away has infinite errors. It is silent: candidates may overflow, and small sets of runs miss
    examples.

    Args:
        simulator: with its parameters; it is not changed.
        part: runs to fit on.
        held: runs to forecast.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", UnseenWarning)
        warnings.simplefilter("ignore", BeyondReferenceWarning)
        simulated = sklearn.base.clone(simulator).fit(part).simulate(held.curricula, held.initial_losses)
        true = held.losses.astype(np.float64)
        errors = np.stack([all_errors(simulated, true), final_errors(simulated, true)])
    errors[:, (~np.isfinite(simulated) & np.isfinite(true)).any(axis=(1, 2))] = np.inf
    return errors


def bounded_skill(ours: Any, theirs: Any) -> Any:
    """``skill`` from sums of errors, or arrays of them; never below ``HOPELESS``."""
    with np.errstate(all="ignore"):
        return np.maximum(np.nan_to_num(1 - np.divide(ours, theirs), nan=HOPELESS, neginf=HOPELESS), HOPELESS)


def final(losses: Losses, true: Losses) -> Float[np.ndarray, "runs test"]:
    """The losses at the last time that ``true`` has of each run."""
    recorded = ~np.isnan(true).any(axis=2)  # [runs, times]
    last = recorded.shape[1] - 1 - np.argmax(recorded[:, ::-1], axis=1)
    return losses[np.arange(len(losses)), last]


def _squares(simulated: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(simulated − true)², NaN only where the truth is not recorded."""
    if simulated.shape != true.shape:
        raise InvalidInput(f"simulated losses {simulated.shape} and true losses {true.shape} differ in shape")
    return (simulated - true) ** 2


def _skill(ours: PerRun, theirs: PerRun) -> float:
    return float(1 - ours.sum() / theirs.sum()) if theirs.sum() > 0 else float("nan")


def _row_spearman(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Spearman's ρ along the last axis; NaN where a side is constant."""
    ranks = [scipy.stats.rankdata(side, axis=-1) for side in (left, right)]
    centred = [rank - rank.mean(-1, keepdims=True) for rank in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(-1) * (centred[1] ** 2).sum(-1))
    covariance = (centred[0] * centred[1]).sum(-1)
    return np.divide(covariance, scale, out=np.full_like(scale, np.nan), where=scale > 0)


def _resampled_correlations(simulated: np.ndarray, true: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """``run_correlation`` of every resample of the runs; inputs are final losses ``[runs, test]``."""
    chunks = np.array_split(resamples, max(1, resamples.size * simulated.shape[1] // _BOOTSTRAP_ENTRIES))
    pairs = ((simulated[chunk].swapaxes(1, 2), true[chunk].swapaxes(1, 2)) for chunk in chunks)
    return np.array([_mean_or_nan(row) for left, right in pairs for row in _row_spearman(left, right)])


def _interval(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    known = draws[np.isfinite(draws)]
    if len(known) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _mean_or_nan(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _sd_or_nan(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else float("nan")
