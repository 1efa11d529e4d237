"""What-if questions: what would the losses be under an edited curriculum?

forecast  = what_if(simulator, run, Remove("label == 3"))             one question: whole trajectories
forecasts = what_if(simulator, runs, {"no 3": Remove("label == 3"), …})   many, of many runs: final losses
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
from jaxtyping import Float

from simfluence._files import write_whole
from simfluence._html import card, picture
from simfluence._types import RunLosses, Target
from simfluence.curriculum import Curriculum
from simfluence.edits import Edit, apply_all
from simfluence.errors import InvalidInput
from simfluence.examples import Examples
from simfluence.recipe import Recipe
from simfluence.runs import Run
from simfluence.simulators import ConformalSimulator, Simulator
from simfluence.task import Task
from simfluence.verification import Verification, Verifications, about, drawn_changes, drawn_fan, retrained

_AT_ONCE = 50  # edited curricula whose intervals are asked for together

PerTest = Float[np.ndarray, " test"]
PerQuery = Float[np.ndarray, "queries runs test"]
Query = Edit | Sequence[Edit]


@dataclass(frozen=True, eq=False)
class Forecast:
    """What a simulator says of one edited curriculum, beside what it says of the base.

    Both sides are simulated, so that the simulator's common error cancels in the difference.

    Args:
        run: the base run.
        edits: what was changed.
        curriculum: the edited curriculum.
        base: simulated losses under the base curriculum, ``[steps + 1, test]``.
        what_if: the same under the edited one, with as many rows as it has steps, and one.
        low, high: ends of the interval of each loss in ``what_if``, where the simulator gives them.
        task: for ``verify``, if known.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> forecast = what_if(sf.AdditiveSimulator(l2=1e-6).fit(runs), runs[0], sf.Remove([1]))
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

    @property
    def change(self) -> PerTest:
        """Predicted change of each test example's final loss."""
        return self.what_if[-1] - self.base[-1]

    @property
    def changes_nothing(self) -> bool:
        """Whether the edited curriculum is the base's: of examples that it never shows, say."""
        return self.curriculum == self.run.curriculum

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Tidy: a row per step and test example; columns step, test, base, what_if, delta and, where the simulator
        gives intervals, low and high. Missing after the end of the shorter curriculum."""
        columns = {"base": self.base, "what_if": self.what_if}
        if self.low is not None and self.high is not None:
            columns |= {"low": self.low, "high": self.high}
        return tidy(columns)

    @cached_property
    def final(self) -> pd.DataFrame:
        """The final losses, a row per test example: base, what_if, change (low, high) and what is known of it."""
        table = pd.DataFrame({"base": self.base[-1], "what_if": self.what_if[-1], "change": self.change})
        if self.low is not None and self.high is not None:
            table["low"], table["high"] = self.low[-1], self.high[-1]
        return described(table.rename_axis("test"), self.run.test)

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
        """The answer in words and numbers."""
        lines = [
            str(self),
            f"Base run {self.run.id}: {_extent(self.run.curriculum)}; edited: {_extent(self.curriculum)}.",
        ]
        rises, falls = int((self.change > 0).sum()), int((self.change < 0).sum())
        lines.append(f"Of {len(self.change)} test examples {rises} rise and {falls} fall.")
        for index, row in self.ranking().head(3).iterrows():
            known = "" if self.run.test is None else f" ({self.run.test.ids[int(str(index))]})"
            within = f", interval {row['low']:.3f} to {row['high']:.3f}" if "low" in row else ""
            lines.append(
                f"  test {index}{known}: {row['base']:.3f} → {row['what_if']:.3f} ({row['change']:+.3f}){within}"
            )
        return "\n".join(lines)

    def plot(self, ax: Any = None, title: str = "", *, test: Target | None = None) -> Any:
        """The mean loss along training: base and edited, as forecast (with its interval), and the base as recorded.

        Args:
            ax: matplotlib's axes to draw on; by default those of a new figure. They are returned.
            title: by default the question.
            test: whose losses: a filter over the test examples, indices or ids; all of them by default.
        """
        return drawn_fan(self, None, ax, title, test)

    def _repr_html_(self) -> str:
        question, _, answer = str(self).partition("? ")
        return card(f"{question}?", {self.run.task_name or "forecast": answer}, picture(self.plot))

    def to_parquet(self, path: str | Path) -> None:
        """Write ``frame`` to a Parquet file."""
        write_whole(Path(path), self.frame.to_parquet(index=False))

    def verify(
        self,
        recipe: Recipe | None = None,
        *,
        task: Task | None = None,
        store: str | Path | None = None,
        seeds: int = 1,
    ) -> Verification:
        """Really retrain under the edited curriculum and set the truth beside the forecast.

        Args:
            recipe: how to train; by default as the base run was.
            task: what to train; by default the one given to ``what_if``.
            store: folder to keep the retrained runs in, marked as verifications so that ``load()`` leaves them out;
                asking again trains nothing, and an interrupted verification is gone on with.
            seeds: with more than 1, base and edited curriculum are also trained from so many − 1 other seeds of the
                recipe: how much of the change is the seed's?

        Raises:
            InvalidInput: the task is not known or not the base run's, or the recipe is not the base run's.
        """
        task = task or self.task
        after, noise = retrained([self.run], [[self.curriculum]], task, recipe, store, seeds)
        return Verification(self, after[0][0], None if noise is None else noise[0, 0])

    def __str__(self) -> str:
        nothing = " (nothing changes: the base run never shows them so)" if self.changes_nothing else ""
        before, after = self.base[-1].mean(), self.what_if[-1].mean()
        return f"What if we {said(self.edits)}? Mean final loss {before:.3f} → {after:.3f}{nothing}"


@dataclass(frozen=True, eq=False)
class Forecasts(Sequence[Forecast]):
    """What a simulator says of many queries of one or many base runs: the change of every final loss.

    A sequence of ``Forecast`` by number, query by query and, within one, run by run; each is simulated when asked for.

    Args:
        simulator: that was asked.
        runs: the base runs.
        queries: edits of each query, by name.
        curricula: the edited curriculum of each query and run.
        base: simulated final losses of the base runs, ``[runs, test]``.
        change: of the final losses, ``[queries, runs, test]``.
        low, high: ends of the intervals of the final losses, where the simulator gives them.
        confidence: of the intervals.
        task: for ``verify``, if known.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> fitted = sf.AdditiveSimulator(l2=1e-6).fit(runs)
    >>> what_if(fitted, runs, {"no 0": sf.Remove([0]), "no 1": sf.Remove([1])}).ranking()["change"].round(2).to_dict()
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

    @property
    def what_if(self) -> PerQuery:
        """Predicted final losses."""
        return self.base + self.change

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Tidy: a row per query, base run and test example; columns query, run, test, base, what_if, change and, where
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

    def by_group(self, column: str) -> pd.DataFrame:
        """Mean change of the final loss, a row per query, a column per value of a metadata column of the test examples.

        Raises:
            InvalidInput: the test examples have no such column.
        """
        values = column_of(self.runs[0].test, column, "test")
        table = pd.DataFrame(self.change.mean(1), index=pd.Index(self.queries, name="query"))
        return table.T.groupby(values.to_numpy()).mean().T.rename_axis(columns=column)

    def ranking(self) -> pd.DataFrame:
        """The queries, those that raise the mean final loss most first: columns change, base, what_if, edits, and how
        many base runs they leave as they are."""
        same = [sum(c == run.curriculum for c, run in zip(row, self.runs, strict=True)) for row in self.curricula]
        means = {"change": self.change.mean((1, 2)), "base": self.base.mean(), "what_if": self.what_if.mean((1, 2))}
        edits = [said(edits) for edits in self.queries.values()]
        table = pd.DataFrame(means | {"edits": edits, "unchanged_runs": same}, pd.Index(self.queries, name="query"))
        return table.sort_values("change", ascending=False, kind="stable")

    def summary(self) -> str:
        """The answers in words and numbers."""
        of = f"{len(self.queries)} queries of {len(self.runs)} base runs, {self.change.shape[2]} test examples"
        lines = [f"{of}. Mean final loss {self.base.mean():.3f}; by query:"]
        for name, row in self.ranking().iterrows():
            nothing = " (nothing changes)" if row["unchanged_runs"] == len(self.runs) else ""
            lines.append(f"  {name}: {row['change']:+.3f}{nothing}")
        return "\n".join(lines)

    def plot(self, ax: Any = None, title: str = "") -> Any:
        """The forecast change of the mean final loss, a row per query."""
        return drawn_changes(self, None, ax, title)

    def _repr_html_(self) -> str:
        rows = 1.8 + 0.25 * min(len(self.queries), 40)
        return card(about(self), {"Mean final loss": f"{self.base.mean():.3f}"}, picture(self.plot, 7, rows))

    def to_parquet(self, path: str | Path) -> None:
        """Write ``frame`` to a Parquet file."""
        write_whole(Path(path), self.frame.to_parquet(index=False))

    def verify(
        self,
        recipe: Recipe | None = None,
        *,
        task: Task | None = None,
        store: str | Path | None = None,
        seeds: int = 1,
    ) -> Verifications:
        """Really retrain under every edited curriculum, many at a time; arguments as of ``Forecast.verify``."""
        after, noise = retrained(self.runs, self.curricula, task or self.task, recipe, store, seeds)
        final = np.array([[losses[-1] for losses in row] for row in after])
        return Verifications(self, after, final, noise)

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
        return _forecast(self.simulator, self.runs[run], edits, self.curricula[query][run], self.confidence, self.task)

    def __iter__(self) -> Iterator[Forecast]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Forecasts({len(self.queries)} queries of {len(self.runs)} runs, test={self.change.shape[2]})"


