"""Evaluation of attributions: against runs on subsets, retrained removals, or true influence scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from simfluence._internal.checked import checked, shown
from simfluence._internal.types import Count, Seed, Share, Target
from simfluence.attribution.scores import Scores
from simfluence.edits import Remove
from simfluence.errors import InvalidInput
from simfluence.evaluation.groups import Groups
from simfluence.evaluation.metrics import (
    Resamples,
    correlation_over_runs,
    delta_correlation,
    harmful_hit_rate,
    mean_or_nan,
    within_correlation,
)
from simfluence.recording import record
from simfluence.runs import Run, Runs
from simfluence.task import Task

__all__ = ["LDS", "agreement", "brittleness", "checked_scores", "lds"]


@dataclass(frozen=True)
class LDS:
    """A linear datamodeling score.

    Args:
        value: mean over test examples of Spearman's ρ over runs.
        low, high: bootstrap interval over runs.
        runs, test_examples: numbers of runs and test examples.

    >>> print(LDS(0.71, 0.67, 0.74, runs=64, test_examples=100))
    0.710 [0.670, 0.740]
    """

    value: float
    low: float
    high: float
    runs: int
    test_examples: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@checked
def lds(scores: Any, runs: Runs, *, bootstrap: Resamples = 1000, confidence: Share = 0.95, seed: Seed = 0) -> LDS:
    """Compute the linear datamodeling score (Park et al. 2023, definition 2.3).

    It is Spearman's ρ over runs between predicted and recorded final loss, averaged over test examples. The predicted
    loss falls by the score of each training example that the run shows.

    Args:
        scores: ``[test, train]``, positive where training on the example lowers the loss; any unit.
        runs: runs that each train on their own subset of the training examples.
        bootstrap, confidence, seed: number of resamples of the runs, coverage and seed of the interval.

    Raises:
        InvalidInput: the scores have another shape, there are fewer than 3 runs, or all runs show the same examples.

    >>> runs = Runs.from_arrays([[[0]], [[1]], [[2]]], [[[3.0], [1.0]], [[3.0], [2.0]], [[3.0], [2.5]]])
    >>> lds(np.array([[0.9, 0.5, 0.1]]), runs).value
    1.0
    """
    runs = runs.usable("judge scores by")
    values = checked_scores(scores, runs.n_test, runs.n_train)
    if len(runs) < 3:
        raise InvalidInput(f"{len(runs)} runs are too few: give 16 or more, each on its own subset")
    shown = np.array([run.curriculum.counts.sum(axis=0) > 0 for run in runs])  # [runs, train]
    if (shown == shown[0]).all():
        raise InvalidInput("all runs show the same training examples: record runs on different subsets")
    actual = np.array([run.losses[run.times[-1]] for run in runs], np.float64)
    correlation = correlation_over_runs(
        shown @ -values.T, actual, bootstrap=bootstrap, confidence=confidence, seed=seed
    )
    return LDS(*correlation, runs=len(runs), test_examples=runs.n_test)


@checked
def brittleness(
    scores: Any,
    task: Task,
    run: Run,
    k: Count | Sequence[Count] = (1, 5, 10),
    *,
    test: Target | None = None,
    store: str | Path | None = None,
    seed: Seed = 0,
) -> pd.DataFrame:
    """Retrain without the k most helpful examples of a test example and measure how much its loss rises.

    The comparison is the rise without k random examples that the run shows. Batches shrink.

    Args:
        scores: ``[test, train]``, in any unit.
        task, run: task and run to retrain, with the run's recipe and its curriculum without the examples.
        k: numbers of examples to remove.
        test: the test examples, each of which needs two trainings per k: a filter, rows or ids; by default 20, evenly
            spread.
        store: folder for the retrained runs; a second call with the same arguments trains nothing.
        seed: seed of the random removals.

    Returns:
        A row per k: ``rise`` and ``random_rise``, means over the test examples, their standard errors ``rise_se`` and
        ``random_rise_se``, and the number of test_examples.

    Raises:
        InvalidInput: the scores have another shape, a k removes every example, or the run is of another task or has
            no recipe.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> run = sf.record(task, sf.Recipe(lr=0.1), sf.random_curricula(n_train=20, runs=1, steps=6, batch_size=4))[0]
    >>> scores = sf.attribution.TracInIdeal().fit(run).scores()
    >>> brittleness(scores, task, run, k=[1, 3]).columns.tolist()
    ['rise', 'rise_se', 'random_rise', 'random_rise_se', 'test_examples']
    """
    k = [k] if isinstance(k, int) else list(dict.fromkeys(k))
    if not k:
        raise InvalidInput("k must have one number of examples to remove or more, got none")
    values = checked_scores(scores, len(task.test), len(task.train))
    run.check_task(task)
    if run.recipe is None:
        raise InvalidInput(f"run {run.id} has no recipe, so it cannot be retrained: record it with sf.record")
    spread = np.linspace(0, len(task.test) - 1, min(20, len(task.test))).astype(int)
    chosen = spread if test is None else task.test.select(test)
    shown = np.unique(run.curriculum.indices)
    if not all(1 <= number < len(shown) for number in k):
        raise InvalidInput(
            f"k must be from 1 to {len(shown) - 1}, because the run shows {len(shown)} examples; got {list(k)}"
        )
    rng = np.random.default_rng(seed)
    best = [shown[np.argsort(-values[z, shown], kind="stable")] for z in chosen]
    others = [rng.permutation(shown) for _ in chosen]
    edits = [Remove(rows=order[:number]) for number in k for orders in (best, others) for order in orders]
    retrained = record(task, run.recipe, [e.apply(run.curriculum) for e in edits], store, verification=True)
    after = np.array([retrained_run.losses[-1] for retrained_run in retrained]).reshape(len(k), 2, len(chosen), -1)
    rises = after[:, :, np.arange(len(chosen)), chosen] - run.losses[-1, chosen]  # [k, 2, chosen]
    mean, error = (
        rises.mean(axis=2),
        rises.std(axis=2, ddof=1) / np.sqrt(len(chosen)) if len(chosen) > 1 else np.full(rises.shape[:2], np.nan),
    )
    columns = {"rise": mean[:, 0], "rise_se": error[:, 0], "random_rise": mean[:, 1], "random_rise_se": error[:, 1]}
    return pd.DataFrame(columns | {"test_examples": len(chosen)}, index=pd.Index(k, name="k"))


@checked
def agreement(
    scores: Any, truth: Float[np.ndarray, "test train"] | Scores, *, groups: Groups | None = None, k: Count = 10
) -> pd.Series:
    """Compare scores with true influence scores (leave-one-out retraining, PBRF, exact influence).

    Much of such a truth is "examples of the same class help", which needs no attribution. So judge scores beside
    ``agreement(groups.same, truth)``, or with ``groups=``, where the classes are those of ``groups_of``.

    Args:
        scores, truth: ``[test, train]``, positive where the loss rises without the training example.
        groups: classes of the examples, or other groups.
        k: number of most harmful training examples to find; at most a tenth of them, but at least 1.

    Returns:
        ``pearson`` and ``spearman``: correlations over training examples, averaged over test examples; ``pooled``:
        Pearson's r over all pairs; ``size``: slope of truth on scores, 1 if their sizes agree; ``harmful``: the share
        of the k training examples with the lowest mean of the truth that are among the k lowest by scores. With groups
        also ``same_group``: ``pearson`` of "is of the same group", and ``within``: ``pearson`` after the mean of each
        group of training examples has been taken out of both, for each test example.

    Raises:
        InvalidInput: the shapes differ, there are fewer than 3 training examples, or their groups are not known.

    >>> agreement(np.array([[1.0, 2.0, 3.0]]), np.array([[2.0, 4.0, 6.0]])).round(2).to_dict()
    {'pearson': 1.0, 'spearman': 1.0, 'pooled': 1.0, 'size': 2.0, 'harmful': 1.0}
    """
    truth = np.asarray(truth, np.float64)
    if truth.ndim != 2 or truth.shape[1] < 3:
        raise InvalidInput(f"truth must be [test, train] with 3 training examples or more, got {truth.shape}")
    values = checked_scores(scores, *truth.shape)
    rows = pd.DataFrame(values.T).corrwith(pd.DataFrame(truth.T))
    ranks = pd.DataFrame(values.T).corrwith(pd.DataFrame(truth.T), method="spearman")
    pooled = float(np.corrcoef(values.ravel(), truth.ravel())[0, 1])
    size = float((values * truth).sum() / (values**2).sum()) if values.any() else float("nan")
    found = {"pearson": rows.mean(), "spearman": ranks.mean(), "pooled": pooled, "size": size}
    found["harmful"] = harmful_hit_rate(values, truth, k)
    return pd.Series(found if groups is None else found | _by_group(values, truth, groups))


def _by_group(values: np.ndarray, truth: np.ndarray, groups: Groups) -> dict[str, float]:
    """Compute what knowing the groups alone has, and the correlation within each group of training examples."""
    same = groups.same.astype(np.float64)
    if same.shape != truth.shape:
        raise InvalidInput(f"groups are of [test, train] {list(same.shape)}, but truth is {list(truth.shape)}")
    alone = [delta_correlation(*pair) for pair in zip(same, truth, strict=True)]
    train = np.asarray(groups.train)
    within = [within_correlation(*pair, train) for pair in zip(values, truth, strict=True)]
    return {"same_group": mean_or_nan(np.array(alone)), "within": mean_or_nan(np.array(within))}


def checked_scores(scores: Any, n_test: int, n_train: int) -> Float[np.ndarray, "test train"]:
    """Return scores as an array, checked to have the right shape.

    Raises:
        InvalidInput: the shape is wrong, or a score is not finite.
    """
    try:
        values = np.asarray(scores, np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(f"scores must be numbers [{n_test} test, {n_train} train], got {shown(scores)}") from None
    if values.shape != (n_test, n_train):
        raise InvalidInput(f"scores must be [{n_test} test, {n_train} train], got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise InvalidInput("some scores are NaN or infinite")
    return values
