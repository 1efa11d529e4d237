"""Forecasts of many queries on one or several runs, and their verification by retraining."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
from jaxtyping import Float

from simfluence._internal.checked import checked
from simfluence._internal.files import write_whole
from simfluence._internal.html import card, picture
from simfluence._internal.types import Count
from simfluence.curriculum import Curriculum
from simfluence.edits import Edit
from simfluence.errors import InvalidInput
from simfluence.evaluation.groups import Groups
from simfluence.evaluation.metrics import delta_correlation, hit_rate, relative_error, seed_share
from simfluence.queries.forecast import (
    Forecast,
    Verification,
    beside_groups,
    described_edits,
    group_correlation_of,
    groups_in,
    share_within,
    within_correlation_of,
)
from simfluence.queries.judgement import Judgement
from simfluence.queries.retraining import retrained
from simfluence.queries.tables import column_of
from simfluence.recipe import Recipe
from simfluence.recording.estimate import Seconds, break_even
from simfluence.runs import Run
from simfluence.simulators import Simulator
from simfluence.task import Task

PerQuery = Float[np.ndarray, "queries runs test"]


@dataclass(frozen=True, eq=False)
class Forecasts(Sequence[Forecast]):
    """A simulator's answers to many queries of one or many base runs: the change of every final loss.

    A sequence of ``Forecast``, ordered by query and then by run; each is simulated when it is indexed.

    Args:
        simulator: the simulator that answers.
        runs: the base runs.
        queries: edits of each query, by name.
        curricula: the edited curriculum of each query and run.
        base: simulated final losses of the base runs, ``[runs, test]``.
        change: predicted change of the final losses, ``[queries, runs, test]``.
        low, high: ends of the intervals of the final losses, if the simulator gives intervals.
        confidence: confidence of the intervals.
        task: task to train in ``verify``, if known.
        simulate_seconds: time that it took to answer one question, on average, if known.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> fitted = sf.AdditiveSimulator(l2=1e-6).fit(runs)
    >>> forecasts = sf.what_if(fitted, runs, {"no 0": sf.Remove([0]), "no 1": sf.Remove([1])})
    >>> forecasts.ranking()["change"].round(2).to_dict()
    {'no 0': 2.0, 'no 1': -0.5}
    """

    simulator: Simulator
    runs: tuple[Run, ...]
    queries: Mapping[str, tuple[Edit, ...]]
    curricula: Sequence[Sequence[Curriculum]]
    base: Float[np.ndarray, "runs test"]
    change: PerQuery
    low: PerQuery | None
    high: PerQuery | None
    confidence: float
    task: Task | None = field(default=None, repr=False)
    simulate_seconds: float | None = None

    @property
    def fit_seconds(self) -> float | None:
        """Time that it took to fit the simulator, if known."""
        return getattr(self.simulator, "fit_seconds_", None)

    @checked
    def break_even(self, retrain_seconds: Seconds) -> float:
        """Return from how many such questions on the simulator saves time; see ``Forecast.break_even``."""
        return break_even(self.fit_seconds, self.simulate_seconds, retrain_seconds)

    @property
    def what_if(self) -> PerQuery:
        """Predicted final losses."""
        final: PerQuery = self.base + self.change
        return final

    @cached_property
    def judgements(self) -> pd.DataFrame:
        """How far each forecast of a mean change can be trusted: a row per query and base run, indexed by both.

        Columns: change, error, distance, trusted and doubts (text, empty if trusted); see ``Judgement``.
        """
        names = list(self.queries)
        rows = []
        for query, run in np.ndindex(len(names), len(self.runs)):
            steps = len(self.curricula[query][run])
            judged = Judgement.of(self.simulator, self.base[run], self.what_if[query, run], steps)
            named = {"query": names[query], "run": self.runs[run].id, "change": judged.change, "error": judged.error}
            rows.append(
                named | {"distance": judged.distance, "trusted": judged.trusted, "doubts": "; ".join(judged.doubts)}
            )
        return pd.DataFrame(rows).set_index(["query", "run"])

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Tidy: a row per query, base run and test example; columns query, run, test, base, what_if, change and, if
        the simulator gives intervals, low and high."""
        queries, runs, tests = self.change.shape
        index = {
            "query": np.repeat(list(self.queries), runs * tests),
            "run": np.tile(np.repeat([run.id for run in self.runs], tests), queries),
            "test": np.tile(np.arange(tests), queries * runs),
        }
        columns = {
            "base": np.broadcast_to(self.base, self.change.shape),
            "what_if": self.what_if,
            "change": self.change,
        }
        if self.low is not None and self.high is not None:
            columns |= {"low": self.low, "high": self.high}
        return pd.DataFrame(index | {name: values.ravel() for name, values in columns.items()})

    @checked
    def by_group(self, column: str) -> pd.DataFrame:
        """Mean change of the final loss, a row per query, a column per value of a metadata column of the test examples.

        Raises:
            InvalidInput: the test examples have no such column.
        """
        values = column_of(self.runs[0].test, column, "test")
        table = pd.DataFrame(self.change.mean(1), index=pd.Index(self.queries, name="query"))
        return table.T.groupby(values.to_numpy()).mean().T.rename_axis(columns=column)

    def ranking(self) -> pd.DataFrame:
        """The queries, from the one that raises the mean final loss most: columns change, base, what_if,
        trusted_runs (the number of base runs of which the forecast is trusted), edits and unchanged_runs (the number of
        base runs that the query does not change)."""
        same = [sum(c == run.curriculum for c, run in zip(row, self.runs, strict=True)) for row in self.curricula]
        means = {"change": self.change.mean((1, 2)), "base": self.base.mean(), "what_if": self.what_if.mean((1, 2))}
        means["trusted_runs"] = self.judgements["trusted"].to_numpy().reshape(len(self.queries), -1).sum(axis=1)
        edits = [described_edits(edits) for edits in self.queries.values()]
        table = pd.DataFrame(means | {"edits": edits, "unchanged_runs": same}, pd.Index(self.queries, name="query"))
        return table.sort_values("change", ascending=False, kind="stable")

    def summary(self) -> str:
        """Summarise the forecasts in text."""
        counts = f"{len(self.queries)} queries of {len(self.runs)} base runs, {self.change.shape[2]} test examples"
        seen = sum(bool(self.simulator.was_fitted_on(run)) for run in self.runs)
        noted = f" The simulator was fitted on {seen} of these base runs." if seen else ""
        lines = [f"{counts}.{noted} Mean final loss {self.base.mean():.3f}; by query:"]
        for name, row in self.ranking().iterrows():
            noted = f", trusted on {row['trusted_runs']} of {len(self.runs)} runs" if self.simulator.trust else ""
            noted = " (nothing changes)" if row["unchanged_runs"] == len(self.runs) else noted
            lines.append(f"  {name}: {row['change']:+.3f}{noted}")
        return "\n".join(lines)

    @checked
    def plot(self, ax: Any = None, title: str = "") -> Any:
        """Plot the forecast change of the mean final loss, a row per query."""
        return _plot_changes(self, None, ax, title)

    def _repr_html_(self) -> str:
        rows = 1.8 + 0.25 * min(len(self.queries), 40)
        return card(_about(self), {"Mean final loss": f"{self.base.mean():.3f}"}, picture(self.plot, 7, rows))

    @checked
    def to_parquet(self, path: str | Path) -> None:
        """Write ``frame`` to a Parquet file."""
        write_whole(Path(path), self.frame.to_parquet(index=False))

    @checked
    def verify(
        self,
        recipe: Recipe | None = None,
        *,
        task: Task | None = None,
        store: str | Path | None = None,
        seeds: Count = 1,
        group: str | None = None,
    ) -> Verifications:
        """Retrain under every edited curriculum, many at a time; for arguments see ``Forecast.verify``."""
        groups = groups_in(self.runs[0], task or self.task, group)
        after, noise = retrained(self.runs, self.curricula, task or self.task, recipe, store, seeds)
        final = np.array([[losses[-1] for losses in row] for row in after])
        return Verifications(self, after, final, noise, groups)

    @checked
    def against(self, verifications: Verifications) -> Verifications:
        """Compare these forecasts with the losses that other forecasts of the same queries were verified by.

        Raises:
            InvalidInput: the verifications are of other base runs or other edited curricula.
        """
        other = verifications.forecasts
        same_runs = [run.id for run in other.runs] == [run.id for run in self.runs]
        if not same_runs or [list(row) for row in other.curricula] != [list(row) for row in self.curricula]:
            raise InvalidInput("the verifications are of other base runs or queries than these forecasts: verify these")
        return dataclasses.replace(verifications, forecasts=self)

    def __len__(self) -> int:
        return len(self.queries) * len(self.runs)

    @overload
    def __getitem__(self, index: int) -> Forecast: ...
    @overload
    def __getitem__(self, index: slice) -> list[Forecast]: ...
    def __getitem__(self, index: int | slice) -> Forecast | list[Forecast]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"forecast {index} of {len(self)}")
        query, run = divmod(index % len(self), len(self.runs))
        edits = list(self.queries.values())[query]
        return Forecast.of(
            self.simulator, self.runs[run], edits, self.curricula[query][run], self.confidence, self.task
        )

    def __iter__(self) -> Iterator[Forecast]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Forecasts({len(self.queries)} queries of {len(self.runs)} runs, test={self.change.shape[2]})"