@overload
def what_if(
    simulator: Simulator, base: Run, queries: Query, *, task: Task | None = None, confidence: float = 0.9
) -> Forecast: ...
@overload
def what_if(
    simulator: Simulator,
    base: Run | Sequence[Run],
    queries: Mapping[str, Query] | Sequence[Sequence[Edit]] | Query,
    *,
    task: Task | None = None,
    confidence: float = 0.9,
) -> Any: ...
def what_if(
    simulator: Simulator, base: Any, queries: Any, *, task: Task | None = None, confidence: float = 0.9
) -> Forecast | Forecasts:
    """What would the losses be, had the curriculum of a run been edited?

    Args:
        simulator: fitted on runs of the same task.
        base: a run, or several: its curriculum is edited, its initial losses are where both simulations start.
        queries: one edit, or several to be applied one after the other; or many queries, as a mapping from names to
            such, or as a list of lists of edits.
        task: for filters over metadata when the run does not carry it, and for ``verify``.
        confidence: of intervals, where the simulator gives them (see ``ConformalSimulator``).

    Returns:
        A ``Forecast`` with whole trajectories for one run and one query; else ``Forecasts``.

    Raises:
        InvalidInput: no edit, an edit that cannot be applied, or a run of other examples than the simulator's.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> simulator = sf.AdditiveSimulator(l2=1e-6).fit(runs)
    >>> what_if(simulator, runs[0], sf.Remove([1])).change.round(2)
    array([-0.5])
    >>> forecasts = what_if(simulator, runs, {"without 0": sf.Remove([0]), "without 1": sf.Remove([1])})
    >>> forecasts.change.round(2).ravel()
    array([ 2. , -0.5])
    """
    runs = (base,) if isinstance(base, Run) else tuple(base)
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise InvalidInput(f"the base must be a Run (runs[0], say) or several, got {base!r}")
    for run in runs:
        check_base(simulator, run, task)
    if isinstance(base, Run) and _is_one(queries):
        edits = _edits(queries)
        edited = apply_all(edits, base.curriculum, task.train if task else base.train)
        return _forecast(simulator, base, edits, edited, confidence, task)
    return _forecasts(simulator, runs, _named(queries), confidence, task)


