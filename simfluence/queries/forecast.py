"""The forecast of one query on one run, and its verification by retraining."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from simfluence._internal.checked import checked
from simfluence._internal.deprecation import with_old_columns
from simfluence._internal.files import write_whole
from simfluence._internal.html import card, picture
from simfluence._internal.types import Count, RunLosses, Target
from simfluence.curriculum import Curriculum
from simfluence.edits import Edit
from simfluence.errors import InvalidInput
from simfluence.evaluation.groups import Groups, groups_of
from simfluence.evaluation.metrics import (
    delta_correlation,
    group_correlation,
    hit_rate,
    relative_error,
    seed_share,
    within_correlation,
)
from simfluence.examples import Examples
from simfluence.queries.judgement import Judgement
from simfluence.queries.retraining import retrained
from simfluence.queries.tables import column_of, described, taken_by, tidy
from simfluence.recipe import Recipe
from simfluence.recording.estimate import Seconds, break_even
from simfluence.runs import Run
from simfluence.simulators import Simulator
from simfluence.task import Task

PerTest = Float[np.ndarray, " test"]
#: Said of a forecast whose base run the simulator knows, so that it flatters the simulator.
SEEN = "The simulator was fitted on this base run: forecasts of other runs may be less right."

SeedChanges = Float[np.ndarray, "seeds test"]


@dataclass(frozen=True, eq=False)
class Forecast:
    """A simulator's forecast for one edited curriculum and for its base run.

    Both are simulated, so that the simulator's common error cancels in the difference.

    Args:
        run: the base run.
        edits: edits of its curriculum, in order.
        curriculum: the edited curriculum.
        base: simulated losses under the base curriculum, ``[steps + 1, test]``.
        what_if: simulated losses under the edited curriculum, ``[its steps + 1, test]``.
        low, high: ends of the interval of each loss in ``what_if``, if the simulator gives intervals.
        task: task to train in ``verify``, if known.
        seen: whether the simulator was fitted on the base run; None if it does not know.
        judgement: how far the forecast of the mean change can be trusted.
        simulate_seconds, fit_seconds: time that it took to simulate, and to fit the simulator, if known.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> forecast = sf.what_if(sf.AdditiveSimulator(l2=1e-6).fit(runs), runs[0], sf.Remove([1]))
    >>> print(forecast)
    What if we remove examples 1 (1)? Mean final loss 1.500 → 1.000
    >>> forecast.final.round(2).loc[0].tolist()  # base, what_if, change
    [1.5, 1.0, -0.5]
    """

    run: Run
    edits: tuple[Edit, ...]
    curriculum: Curriculum
    base: Float[np.ndarray, "base_times test"]
    what_if: RunLosses
    low: RunLosses | None = None
    high: RunLosses | None = None
    task: Task | None = field(default=None, repr=False)
    seen: bool | None = None
    simulate_seconds: float | None = None
    fit_seconds: float | None = None
    judgement: Judgement | None = None

    @classmethod
    def of(
        cls,
        simulator: Simulator,
        run: Run,
        edits: tuple[Edit, ...],
        edited: Curriculum,
        confidence: float = 0.9,
        task: Task | None = None,
    ) -> Forecast:
        """Simulate the base run and its edited curriculum, with intervals where the simulator gives them."""
        start = time.perf_counter()
        base, changed = simulator.simulate([run.curriculum, edited], run.initial_losses)
        low = high = None
        if simulator.gives_intervals:
            low, high = (ends[0] for ends in simulator.interval([edited], run.initial_losses, confidence))
        seconds = time.perf_counter() - start
        return cls(
            run,
            edits,
            edited,
            base[: run.steps + 1],
            changed[: len(edited) + 1],
            low,
            high,
            task,
            simulator.was_fitted_on(run),
            seconds,
            getattr(simulator, "fit_seconds_", None),
            Judgement.of(simulator, base[run.steps], changed[len(edited)], len(edited)),
        )

    @property
    def change(self) -> PerTest:
        """Predicted change of each test example's final loss."""
        change: PerTest = self.what_if[-1] - self.base[-1]
        return change

    @property
    def changes_nothing(self) -> bool:
        """Whether the edited curriculum equals the base's, for example if the base never shows the target."""
        return self.curriculum == self.run.curriculum

    @checked
    def break_even(self, retrain_seconds: Seconds) -> float:
        """Return from how many such questions on the simulator saves time, if a retraining takes ``retrain_seconds``.

        Infinity means never: retraining is cheaper, and exact. NaN where it is not known how long fitting took. The
        recording of the runs that the simulator was fitted on is not counted.

        >>> import simfluence as sf
        >>> runs = sf.Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
        >>> forecast = sf.what_if(sf.AdditiveSimulator().fit(runs), runs[0], sf.Remove([1]))
        >>> forecast.break_even(retrain_seconds=1e-9)
        inf
        """
        return break_even(self.fit_seconds, self.simulate_seconds, retrain_seconds)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Tidy: a row per step and test example; columns step, test, base, what_if, change and, if the simulator
        gives intervals, low and high. Losses after the end of the shorter curriculum are missing."""
        columns = {"base": self.base, "what_if": self.what_if}
        if self.low is not None and self.high is not None:
            columns |= {"low": self.low, "high": self.high}
        return tidy(columns)

    @cached_property
    def final(self) -> pd.DataFrame:
        """The final losses, a row per test example: base, what_if, change (low, high) and the example's metadata."""
        table = pd.DataFrame({"base": self.base[-1], "what_if": self.what_if[-1], "change": self.change})
        if self.low is not None and self.high is not None:
            table["low"], table["high"] = self.low[-1], self.high[-1]
        return described(table.rename_axis("test"), self.run.test)

    @checked
    def by_group(self, column: str) -> pd.DataFrame:
        """Mean final losses over the test examples that share a value of a metadata column.

        Raises:
            InvalidInput: the run's test examples have no such column.
        """
        values = column_of(self.run.test, column, "test")
        means = self.final[["base", "what_if", "change"]].groupby(values.to_numpy()).mean()
        return means.assign(test_examples=values.groupby(values).size()).rename_axis(column)

    def ranking(self) -> pd.DataFrame:
        """``final``, the largest changes first."""
        return self.final.loc[np.argsort(-np.abs(self.change), kind="stable")]

    def summary(self) -> str:
        """Summarise the forecast in text."""
        lines = [
            str(self),
            f"Base run {self.run.id}: {_extent(self.run.curriculum)}; edited: {_extent(self.curriculum)}.",
        ]
        lines += [SEEN] if self.seen else []
        lines += [str(self.judgement)] if self.judgement and not self.changes_nothing else []
        rises, falls = int((self.change > 0).sum()), int((self.change < 0).sum())
        lines.append(f"Of {len(self.change)} test examples {rises} rise and {falls} fall.")
        for index, row in self.ranking().head(3).iterrows():
            known = "" if self.run.test is None else f" ({self.run.test.ids[int(str(index))]})"
            within = f", interval {row['low']:.3f} to {row['high']:.3f}" if "low" in row else ""
            lines.append(
                f"  test {index}{known}: {row['base']:.3f} → {row['what_if']:.3f} ({row['change']:+.3f}){within}"
            )
        return "\n".join(lines)

    @checked
    def plot(self, ax: Any = None, title: str = "", *, test: Target | None = None) -> Any:
        """Plot the mean loss along training: base and edited as forecast (with the interval), and the base as recorded.

        Args:
            ax: matplotlib axes to draw on, which are returned; by default those of a new figure.
            title: by default the question.
            test: the test examples to average over: a filter, indices or ids; by default all.
        """
        return _plot_fan(self, None, ax, title, test)

    def _repr_html_(self) -> str:
        question, _, answer = str(self).partition("? ")
        facts = {self.run.task_name or "forecast": answer}
        facts |= {"judgement": str(self.judgement)} if self.judgement and not self.changes_nothing else {}
        return card(f"{question}?", facts, picture(self.plot))

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
    ) -> Verification:
        """Retrain under the edited curriculum and compare the result with the forecast.

        Args:
            recipe: how to train; by default as the base run was.
            task: what to train; by default the one given to ``what_if``.
            store: folder to keep the retrained runs in, marked as verifications so that ``load()`` leaves them out;
                a second call trains nothing, and an interrupted verification is resumed.
            seeds: number of seeds; with more than 1, base and edited curriculum are also trained from ``seeds − 1``
                other seeds of the recipe, to measure how much of the change is due to the seed.
            group: a metadata column whose values are the groups of ``group_correlation`` and ``within_correlation``;
                by default the label, or the class that is the target.

        Raises:
            InvalidInput: the task or recipe is missing or differs from the base run's, or there is no such column.
        """
        task = task or self.task
        groups = groups_in(self.run, task, group)
        after, noise = retrained([self.run], [[self.curriculum]], task, recipe, store, seeds)
        return Verification(self, after[0][0], None if noise is None else noise[0, 0], groups)

    @checked
    def against(self, verification: Verification) -> Verification:
        """Compare this forecast with the losses that another forecast of the same question was verified by.

        So that several simulators are judged by one retraining.

        Raises:
            InvalidInput: the verification is of another base run or another edited curriculum.
        """
        other = verification.forecast
        if (other.run.id, other.curriculum) != (self.run.id, self.curriculum):
            raise InvalidInput(
                f"the verification answers '{other}' on base run {other.run.id}, "
                f"but this forecast answers '{self}' on {self.run.id}: verify this one"
            )
        return dataclasses.replace(verification, forecast=self)

    def __str__(self) -> str:
        nothing = " (nothing changes: the base run never shows them so)" if self.changes_nothing else ""
        before, after = self.base[-1].mean(), self.what_if[-1].mean()
        return f"What if we {described_edits(self.edits)}? Mean final loss {before:.3f} → {after:.3f}{nothing}"


