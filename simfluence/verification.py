"""Forecasts beside the truth: retraining under edited curricula, and what it says of what was forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from simfluence._html import card, picture
from simfluence._types import RunLosses, Target
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.evaluation import delta_correlation, hit_rate, relative_error, seed_share
from simfluence.examples import Examples
from simfluence.recipe import Recipe
from simfluence.recording import record
from simfluence.runs import Run
from simfluence.task import Task

if TYPE_CHECKING:
    from simfluence.whatif import Forecast, Forecasts

PerTest = Float[np.ndarray, " test"]
SeedChanges = Float[np.ndarray, "seeds test"]


@dataclass(frozen=True, eq=False)
class Verification:
    """A forecast beside the truth.

    Args:
        forecast: what was predicted.
        actual: losses of the retrained run, ``[steps + 1, test]``.
        seed_changes: change of the final losses, retrained from the base's seed and from others, ``[seeds, test]``.

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

    @property
    def actual_change(self) -> PerTest:
        """Retrained change of each test example's final loss, against the recorded base run."""
        return self.actual[-1] - self.forecast.run.losses[-1]

    @property
    def delta_correlation(self) -> float:
        """Over test examples, Pearson's r of predicted and retrained change of the final loss."""
        return delta_correlation(self.forecast.change, self.actual_change)

    @property
    def relative_error(self) -> float:
        """Mean squared error of the predicted change, as a share of that of "nothing changes": below 1 is of use."""
        return relative_error(self.forecast.change, self.actual_change)

    @property
    def final_mse(self) -> float:
        """Mean over test examples of (predicted − retrained)² of the final loss."""
        return float(np.mean((self.forecast.what_if[-1] - self.actual[-1]) ** 2))

    @property
    def coverage(self) -> float:
        """The share of retrained final losses that lie within their intervals; NaN where there are none."""
        return _within(self.forecast.low, self.forecast.high, self.actual, slice(-1, None))

    @property
    def seed_share(self) -> float:
        """How much of the retrained change is the seed's, from 0 to about 1; NaN unless other seeds were trained.

        Variance of the change over seeds, as a share of its mean square.
        """
        return float("nan") if self.seed_changes is None else seed_share(self.seed_changes)

    def hit_rate(self, k: int = 10) -> float:
        """Of the ``k`` test examples that really change most, the share among the ``k`` that were said to."""
        return hit_rate(self.forecast.change, self.actual_change, k)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The forecast's frame with the columns actual_base, actual and actual_delta."""
        frame = self.forecast.frame.copy()
        for name, losses in (("actual_base", self.forecast.run.losses), ("actual", self.actual)):
            frame[name] = np.nan
            frame.loc[: losses.size - 1, name] = losses.astype(np.float64).ravel()
        return frame.assign(actual_delta=frame["actual"] - frame["actual_base"])

    def summary(self) -> str:
        """How right the forecast was, in words and numbers."""
        before, after = self.forecast.run.losses[-1].mean(), self.actual[-1].mean()
        lines = [f"Retrained: mean final loss {after:.3f} (was {before:.3f})"]
        if (self.actual_change == 0).all():
            return lines[0] + ": nothing changed"
        lines.append(
            f"Delta correlation {self.delta_correlation:.3f}, error {self.relative_error:.1%} of saying 'no change', "
            f"{self.hit_rate():.0%} of the 10 most changed test examples named, final-loss MSE {self.final_mse:.4g}"
        )
        if self.forecast.low is not None:
            lines.append(f"{self.coverage:.0%} of retrained final losses lie within their intervals")
        if self.seed_changes is not None:
            lines.append(f"{self.seed_share:.1%} of the change is the seed's ({len(self.seed_changes)} seeds)")
        return "\n".join(lines)

    def plot(self, ax: Any = None, title: str = "", *, test: Target | None = None) -> Any:
        """The forecast's picture with the retrained losses in it; arguments as of ``Forecast.plot``."""
        return drawn_fan(self.forecast, self.actual, ax, title, test)

    def plot_changes(self, ax: Any = None, title: str = "") -> Any:
        """Forecast against retrained change of the final loss, a point per test example."""
        from simfluence import plots

        metrics = {"delta correlation": self.delta_correlation, "relative error": self.relative_error}
        title = title or f"{asked(self.forecast)} {len(self.actual_change)} test examples"
        return plots.scatter(self.forecast.change, self.actual_change, ax, title, metrics=metrics)

    def _repr_html_(self) -> str:
        facts = {"truth": self.summary().replace("\n", ". ")}
        return card(str(self.forecast), facts, picture(self.plot), picture(self.plot_changes, 5, 4.4))

    def __str__(self) -> str:
        return f"{self.forecast}\n{self.summary()}"