def _forecast(
    simulator: Simulator, run: Run, edits: tuple[Edit, ...], edited: Curriculum, confidence: float, task: Task | None
) -> Forecast:
    base, changed = simulator.simulate([run.curriculum, edited], run.initial_losses)
    low = high = None
    rows = len(edited) + 1
    if isinstance(simulator, ConformalSimulator):
        low, high = (ends[0] for ends in simulator.interval([edited], run.initial_losses, confidence))
    return Forecast(run, edits, edited, base[: run.steps + 1], changed[:rows], low, high, task)


def _forecasts(
    simulator: Simulator,
    runs: tuple[Run, ...],
    queries: Mapping[str, tuple[Edit, ...]],
    confidence: float,
    task: Task | None,
) -> Forecasts:
    edited = [[_applied(name, edits, run, task) for run in runs] for name, edits in queries.items()]
    base, change, ends = [], [], []
    for number, run in enumerate(runs):
        mine = [row[number] for row in edited]
        base.append(simulator.simulate([run.curriculum], run.initial_losses)[0, -1])
        change.append(simulator.changes(run.curriculum, mine, run.initial_losses))
        if isinstance(simulator, ConformalSimulator):
            ends.append(_final_intervals(simulator, mine, run.initial_losses, confidence))
    low, high = np.stack(ends, axis=2) if ends else (None, None)
    return Forecasts(simulator, runs, queries, edited, np.stack(base), np.stack(change, 1), low, high, confidence, task)


