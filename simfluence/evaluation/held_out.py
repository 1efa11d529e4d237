"""Evaluation of simulators on held-out runs against the mean trajectory: a table, and skill along training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from simfluence._internal.checked import checked
from simfluence._internal.deprecation import renamed_arguments
from simfluence._internal.html import as_html, card, picture, readable
from simfluence._internal.types import Losses, Seed, Share
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.evaluation.metrics import (
    Resamples,
    all_steps_mse,
    baseline_losses,
    bootstrap_interval,
    coverage,
    final,
    final_skill_errors,
    final_spearman,
    mean_or_nan,
    pooled_skill,
    resampled_correlations,
    run_correlation,
    sd_or_nan,
    skill_errors,
    squared_errors,
)
from simfluence.runs import Runs
from simfluence.simulators import Simulator
from simfluence.simulators.base import not_fitted_on
from simfluence.simulators.mean import mean_trajectory

__all__ = ["METRICS", "EvaluationTable", "evaluate", "skill_over_steps"]

#: Metrics that ``evaluate`` can compute, in the order of its columns.
METRICS = ("mse", "final_spearman", "skill", "final_skill", "run_correlation")

_COVERED = 0.9  # the confidence whose coverage ``evaluate`` reports


class EvaluationTable(pd.DataFrame):
    """The result of ``evaluate``: a DataFrame that notebooks show with a bar chart of its first metric.

    Its ``attrs`` have the task, the number of baseline runs and the number of held-out runs. Selections and copies of
    it are plain DataFrames.
    """

    def plot_metric(self, metric: str = "skill", ax: Any = None, title: str = "") -> Any:
        """Plot a bar per simulator; see ``plots.evaluation``."""
        from simfluence import plots

        return plots.evaluation(self, ax, title, metric=metric)

    def _repr_html_(self) -> str:
        drawn = [name for name in ("skill", *METRICS) if name in self.columns][:1]
        facts = {"task": self.attrs.get("task") or "not known", "runs to fit on": self.attrs.get("fit", "not known")}
        if longer := self.attrs.get("longer"):
            facts["longer than these"] = f"{longer} held-out runs; skill goes no further than the runs to fit on"
        bars = [picture(lambda ax: self.plot_metric(drawn[0], ax), 6.5, 1.4 + 0.3 * len(self))] if drawn else []
        return card("Evaluation on runs that were held out", facts, as_html(readable(self)), *bars)


@renamed_arguments(reference="baseline_runs")
@checked
def evaluate(
    simulators: Mapping[str, Simulator],
    held: Runs,
    baseline_runs: Runs,
    *,
    metrics: Sequence[str] = METRICS,
    bootstrap: Resamples = 1000,
    confidence: Share = 0.95,
    seed: Seed = 0,
) -> EvaluationTable:
    """Score fitted simulators on held-out runs, one row per simulator.

    Args:
        simulators: fitted simulators by name.
        held: runs to forecast from their initial losses and curricula. Those that a simulator was fitted on are left
            out for all of them, with a warning.
        baseline_runs: the fitting runs, whose mean trajectory has skill 0.
        metrics: some of ``METRICS``; each comes with its spread: ``_sd`` over runs (mse, final_spearman), or
            ``_low`` and ``_high``, the bootstrap interval over runs (skill, final_skill, run_correlation).
        bootstrap, confidence, seed: number of resamples, coverage and seed of those intervals.

    Returns:
        A table indexed by simulator, with the columns above and the numbers of ``runs`` and ``test_examples``.
        Skill goes as far as the baseline runs do: their mean trajectory, held at its end, would be beaten too easily.
        Later steps do not count, and held-out runs that are longer have no final skill; ``attrs["longer"]`` tells how
        many they are.
        If a simulator gives intervals, ``coverage``: the share of final losses within its 90 % intervals.
        An undefined metric (such as the run correlation of a constant forecast) is NaN.

    Raises:
        InvalidInput: a metric is unknown, there is no run, a run is in both ``held`` and ``baseline_runs``, or the
            simulators were fitted on all runs of ``held``.

    >>> import simfluence as sf
    >>> rng = np.random.default_rng(0)
    >>> runs = Runs.from_arrays(rng.integers(3, size=(8, 5, 2)), rng.normal(size=(8, 6, 2)).cumsum(axis=1))
    >>> fit, held = runs.split(held_out=3)
    >>> mean = sf.MeanTrajectorySimulator().fit(fit)
    >>> evaluate({"mean": mean}, held, baseline_runs=fit)[["skill", "final_skill", "runs"]].loc["mean"].tolist()
    [0.0, 0.0, 3.0]
    """
    for metric in metrics:
        if metric not in METRICS:
            raise InvalidInput(f"unknown metric {metric!r}, {did_you_mean(metric, METRICS)}")
    held, baseline_runs = _usable(simulators, held, baseline_runs)
    true = held.losses.astype(np.float64)
    mean = baseline_losses(mean_trajectory(baseline_runs), true)
    resamples = np.random.default_rng(seed).integers(len(held), size=(bootstrap, len(held)))
    rows = {}
    for name, simulator in simulators.items():
        simulated = simulator.simulate(held.curricula, held.initial_losses)
        scores: dict[str, Any] = {}
        for metric in metrics:
            scores |= _scored(metric, simulated, true, mean, resamples, confidence)
        if simulator.gives_intervals:
            scores["coverage"] = coverage(*simulator.interval(held.curricula, held.initial_losses, _COVERED), true)
        rows[name] = scores | {"runs": len(held), "test_examples": held.n_test}
    table = EvaluationTable(pd.DataFrame.from_dict(rows, orient="index").rename_axis("simulator"))
    longer = int((~np.isnan(true) & np.isnan(mean)).any(axis=(1, 2)).sum())
    table.attrs |= {"task": held.task_name, "fit": len(baseline_runs), "held": len(held), "longer": longer}
    return table


@renamed_arguments(reference="baseline_runs")
@checked
def skill_over_steps(
    simulators: Mapping[str, Simulator],
    held: Runs,
    baseline_runs: Runs,
    *,
    bootstrap: Resamples = 1000,
    confidence: Share = 0.95,
    seed: Seed = 0,
) -> pd.DataFrame:
    """Compute the skill at each step of training, pooled over runs and test examples.

    Args:
        simulators, held, baseline_runs, bootstrap, confidence, seed: same as in ``evaluate``.

    Returns:
        A row per simulator and recorded step: simulator, step, skill and its bootstrap interval over runs, ``low`` and
        ``high``. Steps at which the mean trajectory is exact, or beyond its end, are left out, because the
        skill is undefined there.

    Raises:
        InvalidInput: same as in ``evaluate``.

    >>> import simfluence as sf
    >>> rng = np.random.default_rng(0)
    >>> runs = Runs.from_arrays(rng.integers(3, size=(8, 5, 2)), rng.normal(size=(8, 6, 2)).cumsum(axis=1))
    >>> table = skill_over_steps({"mean": sf.MeanTrajectorySimulator().fit(runs[:4])}, runs[4:], runs[:4])
    >>> table[["step", "skill"]].to_numpy().tolist()
    [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0], [5.0, 0.0]]
    """
    held, baseline_runs = _usable(simulators, held, baseline_runs)
    true = held.losses.astype(np.float64)
    mean = baseline_losses(mean_trajectory(baseline_runs), true)
    true = np.where(np.isnan(mean), np.nan, true)  # later steps have no baseline
    baseline_sse = np.nansum(squared_errors(mean, true), axis=2)  # [runs, times]
    steps = 1 + np.flatnonzero(baseline_sse[:, 1:].sum(axis=0) > 0)
    draws = np.random.default_rng(seed).multinomial(len(held), np.full(len(held), 1 / len(held)), size=bootstrap)
    tables = []
    for name, simulator in simulators.items():
        sse = np.nansum(squared_errors(simulator.simulate(held.curricula, held.initial_losses), true), axis=2)
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw may have no run with this many steps
            resampled = 1 - (draws @ sse[:, steps]) / (draws @ baseline_sse[:, steps])
        low, high = np.array([bootstrap_interval(column, confidence) for column in resampled.T]).reshape(-1, 2).T
        values = 1 - sse[:, steps].sum(axis=0) / baseline_sse[:, steps].sum(axis=0)
        tables.append(pd.DataFrame({"simulator": name, "step": steps, "skill": values, "low": low, "high": high}))
    table = pd.concat(tables, ignore_index=True)
    table.attrs |= {"task": held.task_name, "fit": len(baseline_runs), "held": len(held)}
    return table


def _usable(simulators: Mapping[str, Simulator], held: Runs, baseline_runs: Runs) -> tuple[Runs, Runs]:
    """Return the runs that can be evaluated on, and those to compare with.

    Raises:
        InvalidInput: there is no simulator, no run is usable, or a run is in both parts.
    """
    if not simulators or not all(isinstance(simulator, Simulator) for simulator in simulators.values()):
        raise InvalidInput('simulators must be a mapping from row names to simulators, such as {"linear": linear}')
    held, baseline_runs = held.usable("evaluate on"), baseline_runs.usable("compare with")
    for size in ("n_train", "n_test"):
        if getattr(held, size) != getattr(baseline_runs, size):
            raise InvalidInput(
                f"held has {held.n_train} training and {held.n_test} test examples, but baseline_runs has "
                f"{baseline_runs.n_train} and {baseline_runs.n_test}: give runs of one task"
            )
    if shared := set(held.ids) & set(baseline_runs.ids):
        raise InvalidInput(f"{len(shared)} runs are in both held and baseline_runs: split(…) gives disjoint parts")
    return not_fitted_on(simulators, held, stacklevel=5), baseline_runs


def _scored(
    metric: str, simulated: Losses, true: Losses, mean: Losses, resamples: np.ndarray, confidence: float
) -> dict[str, float]:
    """Compute one metric and its spread, as columns."""
    if metric in ("mse", "final_spearman"):
        per_run = all_steps_mse(simulated, true) if metric == "mse" else final_spearman(simulated, true)
        return {metric: mean_or_nan(per_run), f"{metric}_sd": sd_or_nan(per_run)}
    if metric == "run_correlation":
        value = run_correlation(simulated, true)
        draws = resampled_correlations(final(simulated, true), final(true, true), resamples)
    else:
        errors = skill_errors if metric == "skill" else final_skill_errors
        sse, baseline_sse = errors(simulated, true, mean)
        value = pooled_skill(sse, baseline_sse)
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw may have no run that the baseline covers
            draws = 1 - sse[resamples].sum(1) / baseline_sse[resamples].sum(1)
    low, high = bootstrap_interval(draws, confidence)
    return {metric: value, f"{metric}_low": low, f"{metric}_high": high}