@dataclass(frozen=True, eq=False)
class Verification:
    """A forecast with the retrained losses.

    Args:
        forecast: what was predicted.
        actual: losses of the retrained run, ``[steps + 1, test]``.
        seed_changes: change of the final losses, retrained from the base's seed and from others, ``[seeds, test]``.
        groups: groups of the examples, such as classes, if there are any.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> curricula = sf.random_curricula(n_train=20, runs=3, steps=4, batch_size=4)
    >>> runs = sf.record(task, sf.Recipe(lr=0.1), curricula)
    >>> verified = sf.what_if(sf.AdditiveSimulator().fit(runs), runs[0], sf.Truncate(2), task=task).verify()
    >>> verified.actual.shape, bool(-1 <= verified.delta_correlation <= 1)
    ((3, 5), True)
    """

    forecast: Forecast
    actual: RunLosses
    seed_changes: SeedChanges | None = None
    groups: Groups | None = None

    @property
    def actual_change(self) -> PerTest:
        """Retrained change of each test example's final loss, against the recorded base run."""
        change: PerTest = self.actual[-1] - self.forecast.run.losses[-1]
        return change

    @property
    def delta_correlation(self) -> float:
        """Over test examples, Pearson's r of predicted and retrained change of the final loss."""
        return delta_correlation(self.forecast.change, self.actual_change)

    @property
    def group_correlation(self) -> float:
        """The correlation with the retrained change that knowing whose group is edited has by itself, from 0 to 1.

        The predictor of a test example's change is the number of showings that the edit takes from its group, or, for
        an edit that only moves showings, how much earlier it moves those of its group. A forecast whose delta
        correlation is no higher knows no more than that. NaN without groups, or if they are all edited alike.
        """
        return group_correlation_of(
            self.forecast.run.curriculum, self.forecast.curriculum, self.groups, self.actual_change
        )

    @property
    def within_correlation(self) -> float:
        """The delta correlation within groups: after each group's mean has been taken out of both changes.

        NaN without groups.
        """
        return within_correlation_of(self.forecast.change, self.actual_change, self.groups)

    @property
    def relative_error(self) -> float:
        """Mean squared error of the predicted change divided by that of "nothing changes"; useful below 1."""
        return relative_error(self.forecast.change, self.actual_change)

    @property
    def final_mse(self) -> float:
        """Mean over test examples of (predicted − retrained)² of the final loss."""
        return float(np.mean((self.forecast.what_if[-1] - self.actual[-1]) ** 2))

    @property
    def coverage(self) -> float:
        """The share of retrained final losses that lie within their intervals; NaN without intervals."""
        return share_within(self.forecast.low, self.forecast.high, self.actual, slice(-1, None))

    @property
    def seed_share(self) -> float:
        """The share of the retrained change that is due to the seed, from 0 to about 1; NaN for a single seed.

        It is the variance of the change over seeds divided by its mean square.
        """
        return float("nan") if self.seed_changes is None else seed_share(self.seed_changes)

    @checked
    def hit_rate(self, k: Count = 10) -> float:
        """Return the share of the ``k`` most changed test examples that were predicted to be among these."""
        return hit_rate(self.forecast.change, self.actual_change, k)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The forecast's frame with the columns actual_base, actual and actual_change."""
        frame = self.forecast.frame.copy()
        for name, losses in (("actual_base", self.forecast.run.losses), ("actual", self.actual)):
            frame[name] = np.nan
            frame.loc[: losses.size - 1, name] = losses.astype(np.float64).ravel()
        frame["actual_change"] = frame["actual"] - frame["actual_base"]
        return with_old_columns(frame, {"delta": "change", "actual_delta": "actual_change"})

    def summary(self) -> str:
        """Summarise in text how accurate the forecast was."""
        before, after = self.forecast.run.losses[-1].mean(), self.actual[-1].mean()
        lines, seen = [f"Retrained: mean final loss {after:.3f} (was {before:.3f})"], [SEEN] * bool(self.forecast.seen)
        if (self.actual_change == 0).all():
            return "\n".join([lines[0] + ": nothing changed", *seen])
        beside = beside_groups(self.groups, self.group_correlation, self.within_correlation)
        lines.append(
            f"Delta correlation {self.delta_correlation:.3f}{beside}, "
            f"error {self.relative_error:.1%} of saying 'no change', "
            f"{self.hit_rate():.0%} of the 10 most changed test examples named, final-loss MSE {self.final_mse:.4g}"
        )
        if self.forecast.low is not None:
            lines.append(f"{self.coverage:.0%} of retrained final losses lie within their intervals")
        if self.seed_changes is not None:
            lines.append(f"{self.seed_share:.1%} of the change is the seed's ({len(self.seed_changes)} seeds)")
        return "\n".join(lines + seen)

    @checked
    def plot(self, ax: Any = None, title: str = "", *, test: Target | None = None) -> Any:
        """Plot the forecast and the retrained losses; for arguments see ``Forecast.plot``."""
        return _plot_fan(self.forecast, self.actual, ax, title, test)

    @checked
    def plot_changes(self, ax: Any = None, title: str = "") -> Any:
        """Plot forecast against retrained change of the final loss, a point per test example."""
        from simfluence import plots

        metrics = {"delta correlation": self.delta_correlation, "relative error": self.relative_error}
        metrics |= {} if np.isnan(self.within_correlation) else {"within groups": self.within_correlation}
        title = title or f"{_question(self.forecast)} {len(self.actual_change)} test examples"
        return plots.scatter(self.forecast.change, self.actual_change, ax, title, metrics=metrics)

    def _repr_html_(self) -> str:
        truth, *lines = self.summary().split("\n")
        facts = {"truth": truth, "forecast": "".join(lines[:1]), "further": ". ".join(lines[1:])}  # long ones are cut
        facts = {name: said for name, said in facts.items() if said}
        return card(str(self.forecast), facts, picture(self.plot), picture(self.plot_changes, 5, 4.4))

    def __str__(self) -> str:
        return f"{self.forecast}\n{self.summary()}"