def _final_intervals(
    simulator: ConformalSimulator, curricula: Sequence[Curriculum], initial: np.ndarray, confidence: float
) -> np.ndarray:
    """Low and high ends of the final losses, ``[2, curricula, test]``."""
    found = []
    for start in range(0, len(curricula), _AT_ONCE):
        some = curricula[start : start + _AT_ONCE]
        ends = simulator.interval(some, initial, confidence)
        found.append([[losses[len(c)] for losses, c in zip(each, some, strict=True)] for each in ends])
    return np.concatenate(found, axis=1)


def _applied(name: str, edits: tuple[Edit, ...], run: Run, task: Task | None) -> Curriculum:
    try:
        return apply_all(edits, run.curriculum, task.train if task else run.train)
    except InvalidInput as error:
        raise InvalidInput(f"query {name!r} of base run {run.id}: {error}") from None


def check_base(simulator: Simulator, run: Run, task: Task | None = None) -> None:
    """Whether a run can be asked about.

    Raises:
        InvalidInput: it is of another task than the simulator, or than ``task``.
    """
    if task is not None and run.fingerprint not in (None, task.fingerprint):
        raise InvalidInput(f"base run {run.id} is of another task than {task.name!r}")
    fitted_on = getattr(simulator, "fingerprint_", None)
    if None not in (fitted_on, run.fingerprint) and fitted_on != run.fingerprint:
        raise InvalidInput(f"base run {run.id} is of another task than the runs that the simulator was fitted on")


def _is_one(queries: Any) -> bool:
    """Whether this is one query: an edit, or a sequence of edits (an empty one, too, which is refused later)."""
    if isinstance(queries, Mapping):
        return False
    return isinstance(queries, Edit) or not any(isinstance(each, Sequence) for each in queries)


def _edits(query: Any) -> tuple[Edit, ...]:
    edits = (query,) if isinstance(query, Edit) else tuple(query)
    if not edits or not all(isinstance(edit, Edit) for edit in edits):
        raise InvalidInput("edits must be one or more of Remove, Keep, Repeat, …, such as Remove('label == 3')")
    return edits


def _named(queries: Any) -> dict[str, tuple[Edit, ...]]:
    """Every query by its name; those without are called by what they say."""
    if isinstance(queries, Mapping):
        named = {str(name): _edits(query) for name, query in queries.items()}
    else:
        listed = [_edits(query) for query in ([queries] if _is_one(queries) else queries)]
        named = {said(edits): edits for edits in listed}
    if not named:
        raise InvalidInput("no query: give one edit or more")
    return named


def said(edits: Sequence[Edit]) -> str:
    """Edits as one sentence."""
    return " and ".join(str(edit) for edit in edits)


def described(table: pd.DataFrame, examples: Examples | None) -> pd.DataFrame:
    """A table with a row per example, with what is known of them beside it."""
    if examples is None:
        return table
    taken = {name: f"{name}_of_example" for name in examples.table.columns if name in table.columns}
    return table.join(examples.table.rename(columns=taken))


def column_of(examples: Examples | None, name: str, side: str) -> pd.Series:
    """A metadata column of one side's examples.

    Raises:
        InvalidInput: nothing is known of them, or there is no such column.
    """
    if examples is None:
        raise InvalidInput(f"nothing is known of the {side} examples, so not their {name!r} either: give task=")
    return pd.Series(examples.column(name), name=name)


def tidy(columns: Mapping[str, RunLosses]) -> pd.DataFrame:
    """Losses ``[steps + 1, test]`` as columns, a row per step and test example, with delta = what_if − base."""
    longest, tests = max(len(losses) for losses in columns.values()), next(iter(columns.values())).shape[1]
    index = {"step": np.repeat(np.arange(longest), tests), "test": np.tile(np.arange(tests), longest)}
    full = {name: np.full((longest, tests), np.nan) for name in columns}
    for name, losses in columns.items():
        full[name][: len(losses)] = losses
    frame = pd.DataFrame(index | {name: losses.ravel() for name, losses in full.items()})
    frame.insert(4, "delta", frame["what_if"] - frame["base"])
    return frame


def _extent(curriculum: Curriculum) -> str:
    examples = len(np.unique(curriculum.indices))
    return f"{len(curriculum)} steps, {len(curriculum.indices)} places of {examples} examples"