@dataclass(frozen=True, eq=False)
class Verifications(Sequence[Verification]):
    """Forecasts with the retrained losses, ordered by query and then by run.

    Args:
        forecasts: what was predicted.
        losses: losses of the retrained runs, ``[queries][runs]``, each ``[steps + 1, test]``.
        final: final losses of the retrained runs, ``[queries, runs, test]``.
        seed_changes: change of the final losses for each seed, ``[queries, runs, seeds, test]``, if several were
            trained.
        groups: groups of the examples, such as classes, if there are any.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> curricula = sf.random_curricula(n_train=20, runs=3, steps=4, batch_size=4)
    >>> runs = sf.record(task, sf.Recipe(lr=0.1), curricula)
    >>> queries = {"half": sf.Truncate(2), "no 0": sf.Remove([0])}
    >>> verified = sf.what_if(sf.AdditiveSimulator().fit(runs), runs, queries, task=task).verify()
    >>> verified.table.index.tolist(), verified.final.shape
    (['half', 'no 0', 'all'], (2, 3, 5))
    """

    forecasts: Forecasts
    losses: Sequence[Sequence[np.ndarray]]
    final: Float[np.ndarray, "queries runs test"]
    seed_changes: Float[np.ndarray, "queries runs seeds test"] | None = None
    groups: Groups | None = None

    @property
    def actual_change(self) -> Float[np.ndarray, "queries runs test"]:
        """Retrained change of the final losses, against the recorded base runs."""
        return self.final - np.array([run.losses[-1] for run in self.forecasts.runs], np.float64)

    @cached_property
    def table(self) -> pd.DataFrame:
        """How accurate the forecasts were: a row per query, and one for all.

        Columns: ``change`` and ``retrained`` (means over base runs and test examples); ``relative_error``, pooled over
        both, below 1 if better than "nothing changes"; ``delta_correlation``, beside it ``group_correlation`` and
        ``within_correlation`` (see ``Verification``), and ``hit_rate`` of the 10 most changed test examples (means over
        base runs, and for all over queries); ``coverage`` of the intervals; ``seed_share`` of the retrained change.
        """
        rows = {name: self._scores(slice(number, number + 1)) for number, name in enumerate(self.forecasts.queries)}
        return pd.DataFrame.from_dict(rows | {"all": self._scores(slice(None))}, orient="index").rename_axis("query")

    def _scores(self, rows: slice) -> dict[str, float]:
        change, actual = self.forecasts.change[rows], self.actual_change[rows]
        pairs = list(zip(change.reshape(-1, change.shape[-1]), actual.reshape(-1, change.shape[-1]), strict=True))
        return {
            "change": float(change.mean()),
            "retrained": float(actual.mean()),
            "relative_error": relative_error(change, actual),
            "delta_correlation": _mean_of_known([delta_correlation(*pair) for pair in pairs]),
            "group_correlation": _mean_of_known(self._group_correlations[rows].ravel()),
            "within_correlation": _mean_of_known([within_correlation_of(*pair, self.groups) for pair in pairs]),
            "hit_rate": _mean_of_known([hit_rate(*pair) for pair in pairs]),
            "coverage": share_within(self.forecasts.low, self.forecasts.high, self.final, rows),
            "seed_share": float("nan") if self.seed_changes is None else seed_share(self.seed_changes[rows]),
        }

    @cached_property
    def _group_correlations(self) -> Float[np.ndarray, "queries runs"]:
        asked = zip(self.forecasts.curricula, self.actual_change, strict=True)
        return np.array(
            [
                [
                    group_correlation_of(run.curriculum, edited, self.groups, change)
                    for run, edited, change in zip(self.forecasts.runs, curricula, changes, strict=True)
                ]
                for curricula, changes in asked
            ]
        )

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The forecasts' frame with the columns actual_base, actual and actual_change."""
        base = np.array([run.losses[-1] for run in self.forecasts.runs], np.float64)
        actual = {"actual_base": np.broadcast_to(base, self.final.shape), "actual": self.final}
        columns = actual | {"actual_change": self.actual_change}
        return self.forecasts.frame.assign(**{name: values.ravel() for name, values in columns.items()})

    def summary(self) -> str:
        """Summarise in text how accurate the forecasts were."""
        scores = self._scores(slice(None))
        beside = beside_groups(self.groups, scores["group_correlation"], scores["within_correlation"])
        changes = f"{scores['retrained']:+.3f} (forecast {scores['change']:+.3f})"
        return (
            f"Retrained {len(self)} curricula: mean change {changes}, "
            f"error {scores['relative_error']:.1%} of saying 'no change', "
            f"delta correlation {scores['delta_correlation']:.3f}{beside}"
        )

    @checked
    def plot(self, ax: Any = None, title: str = "") -> Any:
        """Plot forecast and retrained change of the mean final loss, a row per query."""
        return _plot_changes(self.forecasts, self.actual_change, ax, title)

    @checked
    def plot_changes(self, ax: Any = None, title: str = "") -> Any:
        """Plot forecast against retrained change of the final loss: a point per base run and test example, a colour per
        query."""
        from simfluence import plots

        scores = self._scores(slice(None))
        metrics = {name.replace("_", " "): scores[name] for name in ("delta_correlation", "relative_error")}
        within = scores["within_correlation"]
        metrics |= {} if np.isnan(within) else {"within groups": within}
        predicted, actual = (part.reshape(len(part), -1) for part in (self.forecasts.change, self.actual_change))
        title, names = title or _about(self.forecasts), list(self.forecasts.queries)
        return plots.scatter(predicted, actual, ax, title, metrics=metrics, groups=names)

    def _repr_html_(self) -> str:
        size = 1.8 + 0.25 * min(len(self.forecasts.queries), 40)
        pictures = picture(self.plot, 7, size), picture(self.plot_changes, 6.5, 4)
        return card("Forecasts beside the truth", {_about(self.forecasts): self.summary()}, *pictures)

    def __len__(self) -> int:
        return len(self.forecasts)

    @overload
    def __getitem__(self, index: int) -> Verification: ...
    @overload
    def __getitem__(self, index: slice) -> list[Verification]: ...
    def __getitem__(self, index: int | slice) -> Verification | list[Verification]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        forecast = self.forecasts[index]
        query, run = divmod(index % len(self), len(self.forecasts.runs))
        changes = None if self.seed_changes is None else self.seed_changes[query, run]
        return Verification(forecast, self.losses[query][run], changes, self.groups)


def _about(forecasts: Forecasts) -> str:
    """Describe the numbers of queries, runs and test examples."""
    queries, runs, tests = forecasts.change.shape
    name = forecasts.runs[0].task_name
    return f"{name + ': ' if name else ''}{queries} queries of {runs} base runs, {tests} test examples"


def _plot_changes(forecasts: Forecasts, actual: np.ndarray | None, ax: Any, title: str) -> Any:
    """Plot the mean change by query; a question mark is beside those that are not to be trusted."""
    from simfluence import plots

    predicted, retrained = forecasts.change.mean((1, 2)), None if actual is None else actual.mean((1, 2))
    doubted: set[str] = set()
    if forecasts.simulator.trust:
        table = forecasts.judgements.reset_index()
        doubted = set(table.loc[~table["trusted"], "query"])
    names = [f"{name} (?)" if name in doubted else name for name in forecasts.queries]
    return plots.changes(names, predicted, retrained, ax, title or _about(forecasts))


def _mean_of_known(values: Iterable[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