def groups_in(run: Run, task: Task | None, column: str | None) -> Groups | None:
    """Return the groups of a run's examples, or of its task's where the run does not know them."""
    train, test = (run.train, run.test) if run.test is not None or task is None else (task.train, task.test)
    return groups_of(train, test, column)


def group_correlation_of(base: Curriculum, edited: Curriculum, groups: Groups | None, actual: PerTest) -> float:
    """Compute the ``group_correlation`` of an edit; NaN where the groups are not known."""
    if groups is None or groups.train is None:
        return float("nan")
    return group_correlation(taken_by(edited, base), groups.train, groups.test, actual)


def within_correlation_of(predicted: PerTest, actual: PerTest, groups: Groups | None) -> float:
    """Compute the ``within_correlation``; NaN without groups."""
    return float("nan") if groups is None else within_correlation(predicted, actual, groups.test)


def beside_groups(groups: Groups | None, alone: float, within: float) -> str:
    """Say what stands beside a delta correlation, as far as it is known: what groups alone have, and within them."""
    if groups is None or np.isnan([alone, within]).all():
        return ""
    said = [] if np.isnan(alone) else [f"the edited {groups.name} alone has {alone:.3f}"]
    said += [] if np.isnan(within) else [f"within each {groups.name} {within:.3f}"]
    return f" ({', '.join(said)})"