@dataclass(frozen=True, eq=False)
class Verifications(Sequence[Verification]):
    """Forecasts beside the truth, query by query and, within one, run by run.

    Args:
        forecasts: what was predicted.
        losses: of the retrained runs, ``[queries][runs]`` of ``[steps + 1, test]``.
        final: the last of them, ``[queries, runs, test]``.
        seed_changes: change of the final losses from several seeds, ``[queries, runs, seeds, test]``, if asked for.

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

    @property
    def actual_change(self) -> Float[np.ndarray, "queries runs test"]:
        """Retrained change of the final losses, against the recorded base runs."""
        return self.final - np.array([run.losses[-1] for run in self.forecasts.runs], np.float64)

    @cached_property
    def table(self) -> pd.DataFrame:
        """How right the forecasts were: a row per query, and one for all.

        Columns: ``change`` and ``retrained`` (means over base runs and test examples); ``relative_error``, pooled over
        both, below 1 if better than "nothing changes"; ``delta_correlation`` and ``hit_rate`` of the 10 most changed
        test examples, means over base runs; ``coverage`` of the intervals, ``seed_share`` of the retrained change.
        """
        rows = {name: self._scores(slice(number, number + 1)) for number, name in enumerate(self.forecasts.queries)}
        return pd.DataFrame.from_dict(rows | {"all": self._scores(slice(None))}, orient="index").rename_axis("query")

    def _scores(self, some: slice) -> dict[str, float]:
        change, actual = self.forecasts.change[some], self.actual_change[some]
        pairs = list(zip(change.reshape(-1, change.shape[-1]), actual.reshape(-1, change.shape[-1]), strict=True))
        return {
            "change": float(change.mean()),
            "retrained": float(actual.mean()),
            "relative_error": relative_error(change, actual),
            "delta_correlation": _mean_of_known([delta_correlation(*pair) for pair in pairs]),
            "hit_rate": _mean_of_known([hit_rate(*pair) for pair in pairs]),
            "coverage": _within(self.forecasts.low, self.forecasts.high, self.final, some),
            "seed_share": float("nan") if self.seed_changes is None else seed_share(self.seed_changes[some]),
        }

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The forecasts' frame with the columns actual_base, actual and actual_change."""
        base = np.array([run.losses[-1] for run in self.forecasts.runs], np.float64)
        actual = {"actual_base": np.broadcast_to(base, self.final.shape), "actual": self.final}
        columns = actual | {"actual_change": self.actual_change}
        return self.forecasts.frame.assign(**{name: values.ravel() for name, values in columns.items()})

    def summary(self) -> str:
        """How right the forecasts were in all."""
        scores = self.table.loc["all"]
        changes = f"{scores['retrained']:+.3f} (forecast {scores['change']:+.3f})"
        return (
            f"Retrained {len(self)} curricula: mean change {changes}, "
            f"error {scores['relative_error']:.1%} of saying 'no change', "
            f"delta correlation {scores['delta_correlation']:.3f}"
        )

    def plot(self, ax: Any = None, title: str = "") -> Any:
        """Forecast and retrained change of the mean final loss, a row per query."""
        return drawn_changes(self.forecasts, self.actual_change, ax, title)

    def plot_changes(self, ax: Any = None, title: str = "") -> Any:
        """Forecast against retrained change of the final loss: a point per base run and test example, the queries in
        colours of their own."""
        from simfluence import plots

        scores = self._scores(slice(None))
        metrics = {name.replace("_", " "): scores[name] for name in ("delta_correlation", "relative_error")}
        predicted, actual = (side.reshape(len(side), -1) for side in (self.forecasts.change, self.actual_change))
        title, names = title or about(self.forecasts), list(self.forecasts.queries)
        return plots.scatter(predicted, actual, ax, title, metrics=metrics, groups=names)

    def _repr_html_(self) -> str:
        size = 1.8 + 0.25 * min(len(self.forecasts.queries), 40)
        pictures = picture(self.plot, 7, size), picture(self.plot_changes, 6.5, 4)
        return card("Forecasts beside the truth", {about(self.forecasts): self.summary()}, *pictures)

    def __len__(self) -> int:
        return len(self.forecasts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        forecast = self.forecasts[index]
        query, run = divmod(index % len(self), len(self.forecasts.runs))
        changes = None if self.seed_changes is None else self.seed_changes[query, run]
        return Verification(forecast, self.losses[query][run], changes)


def retrained(
    runs: Sequence[Run],
    curricula: Sequence[Sequence[Curriculum]],
    task: Task | None,
    recipe: Recipe | None,
    store: str | Path | None,
    seeds: int,
) -> tuple[list[list[np.ndarray]], Float[np.ndarray, "queries runs seeds test"] | None]:
    """Losses of training under each edited curriculum, ``[queries][runs]``, and the changes from several seeds.

    Raises:
        InvalidInput: the task is not known or not the base runs', or the recipe is not theirs.
    """
    recipe = recipe or runs[0].recipe
    if task is None or recipe is None:
        missing = "task" if task is None else "recipe"
        raise InvalidInput(f"verifying means training again: give {missing}=")
    if seeds < 1:
        raise InvalidInput(f"seeds must be 1 or more, got {seeds}")
    for run in runs:
        if run.fingerprint not in (None, task.fingerprint):
            raise InvalidInput(f"base run {run.id} is of another task than {task.name!r}")
        if run.recipe not in (None, recipe):
            raise InvalidInput(f"base run {run.id} was trained by another recipe: {run.recipe}")
    every = [curriculum for row in curricula for curriculum in row]
    found = [run.losses.astype(np.float64) for run in record(task, recipe, every, store, verification=True)]
    after = [found[start : start + len(runs)] for start in range(0, len(found), len(runs))]
    if seeds == 1:
        return after, None
    final = np.array([[losses[-1] for losses in row] for row in after])
    changes = [final - np.array([run.losses[-1] for run in runs], np.float64)]
    for further in range(1, seeds):
        other = recipe.replace(seed=recipe.seed + further)
        again = record(task, other, [*(run.curriculum for run in runs), *every], store, verification=True)
        ends = np.array([run.losses[-1] for run in again], np.float64)
        changes.append(ends[len(runs) :].reshape(final.shape) - ends[: len(runs)])
    return after, np.stack(changes, axis=2)


def asked(forecast: Forecast) -> str:
    """The question, with the task's name where it is known."""
    name = forecast.run.task_name
    return f"{name + ': w' if name else 'W'}{str(forecast).partition('?')[0][1:]}?"


def about(forecasts: Forecasts) -> str:
    """How many questions, of how many runs."""
    queries, runs, tests = forecasts.change.shape
    name = forecasts.runs[0].task_name
    return f"{name + ': ' if name else ''}{queries} queries of {runs} base runs, {tests} test examples"


def drawn_fan(forecast: Forecast, actual: np.ndarray | None, ax: Any, title: str, test: Target | None) -> Any:
    """The mean losses of the chosen test examples, with the interval where there is one."""
    from simfluence import plots

    run = forecast.run
    everyone = run.test or Examples.numbered(run.losses.shape[1])
    chosen = np.arange(len(everyone)) if test is None else everyone.select(test)
    losses = {"base, forecast": forecast.base, "edited, forecast": forecast.what_if, "base, recorded": run.losses}
    losses |= {} if actual is None else {"edited, retrained": actual}
    interval = None
    if forecast.low is not None and forecast.high is not None:
        interval = forecast.low[:, chosen].mean(1), forecast.high[:, chosen].mean(1)
    of = "test example" if len(chosen) == 1 else "test examples"
    return plots.fan(
        {name: each[:, chosen].astype(np.float64).mean(1) for name, each in losses.items()}, ax,
        title or f"{asked(forecast)} {'Mean of ' if len(chosen) > 1 else ''}{len(chosen)} {of}",
        interval=interval,
        ylabel="test loss" if len(chosen) == 1 else "mean test loss",
        interval_name="interval of the forecast" if len(chosen) == 1 else "intervals, averaged",
    )  # fmt: skip


def drawn_changes(forecasts: Forecasts, actual: np.ndarray | None, ax: Any, title: str) -> Any:
    """The mean change by query."""
    from simfluence import plots

    predicted, retrained = forecasts.change.mean((1, 2)), None if actual is None else actual.mean((1, 2))
    return plots.changes(list(forecasts.queries), predicted, retrained, ax, title or about(forecasts))


def _within(low: Any, high: Any, actual: np.ndarray, some: slice) -> float:
    if low is None or high is None:
        return float("nan")
    return float(np.mean((low[some] <= actual[some]) & (actual[some] <= high[some])))


def _mean_of_known(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