def described_edits(edits: Sequence[Edit]) -> str:
    """Join edits into one sentence."""
    return " and ".join(str(edit) for edit in edits)


def _question(forecast: Forecast) -> str:
    """Return the question, with the task's name where it is known."""
    name = forecast.run.task_name
    return f"{name + ': w' if name else 'W'}{str(forecast).partition('?')[0][1:]}?"


def _plot_fan(forecast: Forecast, actual: np.ndarray | None, ax: Any, title: str, test: Target | None) -> Any:
    """Plot the mean losses of the chosen test examples, with the interval where there is one."""
    from simfluence import plots

    run = forecast.run
    examples = run.test or Examples.numbered(run.losses.shape[1])
    chosen = np.arange(len(examples)) if test is None else examples.select(test)
    losses = {"base, forecast": forecast.base, "edited, forecast": forecast.what_if, "base, recorded": run.losses}
    losses |= {} if actual is None else {"edited, retrained": actual}
    interval = None
    if forecast.low is not None and forecast.high is not None:
        interval = forecast.low[:, chosen].mean(1), forecast.high[:, chosen].mean(1)
    noun = "test example" if len(chosen) == 1 else "test examples"
    return plots.fan(
        {name: part[:, chosen].astype(np.float64).mean(1) for name, part in losses.items()}, ax,
        title or f"{_question(forecast)}{_mark(forecast)} {'Mean of ' if len(chosen) > 1 else ''}{len(chosen)} {noun}",
        interval=interval,
        ylabel="test loss" if len(chosen) == 1 else "mean test loss",
        interval_name="interval of the forecast" if len(chosen) == 1 else "intervals, averaged",
    )  # fmt: skip


def _mark(forecast: Forecast) -> str:
    """Return the mark of a forecast that is not to be trusted, for pictures."""
    doubted = forecast.judgement is not None and forecast.judgement.doubts and not forecast.changes_nothing
    return " (forecast not to be trusted)" if doubted else ""


def _extent(curriculum: Curriculum) -> str:
    examples = len(np.unique(curriculum.indices))
    return f"{len(curriculum)} steps, {len(curriculum.indices)} slots filled by {examples} examples"


def share_within(low: Any, high: Any, actual: np.ndarray, rows: slice) -> float:
    """Return the share of ``actual[rows]`` that lies within its intervals; NaN without intervals."""
    if low is None or high is None:
        return float("nan")
    return float(np.mean((low[rows] <= actual[rows]) & (actual[rows] <= high[rows])))
